"""Which operand gets which representation, in which of a linear layer's three GEMMs."""

from lowprec.recipe.base import FROM_FPROP, GEMMS, FromFprop, GemmSpec, Recipe

__all__ = ["FROM_FPROP", "GEMMS", "FromFprop", "GemmSpec", "Recipe"]
