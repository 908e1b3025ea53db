"""Benchmarks of the parts: medians with their spread, the floor of each row, and rivals measured in
the same run."""
