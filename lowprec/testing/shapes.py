"""Shapes to test linear layers with, as (M tokens, N output features, K input features)."""

ODD_SHAPES = (
    (1, 1, 1),
    (3, 5, 7),
    (33, 31, 65),  # one past, one short of and one past multiples of 32
    (129, 130, 127),  # the same of 128
)
"""No extent is a multiple of a block: every GEMM pads along its contraction axis, each of M, N and
K in turn."""

RECIPE_SHAPE = (160, 192, 224)
"""Several MX blocks and a whole and a partial 128-block along every axis, so that every recipe
differs from every other."""

SQNR_SHAPE = (256, 384, 512)
"""Large enough that SQNR varies little between seeds (see `tolerances`), small enough for
milliseconds on a CPU."""
