"""Optimizers with low-precision state, and loss scaling."""
