"""Draw formats.svg and scales.svg.

formats.svg shows the values of each element format; scales.svg shows one block under every scale
rule.

python docs/images/render_formats.py docs/images         # a second folder gets PNG files too

All values come from the package: from decoding every code of a format, and from `lowprec.quantize`.
"""

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

import lowprec
from lowprec.formats import encoding
from lowprec.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, E5M6, INT4, INT8, ElementFormat

matplotlib.rcParams.update(
    {"svg.hashsalt": "lowprec", "svg.fonttype": "path", "path.simplify": False, "font.size": 12}
)

# The palette of Okabe and Ito.
NORMAL = "#0072b2"
SUBNORMAL = "#e69f00"
BEYOND = "#d55e00"
SAMPLE = "#000000"
FORMATS = (E2M1, E2M3, E3M2, E4M3, E5M2, E5M6, INT4, INT8)
THINNED = 8
"""Step between the drawn values of the twelve-bit format."""

BLOCK = (0.22, 0.5, -0.8, 1.3, 1.8, -2.4, 3.1, -4.4, 5.2, -6.6)
"""Block of scales.svg. Its amax is 1.65 * 4. The mantissa 1.65 is above t = 1.5, so rceil bumps the
scale, and below 1.75, so even does not."""
AMAX_OF_MATRIX = 48.0
"""Largest magnitude elsewhere in the block's matrix, which sets NVFP4's scale of the matrix."""
SCALES = ("e8m0:floor", "e8m0:ceil", "e8m0:even", "e8m0:rceil", "e4m3", "e4m3 4/6")


def positive_values(fmt: ElementFormat) -> torch.Tensor:
    """Return the positive values of a format in ascending order, fp32."""
    values = encoding.decode(torch.arange(1 << fmt.bits), fmt)
    return values[(values > 0) & (values <= fmt.max)].unique()


def ticks(axes: Axes, places: torch.Tensor, bottom: float, top: float, **style: Any) -> None:
    """Draw vertical strokes as one path with gaps, which keeps the file small."""
    heights = torch.tensor([bottom, top, torch.nan]).repeat(len(places))
    axes.plot(places.repeat_interleave(3), heights, solid_capstyle="butt", **style)


def draw_formats(axes: Axes) -> None:
    """Draw the positive values of each format, one row a format, on a logarithmic axis."""
    for row, fmt in enumerate(FORMATS):
        values = positive_values(fmt)
        if fmt.bits > 8:
            values = values[::THINNED]
        subnormal = values < (0.0 if fmt.is_integer else fmt.min_normal)
        for chosen, colour in ((values[~subnormal], NORMAL), (values[subnormal], SUBNORMAL)):
            ticks(axes, chosen.log2(), row - 0.3, row + 0.3, color=colour, linewidth=0.9)
        axes.text(math.log2(fmt.max) + 0.35, row, f"{fmt.max:g}", va="center", fontsize=11)
    axes.set_yticks(
        range(len(FORMATS)),
        [f"{fmt.name}\n1 in {THINNED}" if fmt.bits > 8 else fmt.name for fmt in FORMATS],
    )
    axes.invert_yaxis()
    axes.set_xlim(-21.5, 19)
    powers = range(-20, 17, 4)
    axes.set_xticks(powers, [f"$2^{{{power}}}$" for power in powers])
    axes.set_xlabel(
        "positive values (zero and the negative ones are held as well); the number is the largest"
    )
    axes.plot([], [], color=NORMAL, linewidth=4, label="normal numbers, integers")
    axes.plot([], [], color=SUBNORMAL, linewidth=4, label="subnormal numbers")
    axes.legend(loc="lower left", frameon=False, fontsize=11)
    axes.grid(axis="x", alpha=0.25)


def draw_scales(axes: Axes) -> None:
    """Draw the block and its e2m1 values under each scale rule, one row a rule."""
    block = torch.tensor([BLOCK, BLOCK])
    block[1] = AMAX_OF_MATRIX
    amax = block[0].abs().max().item()
    for row, name in enumerate(SCALES):
        q = lowprec.quantize(block, lowprec.OperandSpec.parse(f"e2m1[1x{len(BLOCK)} {name}]"))
        scale = q.scale[0].item() * (1.0 if q.tensor_scale is None else q.tensor_scale.item())
        grid = positive_values(E2M1) * scale
        grid = torch.cat((-grid.flip(0), torch.zeros(1), grid))
        ticks(axes, grid, row + 0.02, row + 0.3, color=NORMAL, linewidth=1.4)
        x = block[0]
        y = q.dequantize()[0]
        for value, rounded in zip(x.tolist(), y.tolist(), strict=True):
            beyond = abs(value) > E2M1.max * scale
            axes.plot(
                [value, rounded],
                [row - 0.22, row],
                color=BEYOND if beyond else "0.6",
                linewidth=2.0 if beyond else 1.2,
                zorder=1,
            )
        axes.plot(x, [row - 0.22] * len(BLOCK), "o", color=SAMPLE, markersize=4.5)
        noise = (y - x).square().mean()
        sqnr = 10 * (x.square().mean() / noise).log10()
        note = f"scale {scale:.4g}\nlargest {E2M1.max * scale:.4g}\nSQNR {sqnr:.1f} dB"
        axes.text(13.2, row, note, va="center", fontsize=10.5)
    axes.set_yticks(range(len(SCALES)), [name.replace("e4m3", "e4m3 (NVFP4)") for name in SCALES])
    axes.set_ylim(len(SCALES) - 0.45, -0.5)
    axes.set_xlim(-13, 18.6)
    axes.set_xticks(range(-12, 13, 4))
    axes.set_xlabel(
        f"a block of {len(BLOCK)} values, amax = {amax:g} (dots), and where e2m1 puts them (blue "
        "grid)"
    )
    axes.plot([], [], color=BEYOND, linewidth=2.0, label="beyond the largest value of the grid")
    axes.legend(loc="upper left", frameon=False, fontsize=11, bbox_to_anchor=(0, 1.08))


def main(folder: Path, preview: Path | None = None) -> None:
    for name, draw, height in (("formats", draw_formats, 4.8), ("scales", draw_scales, 6.8)):
        figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        draw(axes)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        if preview:
            figure.savefig(preview / f"{name}.png", dpi=90)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
