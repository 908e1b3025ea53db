"""MX formats agree with torchao's `to_mx` byte for byte: scales and codes of every element format under every rule that both have.

The two differ on purpose in the few cases of `DIFFERENCES`. Each case is tested on both sides, so that the list is exact; everything
outside it is equal.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowprec.formats.element import FORMATS, ElementFormat
from lowprec.formats.encoding import decode, encode
from lowprec.formats.scaling import BlockScaling
from lowprec.quant import OperandSpec, quantize
from lowprec.testing import gaussian, heavy_tailed, round_by_search
from lowprec.testing.cases import EDGE_BLOCKS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao warns when it is imported
    pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e3m2": "fp6_e3m2", "e2m3": "fp6_e2m3", "e2m1": torch.float4_e2m1fn_x2}
RULES = ("floor", "ceil", "even", "rceil")
BLOCK = 32
# Largest distance above max * 2^k at which an fp32 logarithm still gives k: half an ulp of the largest logarithms, 2^-18, and a little.
LOG2_SLACK = 2.0**-18

every_format = pytest.mark.parametrize("fmt", [FORMATS[name] for name in DTYPES], ids=str)
every_rule = pytest.mark.parametrize("rule", RULES)


@dataclass(frozen=True)
class Blocks:
    """The quantised matrix and both results: x [n, 32] in fp32, scale bytes [n], codes [n, 32]."""

    x: Tensor
    fmt: ElementFormat
    rule: str
    our_byte: Tensor
    our_code: Tensor
    their_byte: Tensor
    their_code: Tensor

    @property
    def amax(self) -> Tensor:
        return self.x.abs().amax(1)

    def at(self, where: Tensor) -> "Blocks":
        parts = (part[where] for part in (self.our_byte, self.our_code, self.their_byte, self.their_code))
        return Blocks(self.x[where], self.fmt, self.rule, *parts)


@dataclass(frozen=True)
class Difference:
    name: str
    why: str
    where: Callable[[Blocks], Tensor]
    """Mask of the blocks that differ, bool [n]."""
    our_byte: Callable[[Blocks], Tensor | int]
    their_byte: Callable[[Blocks], Tensor | int]
    our_factor: Callable[[Blocks], Tensor | float] | None
    """Factor by which x is multiplied before it is rounded to the format; None: the codes have no meaning."""
    their_factor: Callable[[Blocks], Tensor | float] | None


def edge_of_rceil(b: Blocks) -> Tensor:
    """Return the mask of blocks whose amax lies so little above max * 2^k that the fp32 logarithm of their quotient is k."""
    quotient = b.amax.double() / b.fmt.max
    excess = quotient / 2.0 ** quotient.log2().round() - 1
    return (b.rule == "rceil") & (excess > 0) & (excess < LOG2_SLACK) & (b.their_byte != b.our_byte)


def power(exponent: Tensor) -> Tensor:
    return (2.0 ** exponent.double())[:, None]


DIFFERENCES = (
    Difference(
        "infinity",
        "an infinity makes a block NaN here, so that loss scaling sees the overflow; torchao saturates it under a large scale",
        where=lambda b: b.amax.isinf(),
        our_byte=lambda _: 255,
        their_byte=lambda b: 254 if b.rule == "rceil" else 255 - b.fmt.emax,
        our_factor=None,
        their_factor=lambda b: 2.0**-127 if b.rule == "rceil" else 2.0 ** -(128 - b.fmt.emax),
    ),
    Difference(
        "codes beside a NaN scale",
        "both scales are NaN and so is every number; here the codes are arbitrary, torchao keeps those of the numbers beside the NaN",
        where=lambda b: b.amax.isnan(),
        our_byte=lambda _: 255,
        their_byte=lambda _: 255,
        our_factor=None,
        their_factor=None,
    ),
    Difference(
        "smallest scale",
        "byte 0 is the scale 2^-127; torchao divides by 2^-126 (under rceil by 1), though every reader of byte 0 multiplies by 2^-127",
        where=lambda b: (b.our_byte == 0) & (b.amax > 0),
        our_byte=lambda _: 0,
        their_byte=lambda _: 0,
        our_factor=lambda _: 2.0**127,
        their_factor=lambda b: 1.0 if b.rule == "rceil" else 2.0**126,
    ),
    Difference(
        "just above max * 2^k under rceil",
        "an fp32 logarithm rounds down to k: torchao takes 2^k and cuts amax, here the scale is the next power of two",
        where=edge_of_rceil,
        our_byte=lambda b: (b.amax.double() / b.fmt.max).log2().round().int() + 128,
        their_byte=lambda b: (b.amax.double() / b.fmt.max).log2().round().int() + 127,
        our_factor=lambda b: power(-(b.amax.double() / b.fmt.max).log2().round() - 1),
        # the case "smallest scale" applies as well where the byte is 0
        their_factor=lambda b: torch.where(b.their_byte == 0, 1.0, 2.0 ** -(b.their_byte.double() - 127))[:, None],
    ),
)


def quantised(x: Tensor, fmt: ElementFormat, rule: str) -> Blocks:
    """Quantise by both implementations; every code has a byte of its own."""
    spec = OperandSpec(element=fmt, scaling=BlockScaling(block=(1, BLOCK), scale_format="e8m0", rule=rule))
    q = quantize(x, spec)
    scale, data = to_mx(x.contiguous(), DTYPES[fmt.name], BLOCK, ScaleCalculationMode(rule))
    assert q.scale_data is not None
    assert q.scale_data.shape == scale.shape
    theirs = data.view(torch.uint8)
    if fmt.name == "e2m1":
        theirs = torch.stack((theirs & 15, theirs >> 4), dim=-1).flatten(1)
    ours = q.data.view(torch.uint8) if not fmt.packed else encode(q.values, fmt).to(torch.uint8)
    parts = (q.scale_data.flatten(), ours.view(-1, BLOCK), scale.view(torch.uint8).flatten(), theirs.view(-1, BLOCK))
    return Blocks(x.float().reshape(-1, BLOCK), fmt, rule, *parts)


def assert_codes(b: Blocks, code: Tensor, factor: Tensor | float) -> None:
    scaled = (b.x.double() * factor).nan_to_num(0.0, posinf=1e300, neginf=-1e300)
    expected = torch.from_numpy(round_by_search(scaled.numpy(), b.fmt, "nearest"))
    assert torch.equal(decode(code, b.fmt).view(torch.int32), expected.view(torch.int32))


def assert_equal_outside_the_list(b: Blocks) -> None:
    listed = torch.zeros(len(b.x), dtype=torch.bool)
    for difference in DIFFERENCES:
        listed |= difference.where(b)
    assert torch.equal(b.our_byte[~listed], b.their_byte[~listed])
    assert torch.equal(b.our_code[~listed], b.their_code[~listed])


def edges(fmt: ElementFormat) -> Tensor:
    """Return blocks whose amax is m * 2^k or a neighbour of it, at the mantissas where some rule changes its answer."""
    amax = torch.tensor(
        [m * 2.0**k for k in range(-149, 128) for m in (1, 1.5, fmt.max / 2.0**fmt.emax, 2 - 2.0 ** -(fmt.mantissa_bits + 1))],
        dtype=torch.float64,
    ).to(torch.float32)
    zero, inf = torch.tensor(0.0), torch.tensor(torch.inf)
    amax = torch.cat([amax, torch.nextafter(amax, zero), torch.nextafter(amax, inf), torch.nextafter(torch.nextafter(amax, inf), inf)])
    amax = amax[amax.isfinite()]
    rest = torch.rand(len(amax), BLOCK - 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([amax[:, None], amax[:, None] * rest], dim=1)


def random_bits(rows: int) -> Tensor:
    bits = torch.randint(-(2**31), 2**31, (rows, 4 * BLOCK), generator=torch.Generator().manual_seed(1))
    return bits.to(torch.int32).view(torch.float32)


MATRICES = {
    "gaussian": lambda _: gaussian(64, 256, 0),
    "heavy_tailed": lambda _: heavy_tailed(64, 256, 1),
    "spread": lambda _: heavy_tailed(256, 128, 2) * torch.logspace(-37, 36, 256)[:, None],
    "columns": lambda _: heavy_tailed(64, 256, 3) * torch.logspace(-4, 4, 256),
    "subnormal": lambda _: (gaussian(64, 128, 4).double() * 2.0**-138).float(),
    "huge": lambda _: gaussian(64, 128, 5) * 5e37,
    "bits": lambda _: random_bits(300),
    "zeros": lambda _: torch.tensor([[0.0, -0.0] * BLOCK]),
    "zero_blocks": lambda _: gaussian(8, 256, 6) * (torch.arange(256) % 64 < 32),
    "edges": edges,
    "cases": lambda _: torch.cat([case.row for case in EDGE_BLOCKS]),
}


@every_rule
@every_format
@pytest.mark.parametrize("name", MATRICES)
def test_scales_and_codes_are_torchaos_bytes(name, fmt, rule):
    x = MATRICES[name](fmt)
    b = quantised(x, fmt, rule)
    assert len(b.x) * BLOCK == x.numel()
    assert_equal_outside_the_list(b)


@every_rule
@every_format
def test_bf16_inputs_give_torchaos_bytes(fmt, rule):
    b = quantised(heavy_tailed(64, 256, 7).to(torch.bfloat16), fmt, rule)
    assert_equal_outside_the_list(b)
    assert torch.equal(b.our_byte, b.their_byte)
    assert torch.equal(b.our_code, b.their_code)


@every_rule
def test_packed_fp4_is_torchaos_as_it_lies_in_memory(rule):
    x = heavy_tailed(64, 256, 11)
    q = quantize(x, OperandSpec(element=FORMATS["e2m1"], scaling=BlockScaling(block=(1, BLOCK), scale_format="e8m0", rule=rule)))
    _, data = to_mx(x, DTYPES["e2m1"], BLOCK, ScaleCalculationMode(rule))
    assert q.data.shape == (64, 128)
    assert torch.equal(q.data, data.view(torch.uint8))


@every_rule
@every_format
@pytest.mark.parametrize("name", ["gaussian", "heavy_tailed", "columns", "huge", "zeros", "zero_blocks"])
def test_nothing_of_ordinary_matrices_is_in_the_list(name, fmt, rule):
    b = quantised(MATRICES[name](fmt), fmt, rule)
    assert not any(difference.where(b).any() for difference in DIFFERENCES)


def blocks_that_differ(fmt: ElementFormat) -> Tensor:
    """Return blocks that contain every case of the list, among others."""
    special = gaussian(6, BLOCK, 8)
    special[0, 3], special[1, 5], special[2, 0], special[3, 1] = torch.inf, -torch.inf, torch.nan, -torch.nan
    special[4, 2], special[4, 7] = torch.inf, 1.0
    tiny = (gaussian(64, BLOCK, 9).double() * 2.0 ** (fmt.emax - 130)).float()
    return torch.cat([special, tiny, edges(fmt)])


@every_rule
@every_format
@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda d: d.name)
def test_each_difference_is_what_the_list_says_on_both_sides(difference, fmt, rule):
    b = quantised(blocks_that_differ(fmt), fmt, rule)
    if rule != "rceil" and difference.where is edge_of_rceil:
        assert not difference.where(b).any()
        return
    where = difference.where(b)
    assert 2 <= where.sum() < len(where)
    b = b.at(where)
    everywhere = torch.zeros(len(b.x), dtype=torch.int32)
    assert torch.equal(b.our_byte.int(), everywhere + difference.our_byte(b))
    assert torch.equal(b.their_byte.int(), everywhere + difference.their_byte(b))
    if difference.our_factor is not None:
        assert_codes(b, b.our_code, difference.our_factor(b))
    if difference.their_factor is not None:
        assert_codes(b, b.their_code, difference.their_factor(b))
    differ = (b.our_byte != b.their_byte) | (b.our_code != b.their_code).any(1)
    assert differ.any()


@every_format
def test_the_smallest_scale_reads_back_here_and_not_from_torchaos_codes(fmt):
    """Byte 0 means the factor 2^-127: our error is half a step, torchao's is a large part of the number."""
    x = (gaussian(64, BLOCK, 10).double() * 2.0 ** (fmt.emax - 130)).float()
    b = quantised(x, fmt, "floor")
    b = b.at(b.our_byte == 0)
    assert len(b.x) > 10
    for code, sound in ((b.our_code, True), (b.their_code, False)):
        error = decode(code, fmt).double() * 2.0**-127 - b.x.double()
        relative = error.norm() / b.x.double().norm()
        assert relative < 0.3 if sound else relative > 0.4
