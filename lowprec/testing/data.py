"""Random matrices for tests. Each is drawn from its own seed, never from the global generator."""

from collections.abc import Callable

import torch
from torch import Tensor


def gaussian(rows: int, cols: int, seed: int) -> Tensor:
    """Return standard normal values, fp32 [rows, cols]."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, cols: int, seed: int) -> Tensor:
    """Return values of Student's t with 5 degrees of freedom, fp32 [rows, cols].

    Its tails are about those of activations and gradients in training.
    """
    generator = torch.Generator().manual_seed(seed)
    chi_squared = torch.randn(5, rows, cols, generator=generator).square().sum(0)
    return torch.randn(rows, cols, generator=generator) / (chi_squared / 5).sqrt()


DISTRIBUTIONS: dict[str, Callable[[int, int, int], Tensor]] = {
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
}
