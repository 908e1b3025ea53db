"""FP8 on a GPU: fused quantisers agree bit for bit with the reference; so do native GEMM backends and layers, up to rounding."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import lowprec
from lowprec.gemm import BACKENDS, FP32_SUMS, Accumulation
from lowprec.gemm.hopper import LARGE, SMALL, _scaled_gemm
from lowprec.nn import LowPrecisionLinear, codes
from lowprec.quant import OperandSpec, QTensor, fake_quantize, quantize
from lowprec.quant import triton_quantize as fused
from lowprec.quant.triton_whole import quantize_whole
from lowprec.testing import EDGE_BLOCKS, heavy_tailed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

TILES = ("e4m3[1x128 fp32]", "e4m3[1x128 e8m0]", "e5m2[1x128 fp32]")
BLOCK_OF = {spec: spec.replace("1x128", "128x128") for spec in TILES}
SHAPES = ((256, 384), (200, 136), (1000, 520), (33, 1), (1, 300))
GEMM_SHAPES = ((512, 256, 512), (1000, 392, 1280), (64, 72, 200), (33, 16, 136), (1, 1, 1), (2048, 1024, 4096), (515, 131, 77))
hopper = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="not a Hopper GPU")


def both(x: Tensor, a: OperandSpec | None, b: OperandSpec | None, **more: Tensor):
    wanted = fused.directions(a, b)
    assert not isinstance(wanted, str), wanted
    return fused.quantize_both(x, wanted, **more)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.float().nan_to_num(77.0), b.float().nan_to_num(77.0))


def assert_same_codes(ours: QTensor, reference: QTensor):
    assert ours.shape == reference.shape
    assert ours.scale is not None
    assert reference.scale is not None
    assert same(ours.scale, reference.scale)
    assert same(ours.data, reference.data)
    assert same(ours.dequantize(), reference.dequantize())


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    x = heavy_tailed(*shape, seed=0).cuda()
    x[: shape[0] // 3, : shape[1] // 3] = 0
    return x.to(dtype)


DIRECTIONS = [(TILES[0], kinds) for kinds in ((1, 1), (2, 2), (1, 2), (1, 0), (0, 1))]
DIRECTIONS += [(TILES[1], (1, 1)), (TILES[1], (2, 2)), (TILES[2], (1, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gluon", [True, False])
@pytest.mark.parametrize(("spec", "kinds"), DIRECTIONS)
def test_both_directions_from_one_read(spec: str, kinds: tuple[int, int], dtype: torch.dtype, gluon: bool, monkeypatch):
    if not gluon and kinds in ((1, 0), (0, 1)):
        pytest.skip("tests/interpreter has it")
    if not gluon:
        monkeypatch.setattr(fused, "_gluon_works", lambda device: False)
    choice = {1: OperandSpec.parse(spec), 2: OperandSpec.parse(BLOCK_OF[spec]), 0: None}
    wanted = choice[kinds[0]], choice[kinds[1]]
    for shape, poisoned in itertools.product(SHAPES, (False, True)):
        x = matrix(shape, dtype)
        if poisoned:
            x[0, -1], x[-1, 0] = float("nan"), float("inf")
        for t in (x, x.t(), x[:, ::2]):
            assert fused.takes(t)
            for ours, operand, plain in zip(both(t, *wanted), wanted, (t, t.t()), strict=True):
                assert (ours is None) == (operand is None)
                if ours is not None and operand is not None:
                    assert_same_codes(ours, quantize(plain, operand))


@hopper
def test_many_tiles_are_right_for_any_order_of_loads():
    """Two warp groups share the buffers; there are enough tiles, and quick ones, that the groups overtake each other."""
    x = torch.randn(16384, 8192, device="cuda", dtype=torch.bfloat16)
    for kinds in ((1, 1), (2, 2), (1, 0)):
        choice = {1: OperandSpec.parse(TILES[0]), 2: OperandSpec.parse(BLOCK_OF[TILES[0]]), 0: None}
        for _ in range(20):
            a, b = both(x, choice[kinds[0]], choice[kinds[1]])
        assert a is not None
        assert_same_codes(a, quantize(x, a.spec))
        if b is not None:
            assert_same_codes(b, quantize(x.t(), b.spec))


@pytest.mark.parametrize("spec", TILES)
def test_edge_blocks_are_the_references_bit_for_bit(spec: str):
    x = torch.cat([case.row for case in EDGE_BLOCKS]).cuda()
    for t in (x, x.t().contiguous(), x.bfloat16()):
        tile, block = OperandSpec.parse(spec), OperandSpec.parse(BLOCK_OF[spec])
        for specs in ((tile, tile), (block, block)):
            a, b = both(t, *specs)
            assert a is not None
            assert b is not None
            assert_same_codes(a, quantize(t, specs[0]))
            assert_same_codes(b, quantize(t.t(), specs[1]))


def test_scales_of_every_mantissa_are_correctly_rounded():
    spec = OperandSpec.parse("e4m3[1x128 fp32]")
    for exponent in (1, 127, 200):
        amax = (torch.arange(2**23, dtype=torch.int32, device="cuda") + (exponent << 23)).view(torch.float32)
        # Each tile has one magnitude; its code is 448 or what 1 / scale makes of it, so that a wrong reciprocal shows.
        x = amax.reshape(-1, 8).repeat_interleave(128, 1)[:4096]
        a, _ = both(x, spec, None)
        assert a is not None
        assert_same_codes(a, quantize(x, spec))


@hopper
def test_fused_swiglu_equals_quantising_its_result():
    gate, up = (torch.randn(1000, 520, device="cuda", dtype=torch.bfloat16) * 3 for _ in range(2))
    tile = OperandSpec.parse("e4m3[1x128 fp32]")
    a, b = both(up, tile, tile, times_silu_of=gate)
    h = nn.functional.silu(gate) * up
    assert a is not None
    assert b is not None
    close = (a.dequantize() - quantize(h, tile).dequantize()).norm() / h.float().norm()
    assert close < 1e-3  # silu's division may differ in the last bit, and with it the last bit of a bf16 result
    assert (b.dequantize().t() - h).norm() / h.float().norm() < 0.04


@pytest.mark.parametrize(
    "spec",
    ["e2m1[1x32 e8m0:floor]", "e2m3[1x32 e8m0:even]", "e3m2[1x32 e8m0:rceil]", "e4m3[1x32 e8m0]", "e5m2[1x64 e8m0:ceil]", "e2m1[1x16 e4m3]",
     "e4m3[1x128 fp32]", "e2m1[1x32 e8m0:floor prescale:0.75 stochastic]", "e2m1[1x16 e4m3 stochastic]"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_emulation_is_the_references_bit_for_bit(spec: str, dtype: torch.dtype):
    operand = OperandSpec.parse(spec)
    key = torch.tensor([123, -456], device="cuda") if operand.stochastic else None
    for shape, poisoned in itertools.product(SHAPES, (False, True)):
        x = matrix(shape, dtype)
        if poisoned:
            x[0, -1], x[-1, 0] = float("nan"), float("inf")
        for t in (x, x.t(), x[:, ::2]):
            assert operand.one_pass
            assert fused.takes(t)
            assert same(fake_quantize(t, operand, key=key), quantize(t, operand, key=key, decoded=True).dequantize())


def operands(M: int, N: int, K: int, spec: str, b_block: bool, fused_codes: bool) -> tuple[QTensor, QTensor]:
    a, b = torch.randn(M, K, device="cuda"), torch.randn(N, K, device="cuda") * torch.rand(N, 1, device="cuda")
    tile = OperandSpec.parse(spec)
    b_spec = OperandSpec.parse(BLOCK_OF[spec]) if b_block else tile
    if not fused_codes:
        return quantize(a, tile), quantize(b, b_spec)
    qa, qb = both(a, tile, None)[0], both(b, b_spec, None)[0]
    assert qa is not None
    assert qb is not None
    return qa, qb


@pytest.mark.parametrize("backend", ["hopper", "scaled_mm", "triton"])
@pytest.mark.parametrize("b_block", [False, True])
@pytest.mark.parametrize("spec", TILES)
def test_products_of_blocks_are_the_references(backend: str, b_block: bool, spec: str):
    for shape, out_dtype in itertools.product(GEMM_SHAPES, (torch.float32, torch.bfloat16)):
        for fused_codes in (False, True):
            a, b = operands(*shape, spec, b_block, fused_codes)
            support = BACKENDS[backend].supports(a.spec, b.spec, "cuda")
            if not support.ok:
                pytest.skip(support.reason)
            assert support.native
            exact = BACKENDS["reference"].mm(a, b, torch.float32)
            ours = BACKENDS[backend].mm(a, b, out_dtype)
            assert ours.dtype == out_dtype
            assert ours.shape == exact.shape
            # The matrix unit sums 128 products in 14 bits: 0.05% of the result (docs/numerics.md). bf16 rounds by 0.39% at the most.
            assert (ours.float() - exact).norm() <= (8e-4 if out_dtype == torch.float32 else 4e-3) * exact.norm() + 1e-30, shape


@hopper
@pytest.mark.parametrize("tile", [LARGE, SMALL])
@pytest.mark.parametrize("b_block", [False, True])
def test_both_tiles_with_bias(tile, b_block: bool, monkeypatch):
    monkeypatch.setattr("lowprec.gemm.hopper.choose_tile", lambda *_: tile)
    a, b = operands(700, 264, 640, "e4m3[1x128 fp32]", b_block, True)
    bias = torch.randn(264, device="cuda", dtype=torch.bfloat16)
    exact = BACKENDS["reference"].mm(a, b, torch.float32) + bias.float()
    ours = _scaled_gemm(a.data, a.scale_data, b.data, b.scale_data, not b_block, bias, torch.float32)
    assert (ours - exact).norm() < 8e-4 * exact.norm()


@hopper
def test_nan_and_infinity_reach_the_rows_and_columns_they_belong_to():
    x, w = torch.randn(256, 384, device="cuda"), torch.randn(256, 384, device="cuda")
    x[5, 7], w[9, 300] = float("nan"), float("inf")
    tile = OperandSpec.parse("e4m3[1x128 fp32]")
    a, b = quantize(x, tile), quantize(w, tile)
    for backend in ("hopper", "scaled_mm", "triton"):
        bad = ~BACKENDS[backend].mm(a, b, torch.bfloat16).isfinite()
        wanted = torch.zeros_like(bad)
        wanted[5], wanted[:, 9] = True, True
        assert torch.equal(bad, wanted), backend


@hopper
def test_a_product_with_more_than_2_to_the_31_elements():
    M, N, K = 65536 + 8, 32768 + 128, 128
    tile = OperandSpec.parse("e4m3[1x128 fp32]")
    x, w = torch.randn(M, K, device="cuda", dtype=torch.bfloat16), torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    a, b = quantize(x, tile), quantize(w, tile)
    c = BACKENDS["hopper"].mm(a, b, torch.bfloat16)
    rows = torch.tensor([0, 1, 40000, M - 1], device="cuda")
    exact = a.dequantize()[rows] @ b.dequantize().t()
    assert (c[rows].float() - exact).norm() < 2.5e-3 * exact.norm()


@hopper
def test_quantising_more_than_2_to_the_31_elements():
    x = torch.randn(32768 + 8, 65536 + 128, device="cuda", dtype=torch.bfloat16)
    tile = OperandSpec.parse("e4m3[1x128 fp32]")
    a, b = both(x, tile, tile)
    assert a is not None
    assert b is not None
    for rows in (slice(0, 128), slice(32640, 32776)):
        assert same(a.data[rows], quantize(x[rows], tile).data)
    cols = slice(65408, 65664)
    part = quantize(x[:, cols].t(), tile)
    assert same(b.data[cols], part.data)


@pytest.mark.parametrize(("name", "kind"), [("fp8_tensorwise", "tensor"), ("fp8_rowwise", "row")])
def test_whole_scales_on_cublaslt(name: str, kind: str):
    recipe = lowprec.recipes.get(name)
    for gemm, (M, N, K) in itertools.product(("fprop", "dgrad", "wgrad"), GEMM_SHAPES):
        spec_a, spec_b = recipe.operands(gemm)
        support = BACKENDS["scaled_mm"].supports(spec_a, spec_b, "cuda", FP32_SUMS)
        assert support.ok, support.reason
        a, b = quantize(torch.randn(M, K, device="cuda"), spec_a), quantize(torch.randn(N, K, device="cuda"), spec_b)
        exact = BACKENDS["reference"].mm(a, b, torch.float32)
        for out_dtype in (torch.float32, torch.bfloat16):
            ours = BACKENDS["scaled_mm"].mm(a, b, out_dtype)
            assert ours.dtype == out_dtype
            # A single product may lie halfway between two bf16 numbers, 0.39% from either.
            rounding = (exact.to(out_dtype).float() - exact).norm()
            assert (ours.float() - exact).norm() <= max(3e-3 * exact.norm(), 1.001 * rounding) + 1e-30, (gemm, M, N, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_scales_from_one_read_are_the_references_bit_for_bit(dtype: torch.dtype):
    tensor, row, wide = (OperandSpec.parse(text) for text in ("e4m3[tensor fp32]", "e4m3[row fp32]", "e5m2[tensor fp32]"))
    for shape, (a, b), poisoned in itertools.product(
        SHAPES, ((tensor, tensor), (row, row), (wide, tensor), (row, None), (None, tensor)), (0, 1)
    ):
        x = matrix(shape, dtype)
        if poisoned:
            x[0, -1] = float("nan")
        for t in (x, x.t(), x[:, ::2]):
            for ours, operand, plain in zip(quantize_whole(t, a, b), (a, b), (t, t.t()), strict=True):
                assert (ours is None) == (operand is None)
                if ours is not None and operand is not None:
                    assert_same_codes(ours, quantize(plain, operand))


def test_delayed_scales_go_by_the_history():
    spec = OperandSpec.parse("e4m3[tensor fp32 delayed:4]")
    ours, reference = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    for step in range(6):
        x = torch.randn(200, 136, device="cuda") * (step + 1)
        q, _ = quantize_whole(x, spec, None, (ours, None))
        assert q is not None
        assert_same_codes(q, quantize(x, spec, history=reference))
        assert torch.equal(ours, reference)


def test_supports_refuses_other_sums():
    tile = OperandSpec.parse("e4m3[1x128 fp32]")
    for name in ("hopper", "scaled_mm"):
        assert BACKENDS[name].supports(tile, tile, "cuda", Accumulation(bits=14, promote_every=128)).ok
        assert not BACKENDS[name].supports(tile, tile, "cuda", Accumulation(bits=14)).ok
        assert not BACKENDS[name].supports(tile, tile, "cuda", Accumulation(promote_every=64)).ok
    assert BACKENDS["triton"].supports(tile, tile, "cuda", Accumulation(promote_every=64)).ok


def linears(recipe: str, dtype: torch.dtype, bias: bool, backend: str = "auto") -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(384, 264, bias=bias, device="cuda", dtype=dtype)
    twin = nn.Linear(384, 264, bias=bias, device="cuda", dtype=dtype)
    twin.load_state_dict(plain.state_dict())
    return (
        LowPrecisionLinear.from_linear(plain, lowprec.recipes.get(recipe), backend),
        LowPrecisionLinear.from_linear(twin, lowprec.recipes.get(recipe), "reference"),
    )


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    return [y.detach(), *(t.grad for t in (x, *layer.parameters()) if t.grad is not None)]


@hopper
@pytest.mark.parametrize(
    "recipe", ["fp8_blockwise", "fp8_blockwise_ue8m0", "fp8_blockwise_wgrad2d", "fp8_tensorwise", "fp8_delayed", "fp8_rowwise"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_native_layers_give_what_the_reference_gives(recipe: str, dtype: torch.dtype, bias: bool):
    ours, reference = linears(recipe, dtype, bias)
    device = ours.gemms["cuda"]
    assert device.fprop_backend.name != "reference"
    for tokens in (256, 77, 1):
        x, g = torch.randn(tokens, 384, device="cuda", dtype=dtype), torch.randn(tokens, 264, device="cuda", dtype=dtype)
        # cuBLASLt returns products of per-row scales in bf16 only
        for a, b in zip(gradients(ours, x, g), gradients(reference, x, g), strict=True):
            assert a.dtype == b.dtype
            assert (a.float() - b.float()).norm() <= (
                1e-3 if dtype == torch.float32 and recipe != "fp8_rowwise" else 4e-3
            ) * b.float().norm(), recipe


@hopper
def test_a_weight_is_quantised_once_a_step(monkeypatch):
    calls: list[tuple[int, ...]] = []
    plain = codes.quantize_both
    monkeypatch.setattr(codes, "quantize_both", lambda t, *specs: calls.append(tuple(t.shape)) or plain(t, *specs))
    layer, _ = linears("fp8_blockwise", torch.bfloat16, False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x, g = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16), torch.randn(256, 264, device="cuda", dtype=torch.bfloat16)
    for step in range(3):
        for _ in range(2):
            y = torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=False)
            y.backward(g)
        optimizer.step()
        assert calls.count((264, 384)) == step + 1
    fresh, _ = linears("fp8_blockwise", torch.bfloat16, False)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))


@hopper
def test_layers_with_one_input_quantise_it_once(monkeypatch):
    calls: list[tuple[int, ...]] = []
    plain = codes.quantize_both
    monkeypatch.setattr(codes, "quantize_both", lambda t, *specs: calls.append(tuple(t.shape)) or plain(t, *specs))
    q, _ = linears("fp8_blockwise", torch.bfloat16, False)
    k, _ = linears("fp8_blockwise", torch.bfloat16, False)
    x = torch.randn(100, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    h = x * 2
    (q(h) + k(h)).sum().backward()
    assert calls.count((100, 384)) == 1


@hopper
def test_activations_are_kept_in_fp8():
    layer, _ = linears("fp8_blockwise", torch.bfloat16, False)
    x = torch.randn(8192, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    torch.cuda.synchronize()
    h = x * 1
    before = torch.cuda.memory_allocated()
    y = layer(h)
    del h
    kept = torch.cuda.memory_allocated() - before - y.nbytes + x.nbytes
    assert kept <= 8192 * 384 * 1.06, kept / (8192 * 384)


@hopper
def test_nothing_waits_for_the_device():
    layer, _ = linears("fp8_blockwise", torch.bfloat16, False)
    x, g = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True), torch.randn(256, 264, device="cuda").bfloat16()
    layer(x).backward(g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.zero_grad()
        codes.forget_weights()
        layer(x).backward(g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@hopper
def test_a_captured_graph_replays_the_step():
    layer, _ = linears("fp8_blockwise", torch.bfloat16, False)
    x, g = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True), torch.randn(256, 264, device="cuda").bfloat16()
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    eager = gradients(layer, x, g)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got = gradients(compiled, x, g)
        for a, b in zip(got, eager, strict=True):
            assert torch.equal(a, b)


@hopper
def test_a_captured_training_step_sees_the_weights_change():
    ours, twin = (linears("fp8_blockwise", torch.float32, False)[0] for _ in range(2))
    x, g = torch.randn(256, 384, device="cuda"), torch.randn(256, 264, device="cuda")
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1e-3) for layer in (ours, twin)]

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)
        layer(x).backward(g)
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(ours, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ours, optimizers[0])
    for _ in range(4):
        graph.replay()
    for _ in range(3 + 4):
        step(twin, optimizers[1])
    assert torch.equal(ours.weight, twin.weight)
