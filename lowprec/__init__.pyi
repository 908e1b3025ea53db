# The public names as type checkers and editors see them: __init__.py imports them on first use.
from lowprec import attention as attention
from lowprec.conversion.convert import convert as convert
from lowprec.conversion.convert import revert as revert
from lowprec.conversion.plan import Plan as Plan
from lowprec.errors import UserError as UserError
from lowprec.quant import OperandSpec as OperandSpec
from lowprec.quant import QTensor as QTensor
from lowprec.quant import fake_quantize as fake_quantize
from lowprec.quant import quantize as quantize
from lowprec.recipe import Recipe as Recipe
from lowprec.recipe import library as recipes
from lowprec.training.callback import LowPrecisionCallback as LowPrecisionCallback
from lowprec.training.control.precision import PrecisionConfig as PrecisionConfig

__all__ = [
    "LowPrecisionCallback",
    "OperandSpec",
    "Plan",
    "PrecisionConfig",
    "QTensor",
    "Recipe",
    "UserError",
    "__version__",
    "attention",
    "convert",
    "fake_quantize",
    "quantize",
    "recipes",
    "revert",
]

__version__: str
