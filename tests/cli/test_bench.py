"""`lowprec bench gemm`, `linear` and `train`, and their shared parts: timings, ceilings, floors, rivals."""

import contextlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lowprec.bench import gemm, linear, rivals
from lowprec.bench.ceilings import Ceilings, Floor, flops, gemm_shape, product_kind, quantiser_bytes, random_operands
from lowprec.bench.timing import Timing, measure, measure_in_turns, measure_steps, summarise
from lowprec.cli import bench_train, main
from lowprec.errors import UserError
from lowprec.quant import QTensor, quantize
from lowprec.recipe import library

CPU = torch.device("cpu")
SHAPE = (64, 128, 256)


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main.main(["bench", *arguments])
    return capsys.readouterr().out


def broken(*_: Any) -> Any:
    raise RuntimeError("no kernel image\n  for this device " + "x" * 300)


def test_a_timing_is_the_median_with_its_percentiles():
    assert summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Timing(median=3.5, p20=2.0, p80=5.0)


def test_measuring_warms_up_and_calls_at_least_seven_times():
    calls: list[int] = []
    measure(lambda: calls.append(1), CPU, seconds=0.0)
    assert len(calls) == 3 + 7
    calls.clear()
    time = measure_steps(lambda: calls.append(1), CPU, steps=2, warmup=4)
    assert len(calls) == 6
    assert 0 < time.p20 <= time.median <= time.p80


def test_measuring_in_turns_gives_each_as_many_early_as_late_calls():
    order: list[str] = []
    first, second = measure_in_turns(lambda: order.append("a"), lambda: order.append("b"), CPU, seconds=0.0)
    assert "".join(order) == "aaa" + "bbb" + "aabbbbaa" * 2
    assert 0 < first.p20 <= first.median <= first.p80
    assert second.median > 0


def test_on_a_gpu_the_cache_is_emptied_before_each_call_outside_of_its_time(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 100.0

    class Cache:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Cache())
    time = measure(lambda: log.append("call"), torch.device("cuda"), seconds=1.0)
    assert time == Timing(median=100.0, p20=100.0, p80=100.0)
    timed = ["flush", "event", "call", "event"]
    assert log == ["call"] * 3 + timed * 5 + ["wait"] + timed * 7 + ["wait"] + timed * 10 + ["wait"]


def test_the_three_products_of_a_layer():
    assert [gemm_shape(name, (2, 3, 5)) for name in ("fprop", "dgrad", "wgrad")] == [(2, 3, 5), (2, 5, 3), (3, 5, 2)]
    assert flops((2, 3, 5)) == 60


@pytest.mark.parametrize(
    ("recipe", "matrix", "expected"),
    [
        # 2 bytes are read; 1 byte and 1/128 of an fp32 scale are written in both directions
        ("fp8_blockwise", "x", 64 * 256 * (2 + 2 * (1 + 4 / 128))),
        ("fp8_blockwise", "g", 64 * 128 * (2 + 2 * (1 + 4 / 128))),
        ("fp8_blockwise", "w", 128 * 256 * (2 + 2 * (1 + 4 / 128**2))),
        ("mxfp8", "x", 64 * 256 * (2 + 2 * (1 + 1 / 32))),
        ("fp8_tensorwise", "x", 64 * 256 * 4),
        ("int8", "w", 128 * 256 * 4),
        ("int8", "g", 64 * 128 * 3),  # wgrad takes g in bf16
        ("bf16", "x", 0),
    ],
)
def test_bytes_that_quantisers_move(recipe: str, matrix: str, expected: float):
    assert quantiser_bytes(library.get(recipe), SHAPE, matrix) == pytest.approx(expected)


def test_the_ceiling_that_fits_a_gemm():
    assert product_kind(library.get("fp8_tensorwise"), "wgrad") == "fp8"
    assert product_kind(library.get("fp8_rowwise_wgrad_hp"), "wgrad") == "bf16"
    assert product_kind(library.get("mxfp4"), "fprop") == "bf16"
    assert product_kind(library.get("qat_int8dyn_int4"), "dgrad") == "bf16"


def test_a_ceiling_is_measured_once_and_a_floor_is_work_over_it():
    ceilings = Ceilings(CPU, seconds=0.0)
    ceiling = ceilings.product(SHAPE, "fp8")  # a CPU has no ceiling
    assert ceiling is ceilings.product(SHAPE, "bf16")
    assert ceiling.floor(flops(SHAPE)) == pytest.approx(ceiling.time.median)
    copy = ceilings.copy(1 << 16)
    assert copy.floor(2 << 16) == pytest.approx(copy.time.median)
    floor = ceilings.layer_floor(SHAPE, library.get("fp8_blockwise"), ("x", "g"))
    products = sum(ceilings.product(gemm_shape(name, SHAPE), "bf16").time.median for name in ("fprop", "dgrad", "wgrad"))
    assert floor.products == pytest.approx(products)
    assert floor.quantisers > 0
    assert floor.ceilings == ("bf16", "copy")
    assert ceilings.layer_floor(SHAPE, None).quantisers == 0
    assert {entry["kind"] for entry in ceilings.to_list()} == {"bf16", "copy"}


def test_a_share_of_the_floor():
    beside = Floor(products=1.0, quantisers=0.5, ceilings=("fp8", "copy")).beside(Timing(median=3.0, p20=2.0, p80=4.0))
    assert beside["floor"] == {"ms": 1.5, "products_ms": 1.0, "quantisers_ms": 0.5, "ceilings": ["fp8", "copy"]}
    assert beside["of_floor"] == 0.5


def test_a_failure_is_reported_in_200_characters_and_a_user_error_passes():
    result, failure = rivals.attempt(broken)
    assert result is None
    assert failure is not None
    assert len(failure) == 200
    assert failure.startswith("RuntimeError: no kernel image for this device x")

    def refuses() -> None:
        raise UserError("--shape: too small")

    with pytest.raises(UserError, match="too small"):
        rivals.attempt(refuses)


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "qat_int8dyn_int4", "mxfp4_quartet", "nvfp4", "fp32"])
def test_gemm(recipe: str):
    result = gemm.run(shapes=(SHAPE,), recipe=recipe, seconds=0.0)
    assert [row["gemm"] for row in result["rows"]] == [name for name in ("fprop", "dgrad", "wgrad") for _ in range(2)]
    for row in result["rows"]:
        assert row["product"] == list(gemm_shape(row["gemm"], SHAPE))
        assert row["failure"] is None
        assert 0.5e-3 < row["error"] < 2.5e-3  # the error of rounding to bf16: about 2^-9
        assert row["error_fp32"] < 1e-6
        assert row["tflops"] == pytest.approx(2e-9 * 64 * 128 * 256 / row["time"]["median"])
        assert row["of_floor"] == pytest.approx(row["floor"]["ms"] / row["time"]["median"])


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_blockwise_ue8m0"])
def test_operands_are_laid_out_as_the_fused_quantisers_do(recipe: str):
    plain = random_operands((6, 384, 640), CPU)
    operands = gemm._operands(library.get(recipe), "fprop", *plain)
    for operand, spec, t in zip(operands, library.get(recipe).operands("fprop"), plain, strict=True):
        assert isinstance(operand, QTensor)
        assert spec is not None
        assert torch.equal(operand.dequantize(), quantize(t, spec).dequantize())
    a, b = (operand.scale_data for operand in operands if isinstance(operand, QTensor))
    assert a is not None
    assert b is not None
    assert (a.dtype, a.shape, a.stride()) == (torch.float32, (6, 5), (1, 8))
    assert (b.dtype, b.shape, b.stride()) == (torch.float32, (3, 5), (8, 1))


def test_gemm_emulates_where_nothing_is_native_and_says_why():
    result = gemm.run(shapes=(SHAPE,), seconds=0.0)
    assert [(row["name"], row["native"]) for row in result["rows"]] == [("torch bf16", True), ("reference", False)] * 3
    reasons = {refusal["backend"]: refusal for refusal in result["unsupported"]}
    assert reasons["torch"] == {"backend": "torch", "gemms": ["fprop", "dgrad", "wgrad"], "reason": "takes unscaled operands only"}
    assert "reference" not in reasons


def test_gemm_leaves_emulation_out_where_something_is_native_unless_it_is_named():
    assert {row["name"] for row in gemm.run(shapes=(SHAPE,), recipe="fp32", seconds=0.0)["rows"]} == {"torch bf16", "torch"}
    named = gemm.run(shapes=(SHAPE,), recipe="fp32", backends=("reference",), seconds=0.0)
    assert {row["name"] for row in named["rows"]} == {"torch bf16", "reference"}


def test_gemm_reports_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(gemm, "_torchao_product", broken)
    table = run_command(capsys, "gemm", "--shape", "64x128x256", "--against", "torchao", "--seconds", "0")
    assert "(emulated)" in table
    assert "torch takes no fprop, dgrad, wgrad: takes unscaled operands only" in table
    assert "torchao triton wgrad 128x256x64 failed: RuntimeError: no kernel image for this device" in table


def test_linear():
    rows = linear.run(shapes=(SHAPE,), seconds=0.0)["rows"]
    assert [row["name"] for row in rows] == ["bf16", "lowprec", "lowprec, weight quantised each step"]
    bf16, *ours = rows
    assert bf16["speedup"] == 1.0
    assert all(1e-3 < error < 2.5e-3 for error in bf16["errors"].values())
    for row in ours:
        assert all(0.03 < error < 0.05 for error in row["errors"].values())  # two e4m3 operands: about 28.5 dB
        assert row["speedup"] == pytest.approx(row["bf16"]["median"] / row["time"]["median"])
        assert row["tflops"] == pytest.approx(6e-9 * 64 * 128 * 256 / row["time"]["median"])
    assert ours[0]["floor"]["quantisers_ms"] < ours[1]["floor"]["quantisers_ms"]


def test_linear_steps_start_from_a_new_tensor_without_gradients(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, Any]] = []
    alive: list[torch.Tensor] = []

    def make(layer: torch.nn.Linear) -> rivals.Layer:
        def forward(x: torch.Tensor) -> torch.Tensor:
            alive.append(x)
            seen.append((id(x), layer.weight.grad))
            return layer(x)

        return forward, layer.weight

    monkeypatch.setattr(rivals, "torchao_layers", lambda: {"theirs": make, "broken": broken})
    rows = {row["name"]: row for row in linear.run(shapes=(SHAPE,), against=("torchao",), seconds=0.0)["rows"]}
    assert len({tensor for tensor, _ in seen}) == len(seen) == 3 + 4 * 2 + 1
    assert all(gradient is None for _, gradient in seen)
    assert rows["theirs"]["errors"] == rows["bf16"]["errors"]
    assert rows["broken"]["failure"].startswith("RuntimeError: no kernel image")
    assert rows["broken"]["time"] is rows["broken"]["speedup"] is None
    assert rows["broken"]["floor"]["ms"] > 0


def test_linear_as_json_and_as_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    arguments = ("linear", "--shape", "64x128x256, 32x128x128", "--against", "bf16", "--seconds", "0")
    result = json.loads(run_command(capsys, *arguments, "--json"))
    assert [row["shape"] for row in result["rows"][::3]] == [[64, 128, 256], [32, 128, 128]]
    assert {entry["kind"] for entry in result["ceilings"]} == {"bf16", "copy"}
    monkeypatch.setattr(rivals, "torchao_layers", lambda: {"torchao block": broken})
    main.main(["bench", *arguments[:-4], "--against", "torchao", "--seconds", "0"])
    shown = capsys.readouterr()
    assert "torchao block 32x128x128 failed: RuntimeError: no kernel image for this device" in shown.out
    as_they_came = shown.err.splitlines()
    assert len(as_they_came) == 2 * 4
    assert as_they_came[0].startswith("64x128x256 bf16: ")
    assert as_they_came[-1].startswith("32x128x128 torchao block: failed: RuntimeError: no kernel image")


def test_transformer_engines_layer_gets_the_weight_and_the_first_step(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[Any, dict[str, Any]]] = []

    class Linear(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: torch.device) -> None:
            super().__init__(inputs, outputs, bias=bias, dtype=params_dtype, device=device)

        def forward(self, input: torch.Tensor, **options: Any) -> torch.Tensor:
            calls.append((active[-1], options))
            return super().forward(input)

    active: list[Any] = []

    @contextlib.contextmanager
    def autocast(*, enabled: bool, recipe: Any) -> Iterator[None]:
        active.append(recipe)
        yield

    recipes = {name: type(name, (), {}) for name in ("Float8BlockScaling", "Float8CurrentScaling", "DelayedScaling")}
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace(Linear=Linear, autocast=autocast))
    monkeypatch.setitem(sys.modules, "transformer_engine.common", ModuleType("transformer_engine.common"))
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", SimpleNamespace(**recipes))
    linear = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    layers = rivals.te_layers()
    assert len(layers) == 6
    x = torch.ones(4, 32, dtype=torch.bfloat16)
    for name, options in (
        ("te block", [{}, {}]),
        ("te delayed, weight cached", [{"is_first_microbatch": True}, {"is_first_microbatch": False}]),
    ):
        calls.clear()
        forward, weight = layers[name](linear)
        assert weight is not linear.weight
        assert torch.equal(forward(x), linear(x))
        forward(x)
        assert [given for _, given in calls] == options
        assert {type(recipe).__name__ for recipe, _ in calls} == {"DelayedScaling" if "delayed" in name else "Float8BlockScaling"}


def test_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(rivals, "convert_by_torchao", broken)
    arguments = ("train", "--recipe", "fp8_blockwise,bf16", "--against", "torchao", "--seq", "16", "--vocab", "128", "--steps", "2")
    result = json.loads(run_command(capsys, *arguments, "--json"))
    names = ["bf16", "fp8_blockwise", "torchao tensorwise", "torchao rowwise", "torchao blockwise"]
    assert [row["name"] for row in result["rows"]] == names
    bf16, ours, *theirs = result["rows"]
    for row in (bf16, ours):
        assert row["tokens_per_second"] == pytest.approx(16e3 / row["step"]["median"])
        assert row["speedup"] == pytest.approx(bf16["step"]["median"] / row["step"]["median"])
        assert row["peak_memory_gib"] is None
        assert 0 < row["loss"] < 6
        assert row["floor"]["ms"] > 0
    assert bf16["loss"] != ours["loss"]
    assert ours["precision"].startswith("21 of 22 linear layers converted")
    assert all(row["failure"].startswith("RuntimeError") and row["step"] is None for row in theirs)

    from lowprec.cli.tables import train_table

    table = train_table(result)
    assert "fp8_blockwise: 21 of 22 linear layers converted" in table
    assert "torchao rowwise failed: RuntimeError: no kernel image" in table
    assert set(ours["weights"]) == {"fp8_blockwise", "high precision"}
    ours |= {"weights": {"high precision": 1.0}, "precision": "0 of 22 linear layers converted"}
    rows, _, notes = train_table(result).partition("nn.Linear in bf16")
    assert "fp8_blockwise" not in rows
    assert "high" in rows
    assert "fp8_blockwise: 0 of 22 linear layers converted" in notes


def test_train_keeps_buffers_in_fp32():
    case = bench_train._Case("llama-tiny", CPU, 1, 16, 128, compiled=False, liger=False)
    dtypes: dict[str, set[torch.dtype]] = {}

    def look(model: torch.nn.Module) -> str:
        dtypes["parameters"] = {parameter.dtype for parameter in model.parameters()}
        dtypes["buffers"] = {buffer.dtype for buffer in model.buffers()}
        return ""

    case.measure(look, steps=2)
    assert dtypes == {"parameters": {torch.bfloat16}, "buffers": {torch.float32}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemm", "--shape", "64x128"), "--shape: expected MxNxK like 512x512x512, joined by commas, got '64x128'"),
        (("gemm", "--shape", "0x1x1"), "--shape: expected MxNxK like 512x512x512, joined by commas, got '0x1x1'"),
        (("linear", "--shape", ","), "--shape: expected MxNxK like 512x512x512, joined by commas, got none"),
        (("gemm", "--recipe", "fp8_blokwise"), "--recipe: unknown recipe 'fp8_blokwise'; did you mean 'fp8_blockwise'?"),
        (("gemm", "--backend", "refrence"), "--backend: unknown backend 'refrence'; did you mean 'reference'?"),
        (("gemm", "--backend", "torch"), "--backend: 'torch' takes no GEMM of fp8_blockwise on cpu: takes unscaled operands only"),
        (("gemm", "--against", "te"), "--against: unknown rival 'te'; known: bf16, torchao"),
        (("linear", "--against", "torchoa"), "--against: unknown rival 'torchoa'; did you mean 'torchao'?"),
        (("linear", "--device", "gpu"), "--device: unknown device 'gpu'; known: cpu, cuda"),
        (("train", "--model", "llama-small"), "--model: unknown preset 'llama-small'; did you mean"),
        (("train", "--seq", "4096"), "--seq: 4096 is longer than llama-tiny's 2048 positions"),
        (("train", "--recipe", "bf17"), "--recipe: unknown recipe 'bf17'; did you mean 'bf16'?"),
        (("train", "--liger"), "--liger: Liger's kernels need CUDA, not cpu"),
        (("gem",), "no command 'gem'; did you mean 'gemm'?"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main.main(["bench", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lowprec: {message}")
    assert error.count("\n") == 1


def test_a_rival_that_is_not_installed_is_the_users_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(rivals._PACKAGES, "te", ("no_such_package", "pip install 'lowprec[te]'"))
    with pytest.raises(UserError, match=r"--against: te is not installed: pip install 'lowprec\[te\]'"):
        linear.run(shapes=(SHAPE,), against=("te",))
