"""Turning the linear layers of a model to low precision: find them, decide, convert, and tell what
was done."""
