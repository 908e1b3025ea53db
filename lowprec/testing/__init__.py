"""Matrices, shapes, edge cases, metrics and bounds that the tests of every implementation share.

Each bound is written once, here, with its reason beside it, so that loosening a bound shows in a
diff. No other part of the package imports this one.
"""

from lowprec.testing.cases import EDGE_BLOCKS, EdgeBlock
from lowprec.testing.data import DISTRIBUTIONS, gaussian, heavy_tailed
from lowprec.testing.metrics import fp32_accumulation_bound, sqnr_db
from lowprec.testing.oracles import (
    e8m0_scale,
    neighbours,
    non_negative_values,
    nvfp4_by_numpy,
    quantize_by_numpy,
    round_by_ml_dtypes,
    round_by_search,
)
from lowprec.testing.shapes import ODD_SHAPES, RECIPE_SHAPE, SQNR_SHAPE
from lowprec.testing.tolerances import (
    SQNR_CEILING_ABOVE_FLOOR_DB,
    SQNR_CEILING_FP32_DB,
    SQNR_FLOORS_DB,
)

__all__ = [
    "DISTRIBUTIONS",
    "EDGE_BLOCKS",
    "ODD_SHAPES",
    "RECIPE_SHAPE",
    "SQNR_CEILING_ABOVE_FLOOR_DB",
    "SQNR_CEILING_FP32_DB",
    "SQNR_FLOORS_DB",
    "SQNR_SHAPE",
    "EdgeBlock",
    "e8m0_scale",
    "fp32_accumulation_bound",
    "gaussian",
    "heavy_tailed",
    "neighbours",
    "non_negative_values",
    "nvfp4_by_numpy",
    "quantize_by_numpy",
    "round_by_ml_dtypes",
    "round_by_search",
    "sqnr_db",
]
