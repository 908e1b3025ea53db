"""Checkpoints: the parts that they hold, and loading them again."""
