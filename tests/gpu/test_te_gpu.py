"""Transformer Engine agrees with our code on a GPU: quantisers bit for bit, layers, delayed scaling, sharding and compiling."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowprec.conversion.convert import convert, make_plan, revert
from lowprec.nn import LowPrecisionLinear
from lowprec.nn.te_linear import DelayedTELinear, TELinear
from lowprec.nn.te_recipes import why_not_te
from lowprec.quant import OperandSpec, quantize
from lowprec.recipe import library
from lowprec.testing import heavy_tailed
from lowprec.testing.te import te_quantized

pytest.importorskip("transformer_engine.pytorch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SHAPES = ((256, 512), (208, 400), (16, 144))
LARGEST_ERROR = 0.01
"""Relative error of a layer's results: both multiply the same codes, except for a few that fp32 scales round to a neighbour."""
MOST_CODES_THAT_DIFFER = 1e-3
"""Share of codes that may differ with fp32 scales; 0.02 to 0.05% are measured."""


def matrix(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a matrix with rows of many magnitudes and no block of zeros, whose scales would differ."""
    return (heavy_tailed(rows, cols, seed=0) * 2.0 ** torch.linspace(-12, 12, rows)[:, None]).cuda().to(dtype)


def needs(recipe: str) -> None:
    if (reason := why_not_te(library.get(recipe), "cuda")) is not None:
        pytest.skip(reason)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def results(layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return y, dx and the gradients of the parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *parameters], g.to(y.dtype))
    return [y.detach(), *grads]


def layers(recipe: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> tuple[TELinear, LowPrecisionLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(512, 384, bias=bias, device="cuda", dtype=dtype)
    twin = copy.deepcopy(linear)
    return TELinear.from_linear(linear, library.get(recipe)), LowPrecisionLinear.from_linear(twin, library.get(recipe))


def batch(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return heavy_tailed(tokens, 512, seed=seed).cuda().to(dtype), heavy_tailed(tokens, 384, seed=seed + 1).cuda().to(dtype) * 1e-3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 768), nn.GELU(), nn.Linear(768, 384)).cuda().bfloat16()


# Quantisers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", ["e4m3[1x128 e8m0]", "e4m3[128x128 e8m0]", "e5m2[1x128 e8m0]"])
def test_power_of_two_scales_are_the_same_bits(spec: str, shape: tuple[int, int], dtype: torch.dtype):
    needs("fp8_blockwise_ue8m0")
    x = matrix(*shape, dtype)
    for transposed in (False, True):
        codes, scale = te_quantized(x, OperandSpec.parse(spec), transposed=transposed)
        ours = quantize(x.t() if transposed else x, OperandSpec.parse(spec))
        assert ours.scale is not None
        assert torch.equal(scale, ours.scale)
        assert torch.equal(codes.view(torch.uint8), ours.data.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "spec, dtype",
    [
        ("e4m3[1x128 fp32]", torch.float32),
        ("e4m3[1x128 fp32]", torch.bfloat16),
        ("e4m3[128x128 fp32]", torch.float32),
        ("e4m3[128x128 fp32]", torch.bfloat16),
        ("e4m3[tensor fp32]", torch.float32),
        ("e5m2[tensor fp32]", torch.float32),
    ],
)
def test_few_codes_under_fp32_scales_are_neighbours(spec: str, dtype: torch.dtype):
    needs("fp8_blockwise")
    x = matrix(4096, 4096, dtype)
    for transposed in (False, True):
        codes, scale = te_quantized(x, OperandSpec.parse(spec), transposed=transposed)
        ours = quantize(x.t() if transposed else x, OperandSpec.parse(spec))
        assert ours.scale is not None
        torch.testing.assert_close(scale, ours.scale, rtol=2.0**-22, atol=0)
        distance = (codes.view(torch.uint8).int() - ours.data.contiguous().view(torch.uint8).int()).abs()
        assert distance.max() <= 1
        assert (distance > 0).float().mean() <= MOST_CODES_THAT_DIFFER


# Layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", ["fp8_blockwise_ue8m0", "fp8_blockwise", "fp8_tensorwise", "mxfp8"])
def test_a_layer_gives_what_ours_gives(recipe: str, bias: bool):
    needs(recipe)
    theirs, ours = layers(recipe, bias=bias)
    for tokens in (256, 200, 1):
        x, g = batch(tokens, seed=tokens)
        for a, b in zip(results(theirs, x, g, list(theirs.parameters())), results(ours, x, g, list(ours.parameters())), strict=True):
            assert relative_error(a, b) < LARGEST_ERROR, tokens
    with torch.no_grad():
        assert relative_error(theirs(x.view(1, 1, 512)), ours(x.view(1, 1, 512))) < LARGEST_ERROR


@pytest.mark.parametrize("recipe", ["fp8_blockwise_ue8m0", "fp8_tensorwise"])
def test_master_weights_under_autocast(recipe: str):
    needs(recipe)
    theirs, ours = layers(recipe, torch.float32)
    x, g = batch(256, seed=3, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        pairs = zip(results(theirs, x, g, list(theirs.parameters())), results(ours, x, g, list(ours.parameters())), strict=True)
    for a, b in pairs:
        assert relative_error(a, b) < LARGEST_ERROR


def test_delayed_scaling_from_the_second_step_on():
    """The scales are 1 in the first step."""
    needs("fp8_delayed")
    theirs, ours = layers("fp8_delayed")
    for number in range(4):
        x, g = batch(256, seed=2 * number)
        pairs = list(zip(results(theirs, x, g, list(theirs.parameters())), results(ours, x, g, list(ours.parameters())), strict=True))
        if number > 0:
            assert max(relative_error(a, b) for a, b in pairs) < LARGEST_ERROR
    state = theirs.state_dict()["_extra_state"]
    x_amaxes = torch.stack([batch(256, seed=2 * number)[0].abs().max() for number in range(4)]).float().cpu()
    # The first row holds the amax of the last pass for the next one.
    torch.testing.assert_close(torch.cat((state[-3:, 0], state[1:2, 0])), x_amaxes)
    torch.testing.assert_close(state[0, 0], 448 / x_amaxes[:-1].max())
    assert (state[1:, [0, 1, 3]].count_nonzero(0) == 4).all()


def test_delayed_scaling_resumes():
    needs("fp8_delayed")
    first, again = model(), model()
    for net in (first, again):
        convert(net, {"recipe": "fp8_delayed", "backend": "te"})
    for number in range(3):
        x, g = batch(256, seed=2 * number)
        results(first, x, g, list(first.parameters()))
    for layer in first:
        if isinstance(layer, DelayedTELinear):  # a layer's update does not change another layer's history
            assert (layer.state_dict()["_extra_state"][1:, :2].count_nonzero(0) == 3).all()
    again.load_state_dict(first.state_dict())
    for number in range(3, 5):
        x, g = batch(256, seed=2 * number)
        for a, b in zip(results(first, x, g, list(first.parameters())), results(again, x, g, list(again.parameters())), strict=True):
            assert torch.equal(a, b)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


# The plan, and the program around a layer


def test_conversion_through_the_plan_trains():
    needs("fp8_blockwise_ue8m0")
    precision = {"recipe": "fp8_blockwise_ue8m0", "backend": "te", "strict": True}
    net = model()
    parameters, keys = list(net.parameters()), list(net.state_dict())
    plan = convert(net, precision)
    assert make_plan(net, precision) == plan
    assert {gemm.backend for layer in plan.layers for gemm in layer.gemms} == {"te"}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    x, target = batch(256, seed=0)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(net(x).float(), 1e3 * target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert [id(parameter) for parameter in net.parameters()] == [id(parameter) for parameter in parameters]
    assert list(net.state_dict()) == keys
    y = net(x)
    other = model()
    convert(other, precision)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), y)
    convert(net, {"recipe": "fp8_blockwise_ue8m0", "skip_slow": False})
    assert relative_error(net(x), y) < LARGEST_ERROR
    assert revert(net) == 2


@pytest.mark.parametrize("recipe", ["fp8_blockwise_ue8m0", "fp8_delayed"])
def test_compiled(recipe: str):
    needs(recipe)
    torch._dynamo.reset()
    net = model()
    convert(net, {"recipe": recipe, "backend": "te"})
    twin = copy.deepcopy(net)
    compiled = torch.compile(net)
    for number in range(2):
        x, g = batch(200, seed=number)
        for a, b in zip(results(compiled, x, g, list(net.parameters())), results(twin, x, g, list(twin.parameters())), strict=True):
            assert relative_error(a, b) < LARGEST_ERROR


@pytest.mark.parametrize("recipe", ["fp8_blockwise_ue8m0", "fp8_tensorwise", "fp8_delayed"])
def test_sharded(recipe: str, tmp_path: Path):
    """FSDP2 on one rank shards and gathers parameters as on many ranks."""
    needs(recipe)
    net = model()
    convert(net, {"recipe": recipe, "backend": "te"})
    twin = copy.deepcopy(net)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for layer in net:
            if isinstance(layer, TELinear):
                fully_shard(layer)
        fully_shard(net)
        for number in range(2):
            x, g = batch(256, seed=number)
            net(x).backward(g)
            twin(x).backward(g)
            for a, b in zip(net.parameters(), twin.parameters(), strict=True):
                assert b.grad is not None
                assert isinstance(a.grad, DTensor)
                assert relative_error(a.grad.full_tensor(), b.grad) < LARGEST_ERROR
    finally:
        dist.destroy_process_group()
