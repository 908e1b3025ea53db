"""A converted Llama on the native path, on a CPU with stand-ins for kernels: results of the reference, shared codes, no graph break."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lowprec
from lowprec.nn import codes
from lowprec.quant import OperandSpec, fake, quantize, triton_quantize, two_way
from tests.builders import tiny_llama
from tests.nn.native import on_cpu

IDS = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(0))
COMPILING = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch\.autograd\.function\.Function.* should not be instantiated:DeprecationWarning"),
]


def model() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=512, hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)


def step(module: nn.Module, ids: Tensor = IDS) -> tuple[float, dict[str, Tensor]]:
    module.zero_grad()
    loss = module(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@pytest.fixture
def reference() -> tuple[float, dict[str, Tensor]]:
    plain = model()
    lowprec.convert(plain, {"recipe": "fp8_blockwise", "backend": "reference"})
    return step(plain)


@pytest.fixture
def native(reference, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    on_cpu(monkeypatch)
    converted = model()
    plan = lowprec.convert(converted, {"recipe": "fp8_blockwise", "fuse": False})
    assert {layer.status for layer in plan.converted} == {"native"}
    return converted


def assert_equal(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == theirs[0]
    assert all(torch.equal(grad, theirs[1][name]) for name, grad in ours[1].items())


def test_it_gives_what_the_reference_gives(native: LlamaForCausalLM, reference):
    assert_equal(step(native), reference)
    assert_equal(step(native), reference)  # the second step uses the kept codes of the weights


def test_each_weight_and_each_input_is_quantised_once_a_step(native: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    counts = {"kept": 0, "gradients": 0}
    for module, name in ((codes, "kept"), (two_way, "gradients")):
        plain = module.quantize_both

        def count(*args, name=name, plain=plain, **more):
            counts[name] += 1
            return plain(*args, **more)

        monkeypatch.setattr(module, "quantize_both", count)
    optimizer = torch.optim.SGD(native.parameters(), lr=1e-3)
    for _ in range(2):
        step(native)
    # 7 weights a block once; q, k and v share an input, gate and up another: 4 inputs a block and pass; 7 gradients a block and pass
    assert counts == {"kept": 2 * 7 + 2 * 2 * 4, "gradients": 2 * 2 * 7}
    optimizer.step()
    step(native)
    assert counts["kept"] == 2 * 7 + 2 * 2 * 4 + 2 * 7 + 2 * 4


def test_an_evaluation_keeps_no_codes_of_weights(native: LlamaForCausalLM):
    """Averaged weights are put in place through `.data`, which no version counts."""
    step(native)
    native.eval()
    with torch.no_grad():
        before = native(input_ids=IDS).logits
        for parameter in native.parameters():
            parameter.data.mul_(0.5)
        assert not torch.equal(native(input_ids=IDS).logits, before)
        for parameter in native.parameters():
            parameter.data.mul_(2.0)
        assert torch.equal(native(input_ids=IDS).logits, before)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_blocks_have_no_graph_break_and_the_same_results(native: LlamaForCausalLM, reference, dynamic: bool | None):
    for block in native.model.layers:
        block.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_equal(step(native), reference)


test_compiled_blocks_have_no_graph_break_and_the_same_results.pytestmark += COMPILING  # pyright: ignore[reportFunctionMemberAccess]


def test_other_lengths_compile_once_more_and_not_again(native: LlamaForCausalLM):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in native.model.layers:
        block.compile(fullgraph=True, backend=counter)
    for length in (128, 96, 112, 80):
        step(native, IDS[:, :length])
    assert counter.frame_count == 2  # the first length, and any other
    for length in (64, 48, 32):
        step(native, IDS[:, :length])
    assert counter.frame_count == 3  # up to 128 tokens are one block of scales


test_other_lengths_compile_once_more_and_not_again.pytestmark = COMPILING  # pyright: ignore[reportFunctionMemberAccess]


def test_autocast_shares_the_codes_of_a_cast_input(native: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[int, ...]] = []
    plain = codes.quantize_both
    monkeypatch.setattr(codes, "quantize_both", lambda t, wanted: made.append(tuple(t.shape)) or plain(t, wanted))
    attention, x = native.model.layers[0].self_attn, torch.randn(1, 64, 256)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    assert {t.dtype for t in y} == {torch.bfloat16}
    assert made.count((64, 256)) == 1


@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4", "mxfp4_aws"])
def test_compiled_emulation_calls_its_kernel_as_an_operator(recipe: str, monkeypatch: pytest.MonkeyPatch):
    """The one-pass kernel is called as on a GPU, with the reference in its place."""

    def reference(x: Tensor, tensor_scales, key, spec: str, along_rows: bool, dtype: torch.dtype) -> Tensor:
        t = x if along_rows else x.t()
        out = quantize(t, OperandSpec.parse(spec), key=key, decoded=True).dequantize(dtype)
        return (out if along_rows else out.t()).contiguous()

    layer = nn.Linear(96, 64)
    lowprec.convert(layer_in := nn.Sequential(layer), recipe)
    x, g = torch.randn(48, 96, requires_grad=True), torch.randn(48, 64)
    expected = torch.autograd.grad(layer_in(x), (x, layer.weight), g)
    if hasattr(layer, "rounding_state"):
        layer.rounding_state[2] -= 1
    calls: list[str] = []
    monkeypatch.setattr(triton_quantize, "_fake_quantize_blocks", lambda *args: calls.append(args[3]) or reference(*args))
    monkeypatch.setattr(fake, "takes", lambda t: True)
    ours = torch.autograd.grad(torch.compile(layer_in, fullgraph=True, backend="aot_eager")(x), (x, layer.weight), g)
    assert calls
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


test_compiled_emulation_calls_its_kernel_as_an_operator.pytestmark += COMPILING  # pyright: ignore[reportFunctionMemberAccess]
