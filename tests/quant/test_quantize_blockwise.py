"""Blockwise FP8 with power-of-two scales agrees bit for bit with three implementations that share no code with the package.

The three are a loop over blocks in numpy; torchao's MX conversion, whose blocks may have any length, so that a 128x128 tile is one long
block; and torchao's blockwise FP8 reference, whose fp32 scale 448 / amax is a power of two where amax is 448 * 2^k.
"""

import warnings

import pytest
import torch
from torch import Tensor

from lowprec.formats.element import E4M3, E5M2, E5M6
from lowprec.formats.scaling import BlockScaling
from lowprec.quant import OperandSpec, quantize
from lowprec.testing import gaussian, heavy_tailed, quantize_by_numpy
from lowprec.testing.oracles import round_by_search

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao warns when it is imported
    pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    from torchao.prototype.blockwise_fp8_training.kernels import torch_blockwise_scale_act_quant_lhs, torch_blockwise_scale_weight_quant
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

MATRICES = {
    "gaussian": gaussian(256, 384, 0),
    "heavy_tailed": heavy_tailed(256, 384, 1),
    "weights": gaussian(256, 384, 2) * 0.02,
    "spread": heavy_tailed(256, 384, 3) * torch.logspace(-30, 30, 256)[:, None],
    "outliers": heavy_tailed(256, 384, 4) * torch.where(torch.arange(384) % 97 == 5, 1e4, 1.0),
    "zero_blocks": gaussian(256, 384, 5) * (torch.arange(384) < 128),
    "huge": gaussian(256, 384, 6) * 5e37,
}
every_matrix = pytest.mark.parametrize("x", MATRICES.values(), ids=MATRICES)
every_block = pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["1x128", "128x128"])
every_rule = pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])


def spec(block, rule="rceil", element=E4M3) -> OperandSpec:
    return OperandSpec(element=element, scaling=BlockScaling(block=block, scale_format="e8m0", rule=rule))


def tiles(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the tiles of x, [blocks, elements of a block]."""
    r, c = block
    return x.unflatten(1, (-1, c)).unflatten(0, (-1, r)).transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()


@every_matrix
@every_block
@every_rule
@pytest.mark.parametrize("element", [E4M3, E5M2], ids=str)
def test_equals_a_loop_over_blocks_in_numpy(x, block, rule, element):
    q = quantize(x, spec(block, rule, element))
    codes, scale, _ = quantize_by_numpy(x, q.spec)
    assert q.scale is not None
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.values.view(torch.int32), codes.view(torch.int32))


@every_matrix
@every_block
@every_rule
@pytest.mark.parametrize("element, dtype", [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=str)
def test_equals_torchaos_mx_conversion_of_longer_blocks(x, block, rule, element, dtype):
    q = quantize(x, spec(block, rule, element))
    scale, data = to_mx(tiles(x, block), dtype, block[0] * block[1], ScaleCalculationMode(rule))
    assert q.scale_data is not None
    assert torch.equal(q.scale_data.flatten(), scale.view(torch.uint8).flatten())
    ours = tiles(q.data.view(torch.uint8), block)
    alive = q.scale_data.flatten() != 0  # torchao's codes under the smallest scale differ (test_quantize_torchao)
    assert alive.any()
    assert torch.equal(ours[alive], data.view(torch.uint8)[alive])


@every_block
@pytest.mark.parametrize("k", [-20, -9, -1, 0, 1, 8, 20])
def test_equals_torchaos_blockwise_reference_where_its_scale_is_a_power_of_two(block, k):
    x = heavy_tailed(256, 384, 7).clamp(-10, 10) * 40 * 2.0**k
    r, c = block
    shift = torch.arange(256 // r)[:, None] % 3 + torch.arange(384 // c) % 2  # each block has another power
    x = x * (2.0**shift).repeat_interleave(r, 0).repeat_interleave(c, 1)
    x[::r, ::c] = -448 * 2.0**k * 2.0**shift
    reference = torch_blockwise_scale_act_quant_lhs if r == 1 else torch_blockwise_scale_weight_quant
    data, scale = reference(x)
    q = quantize(x, spec(block))
    assert q.scale is not None
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.scale, 2.0 ** (k + shift))
    assert torch.equal(q.data.view(torch.uint8), data.view(torch.uint8))


@every_block
def test_an_fp32_scale_of_the_same_blocks_is_torchaos_to_an_ulp(block):
    """448 / amax is inverted once more than amax / 448 is, so the scales may differ in the last bit, and with them a few codes."""
    x = MATRICES["heavy_tailed"]
    reference = torch_blockwise_scale_act_quant_lhs if block[0] == 1 else torch_blockwise_scale_weight_quant
    data, scale = reference(x)
    q = quantize(x, OperandSpec(element=E4M3, scaling=BlockScaling(block=block)))
    assert q.scale is not None
    torch.testing.assert_close(q.scale, scale, rtol=2.0**-22, atol=0)
    assert (q.data.view(torch.uint8) != data.view(torch.uint8)).float().mean() < 1e-3


@every_matrix
@every_block
def test_e5m6_equals_a_search_through_its_values(x, block):
    """e5m6 is the format of cached activations: 12 bits under a power of two."""
    q = quantize(x, spec(block, element=E5M6))
    assert q.scale is not None
    largest = tiles(x, block).abs().amax(1).double()
    exponent = (largest / E5M6.max).log2().ceil().clamp(-127, 127)
    exponent = exponent.masked_fill(largest == 0, -127)
    assert torch.equal(q.scale.flatten().double(), 2.0**exponent)
    scaled = tiles(x, block).double() / 2.0 ** exponent[:, None]
    expected = torch.from_numpy(round_by_search(scaled.numpy(), E5M6, "nearest"))
    assert torch.equal(tiles(q.values, block).view(torch.int32), expected.view(torch.int32))
