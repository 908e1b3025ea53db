"""lowprec: low-precision training of language models.

    plan = lowprec.convert(model, "fp8_blockwise")   # in place
    print(plan)                                      # what runs where, and why

Names are imported on first use, so that `import lowprec` stays cheap. Type checkers and editors
read them from `__init__.pyi`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module and attribute. An empty attribute stands for the module itself.
_EXPORTS = {
    "quantize": ("lowprec.quant", "quantize"),
    "fake_quantize": ("lowprec.quant", "fake_quantize"),
    "QTensor": ("lowprec.quant", "QTensor"),
    "OperandSpec": ("lowprec.quant", "OperandSpec"),
    "recipes": ("lowprec.recipe.library", ""),
    "Recipe": ("lowprec.recipe", "Recipe"),
    "convert": ("lowprec.conversion.convert", "convert"),
    "revert": ("lowprec.conversion.convert", "revert"),
    "Plan": ("lowprec.conversion.plan", "Plan"),
    "PrecisionConfig": ("lowprec.training.control.precision", "PrecisionConfig"),
    "UserError": ("lowprec.errors", "UserError"),
    "attention": ("lowprec.attention", ""),
    "LowPrecisionCallback": ("lowprec.training.callback", "LowPrecisionCallback"),
}

__all__ = [*_EXPORTS, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lowprec' has no attribute {name!r}")
    module_name, attribute = _EXPORTS[name]
    module = importlib.import_module(module_name)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
