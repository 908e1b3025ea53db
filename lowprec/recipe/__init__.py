"""Recipes: the representation of each operand in the three GEMMs of a linear layer."""

from lowprec.recipe.base import FROM_FPROP, GEMMS, FromFprop, GemmSpec, Recipe

__all__ = ["FROM_FPROP", "GEMMS", "FromFprop", "GemmSpec", "Recipe"]
