"""Measure the error of a narrow accumulator, with and without promotion to fp32.

This is the experiment behind arXiv 2412.19437, section 3.3.2.

python benchmarks/accumulate.py
python benchmarks/accumulate.py --figure docs/images/accumulate.svg

The reference backend multiplies two matrices of e4m3 values (scale 1). The result is compared with
the float64 product of the same values, so that only the sums differ. The errors are taken over the
64 x 64 results of one product, unless the row states another size:

    max / rms     largest |error| over the root mean square of the results
    max rel       largest |error| / |result| among the results whose magnitude is at least the root
                  mean square
    max rel, all  the same among all results; with operands of mean zero, it mostly shows how close
                  to zero the smallest result is
    mean rel      mean |error| over mean |result|
    bias          mean of error * sign(result) over mean |result|: negative if sums shrink

The figures are medians over the seeds, in per cent; `max rel` and `max rel, all` are the largest of
the seeds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowprec.formats.element import E4M3
from lowprec.formats.rounding import round_to_format
from lowprec.gemm import Accumulation
from lowprec.gemm.reference import ReferenceBackend

ROWS = 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SUMS = {
    "14 bits, never promoted": Accumulation(bits=14),
    "14 bits, every 512": Accumulation(bits=14, promote_every=512),
    "14 bits, every 256": Accumulation(bits=14, promote_every=256),
    "14 bits, every 128": Accumulation(bits=14, promote_every=128),
    "fp32": Accumulation(bits=24),
}
OPERANDS = {"gaussian, mean 0": torch.randn, "uniform in [0, 1)": torch.rand}
COLUMNS = ("max / rms", "max rel", "max rel, all", "mean rel", "bias")
LARGEST_OF_SEEDS = ("max rel", "max rel, all")
LARGER = {"gaussian, mean 0": ((256, 1),), "uniform in [0, 1)": ((256, 1),)}
"""Larger results for each kind of operands: (rows and columns, number of seeds)."""
K = 4096
PUBLISHED = 2.0
"""Published error at this K, in per cent."""


def operands(kind: str, length: int, seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return two matrices [rows, length] of e4m3 values, fp32."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        round_to_format(OPERANDS[kind](rows, length, generator=generator), E4M3) for _ in range(2)
    )
    return a, b


def errors(result: Tensor, exact: Tensor) -> list[float]:
    """Return the values of `COLUMNS`, as fractions."""
    error = result.double() - exact
    size = exact.abs()
    rms = exact.square().mean().sqrt()
    relative = error.abs() / size
    return [
        (error.abs().max() / rms).item(),
        relative[size >= rms].max().item(),
        relative[size > 0].max().item(),
        (error.abs().mean() / size.mean()).item(),
        ((error * exact.sign()).mean() / size.mean()).item(),
    ]


def measure(
    kind: str, length: int, sums: dict[str, Accumulation], rows: int = ROWS, seeds: int = 3
) -> dict[str, list[float]]:
    """Return the values of `COLUMNS` in per cent, for each accumulator."""
    found: dict[str, list[list[float]]] = {name: [] for name in sums}
    for seed in range(seeds):
        a, b = operands(kind, length, seed, rows)
        exact = a.double() @ b.double().t()  # [M, K] . [N, K]^T -> [M, N]
        for name, accumulation in sums.items():
            found[name].append(
                errors(ReferenceBackend().mm(a, b, torch.float32, accumulation), exact)
            )
    return {
        name: [100 * value for value in _over_seeds(torch.tensor(per_seed, dtype=torch.float64))]
        for name, per_seed in found.items()
    }


def _over_seeds(rows: Tensor) -> list[float]:
    """Reduce [seeds, columns] to one value a column: the largest of the seeds, or the median."""
    largest = torch.tensor([column in LARGEST_OF_SEEDS for column in COLUMNS])
    return torch.where(largest, rows.amax(0), rows.median(0).values).tolist()


def _per_cent(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def print_table(columns: Sequence[str], rows: dict[str, list[float]]) -> None:
    print("| [%] | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(_per_cent(value) for value in values) + " |")
    print()


def draw(results: dict[str, dict[int, dict[str, list[float]]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "lowprec", "font.size": 12, "svg.fonttype": "path"})
    from matplotlib import pyplot

    colours = ("#d55e00", "#e69f00", "#009e73", "#0072b2", "#000000")
    markers = "osD^x"
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, (kind, lengths) in zip(panels, results.items(), strict=True):
        for name, colour, marker in zip(SUMS, colours, markers, strict=True):
            # A log axis cannot show zero.
            values = [lengths[length][name][0] or float("nan") for length in LENGTHS]
            panel.plot(
                LENGTHS,
                values,
                color=colour,
                marker=marker,
                label=name,
                linewidth=1.8,
                markersize=6,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        panel.set_xlabel("K, products in a sum")
        panel.set_title(f"operands {kind}", fontsize=12)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("largest error / rms of the results [%]")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        columnspacing=1.4,
    )
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path, help="also draw the error against K, as SVG")
    figure = parser.parse_args().figure
    results = {
        kind: {length: measure(kind, length, SUMS) for length in LENGTHS} for kind in OPERANDS
    }
    for kind, lengths in results.items():
        print(f"Operands {kind}, `{COLUMNS[0]}`, by K:\n")
        print_table(
            [str(length) for length in LENGTHS],
            {name: [lengths[length][name][0] for length in LENGTHS] for name in SUMS},
        )
    for kind, lengths in results.items():
        print(f"Operands {kind}, K = {K}, by definition:\n")
        print_table(COLUMNS, lengths[K])
    print(
        f"K = {K}, never promoted (published for Hopper: nearly {PUBLISHED:g}%), by the "
        "accumulator's width and the number of results:\n"
    )
    for kind in OPERANDS:
        rows = measure(
            kind, K, {f"{kind}, {bits} bits": Accumulation(bits=bits) for bits in range(12, 17)}
        )
        for size, seeds in LARGER[kind]:
            name = f"{kind}, 14 bits, {size} x {size} results"
            rows |= measure(
                kind, K, {name: SUMS["14 bits, never promoted"]}, rows=size, seeds=seeds
            )
        print_table(COLUMNS, rows)
    if figure:
        draw(results, figure)


if __name__ == "__main__":
    main()
