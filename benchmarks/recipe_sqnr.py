"""Measure the SQNR of each recipe's three GEMMs against fp32: the smallest of five seeds, in dB.

python benchmarks/recipe_sqnr.py
"""

import torch

import lowprec
from lowprec.nn import LowPrecisionLinear
from lowprec.testing import DISTRIBUTIONS, sqnr_db

TOKENS, OUTPUTS, INPUTS = 256, 384, 512


def measure(recipe: str, distribution: str, seed: int) -> torch.Tensor:
    """Return the SQNR of y, dx and dw, in dB."""
    draw = DISTRIBUTIONS[distribution]
    x = draw(TOKENS, INPUTS, seed)  # [M, K]
    w = draw(OUTPUTS, INPUTS, seed + 1)  # [N, K]
    g = draw(TOKENS, OUTPUTS, seed + 2)  # [M, N]
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = w
    LowPrecisionLinear.from_linear(linear, lowprec.recipes.get(recipe))
    x.requires_grad_()
    y = linear(x)
    dx, dw = torch.autograd.grad(y, (x, linear.weight), g)
    exact = (
        x.double() @ w.double().t(),  # y: [M, K] . [N, K]^T -> [M, N]
        g.double() @ w.double(),  # dx: [M, N] . [N, K] -> [M, K]
        g.double().t() @ x.double(),  # dw: [M, N]^T . [M, K] -> [N, K]
    )
    pairs = zip(exact, (y, dx, dw), strict=True)
    return torch.tensor(
        [sqnr_db(reference.detach(), value.detach().double()) for reference, value in pairs]
    )


def main() -> None:
    print(
        "| recipe | "
        + " | ".join(
            f"{name} {gemm}" for name in DISTRIBUTIONS for gemm in ("fprop", "dgrad", "wgrad")
        )
        + " |"
    )
    print("| --- " * 7 + "|")
    for recipe in lowprec.recipes.names():
        cells = [
            torch.stack([measure(recipe, name, 10 * seed) for seed in range(5)]).amin(0).tolist()
            for name in DISTRIBUTIONS
        ]
        print(
            f"| {recipe} | " + " | ".join(f"{value:.1f}" for row in cells for value in row) + " |"
        )


if __name__ == "__main__":
    main()
