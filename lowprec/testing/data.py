"""Matrices to test with. Every one comes from a seed of its own, never from the global
generator."""

from collections.abc import Callable

import torch
from torch import Tensor


def gaussian(rows: int, cols: int, seed: int) -> Tensor:
    """Standard normal values, fp32."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, cols: int, seed: int) -> Tensor:
    """Student's t with 5 degrees of freedom, fp32: about the tails of activations and gradients in
    training."""
    generator = torch.Generator().manual_seed(seed)
    chi_squared = torch.randn(5, rows, cols, generator=generator).square().sum(0)
    return torch.randn(rows, cols, generator=generator) / (chi_squared / 5).sqrt()


DISTRIBUTIONS: dict[str, Callable[[int, int, int], Tensor]] = {
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
}
