"""The dtypes that Accelerate's FSDP2 is given, and the runs that it refuses. test_sharding_fsdp.py tests the effect of the dtypes."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from lowprec import LowPrecisionCallback, UserError
from lowprec.config.schema import parse
from lowprec.distributed.fsdp2 import SUMS_IN_FP32, check_can_shard, offloads, sum_in_fp32
from lowprec.recipe import library
from lowprec.training import callback
from lowprec.training.accelerate import prepare
from lowprec.training.control import trained_model, trainer_facts
from lowprec.training.optim.adamw import OptimizerConfig, build
from lowprec.training.run.training_args import autocast_settings
from tests.builders import small_trainer, tiny_llama

MODEL = nn.Linear(4, 4)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Start with a fresh state: Accelerate keeps it for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _plugin(mixed_precision: str | None = "bf16", **settings: Any) -> FullyShardedDataParallelPlugin:
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    if mixed_precision is not None:
        plugin.set_mixed_precision(mixed_precision)  # as Accelerate does when it starts
    return plugin


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_gathered_in_16_bits_and_gradients_summed_in_fp32(name: str, dtype: torch.dtype):
    state = SimpleNamespace(fsdp_plugin=_plugin(name))
    assert sum_in_fp32(state, MODEL)
    assert state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    assert not sum_in_fp32(state, MODEL)  # the second call finds nothing to do


def test_gradients_of_bf16_weights_are_summed_in_fp32_without_mixed_precision():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    state = SimpleNamespace(fsdp_plugin=_plugin(None))
    assert sum_in_fp32(state, model)
    assert state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(reduce_dtype=torch.float32)
    model[0].requires_grad_(False)
    model[1].float()
    state = SimpleNamespace(fsdp_plugin=_plugin(None))
    assert not sum_in_fp32(state, model)  # the trainable weights are fp32
    assert state.fsdp_plugin.mixed_precision_policy is None


@pytest.mark.parametrize("own", [{"reduce_dtype": torch.bfloat16}, {"reduce_dtype": torch.bfloat16, "output_dtype": torch.float32}])
def test_a_policy_of_the_users_own_stays(own: dict[str, torch.dtype]):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, **own)
    plugin = _plugin(mixed_precision_policy=policy)
    assert not sum_in_fp32(SimpleNamespace(fsdp_plugin=plugin), MODEL)
    assert plugin.mixed_precision_policy is policy


@pytest.mark.parametrize("plugin", [None, _plugin(None), _plugin(fsdp_version=1)])
def test_nothing_is_done_without_fsdp2_and_mixed_precision(plugin: FullyShardedDataParallelPlugin | None):
    before = None if plugin is None else plugin.mixed_precision_policy
    assert not sum_in_fp32(SimpleNamespace(fsdp_plugin=plugin), MODEL)
    assert plugin is None or plugin.mixed_precision_policy is before
    assert not sum_in_fp32(SimpleNamespace(), MODEL)


def test_the_callback_does_it_before_the_trainer_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    plugin = _plugin()
    state = SimpleNamespace(fsdp_plugin=plugin, distributed_type=DistributedType.FSDP, is_fsdp2=True)
    for module in (trained_model, trainer_facts):
        monkeypatch.setattr(module, "AcceleratorState", lambda: state)
    with caplog.at_level("INFO", logger="lowprec"):
        small_trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"))
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue,reportOptionalMemberAccess]
    assert SUMS_IN_FP32 in caplog.text


@pytest.mark.parametrize(("kind", "name"), [(DistributedType.DEEPSPEED, "DEEPSPEED"), (DistributedType.FSDP, "FSDP version 1")])
def test_the_callback_refuses_other_strategies(kind: DistributedType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = SimpleNamespace(fsdp_plugin=_plugin(fsdp_version=1), distributed_type=kind, is_fsdp2=False)
    for module in (trained_model, trainer_facts):
        monkeypatch.setattr(module, "AcceleratorState", lambda: state)
    with pytest.raises(UserError, match=rf"^low precision needs one process, DDP or FSDP2 \(fsdp_version: 2\), not {name}$"):
        small_trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"))


def test_a_loop_of_ones_own_does_it_before_accelerate_shards(caplog: pytest.LogCaptureFixture):
    accelerator, plugin, model = Accelerator(cpu=True), _plugin(), tiny_llama()
    accelerator.state.fsdp_plugin = plugin
    with caplog.at_level("INFO", logger="lowprec"):
        prepare(accelerator, model, torch.optim.AdamW(model.parameters()), precision="fp8_blockwise")
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue,reportOptionalMemberAccess]
    assert SUMS_IN_FP32 in caplog.text


def _args(fsdp: bool, device: str, mode: ParallelMode, version: int = 2) -> Any:
    return SimpleNamespace(
        fsdp=fsdp, device=torch.device(device), parallel_mode=mode, fsdp_plugin_args={"fsdp_version": version} if fsdp else None
    )


ALONE, RANKS = ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED


@pytest.mark.parametrize(
    ("args", "environment", "message"),
    [
        (_args(True, "cuda", ALONE), {}, "trainer.fsdp: shards lie in processes that a launcher starts: torchrun --nproc-per-node N"),
        (_args(True, "cpu", RANKS), {}, "trainer.fsdp: Accelerate shards on GPUs only; on a CPU leave it out"),
        (_args(True, "cuda", RANKS, 1), {}, "trainer.fsdp: low precision needs FSDP2; say version: 2 in trainer.fsdp_config"),
        (
            _args(False, "cpu", RANKS),
            {"FSDP_VERSION": "2"},
            "the launcher's FSDP: Accelerate shards on GPUs only; on a CPU take",
        ),
        (
            _args(False, "cuda", RANKS),
            {},
            "the launcher's FSDP: low precision needs FSDP2; say fsdp_version: 2",
        ),
    ],
)
def test_runs_that_cannot_be_sharded(args: Any, environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch):
    if not args.fsdp:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        check_can_shard(args)
    assert str(raised.value).startswith(message)


def test_runs_that_can_be_sharded(monkeypatch: pytest.MonkeyPatch):
    check_can_shard(_args(True, "cuda", RANKS))
    check_can_shard(_args(False, "cpu", ALONE))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_can_shard(_args(False, "cuda", RANKS))


def test_offloaded_shards_are_recognised(monkeypatch: pytest.MonkeyPatch):
    args = _args(True, "cuda", RANKS)
    assert not offloads(args)
    args.fsdp_plugin_args["cpu_offload"] = True
    assert offloads(args)
    args = _args(False, "cuda", RANKS)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert not offloads(args)  # FSDP is off
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert offloads(args)


OFFLOADED = r"^FSDP's offloading of parameters to host memory \(cpu_offload\): "
KEEPS = "a recipe that keeps state .* could not resume from a checkpoint; take fp8_blockwise, or turn it off$"
NOT_OFFLOADED = [
    ("fp8_delayed", OptimizerConfig(), KEEPS),
    ({"rules": [{"modules": ".*down_proj", "recipe": "mxfp4_aws"}]}, OptimizerConfig(), KEEPS),
    ({"schedule": [{"until": "50%", "recipe": "bf16"}, {"recipe": "nvfp4"}]}, OptimizerConfig(), KEEPS),
    ({"evaluation": "mxfp4_quartet"}, OptimizerConfig(), KEEPS),
    ({"guard": {"ladder": ["mxfp4", "fp8_delayed", "bf16"]}}, OptimizerConfig(), KEEPS),
    ("fp8_blockwise", OptimizerConfig(moments="8bit"), "optimizer.weights and optimizer.moments have to be fp32, or turn it off$"),
    ({"recipe": "fp8_blockwise", "guard": True}, OptimizerConfig(), None),
]


@pytest.mark.parametrize(("precision", "formats", "refused"), NOT_OFFLOADED)
@pytest.mark.parametrize("loop", [False, True])
def test_state_and_low_bit_optimizers_are_not_offloaded(
    precision: Any, formats: OptimizerConfig, refused: str | None, loop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    accelerator, model = Accelerator(cpu=True), tiny_llama()
    optimizer = build(formats, model.parameters())
    plugin = _plugin(None, cpu_offload=True)
    if loop:
        accelerator.state.fsdp_plugin = plugin
        monkeypatch.setattr(accelerator, "prepare", lambda *given: given)  # sharding needs a GPU

        def start() -> Any:
            return prepare(accelerator, model, optimizer, precision=precision, steps=10)
    else:

        def start() -> Any:
            trainer = small_trainer(tmp_path, LowPrecisionCallback(precision), model=model, max_steps=1)
            trainer.optimizer = optimizer
            return trainer.train()

        for module in (callback, trainer_facts):
            monkeypatch.setattr(module, "is_offloaded", lambda state: True)
    if refused is None:
        assert start()
        return
    with pytest.raises(UserError, match=OFFLOADED + refused):
        start()


def test_a_loss_scale_is_not_offloaded(monkeypatch: pytest.MonkeyPatch):
    accelerator, model = Accelerator(cpu=True), tiny_llama()
    accelerator.state.fsdp_plugin = _plugin(None, cpu_offload=True)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(UserError, match=OFFLOADED + "fp16's loss scale collapses; take bf16, or turn it off$"):
        prepare(accelerator, model, torch.optim.AdamW(model.parameters()), precision="fp16")


def test_a_trainer_that_does_not_shard_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # Accelerate sets it
    monkeypatch.setattr(TrainingArguments, "parallel_mode", RANKS)  # without FSDP this mode alone is refused
    with caplog.at_level("WARNING", logger="lowprec"):
        small_trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"), fsdp=True)
    assert "fsdp: Accelerate shards on GPUs only; here each process has the whole model" in caplog.text


BF16 = library.get("bf16")


@pytest.mark.parametrize("launched", [False, True])
def test_bf16_weights_that_are_sharded_train_without_autocast(launched: bool, monkeypatch: pytest.MonkeyPatch):
    """Accelerate would convert them to fp32 under autocast."""
    settings: dict[str, Any] = {} if launched else {"fsdp": True}
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    chosen, part = autocast_settings(settings, BF16, "cuda", bf16_weights=True)
    assert chosen == {"bf16": False}
    assert (part.choice, part.reason) == ("off", "the weights are bf16, and FSDP2 keeps them so without it")
    assert autocast_settings(settings, BF16, "cuda")[0]["bf16"]
    with pytest.raises(
        UserError, match=r"^optimizer\.weights: bf16 weights that FSDP2 shards compute in bf16; take another recipe than fp16"
    ):
        autocast_settings(settings, library.get("fp16"), "cuda", bf16_weights=True)


def test_bf16_weights_of_one_process_train_under_autocast():
    assert autocast_settings({}, BF16, "cuda", bf16_weights=True)[0]["bf16"]


@pytest.mark.parametrize(("weights", "moments", "refused"), [("bf16", "8bit", True), ("fp32", "8bit", False), ("bf16", "torch's", False)])
def test_a_loops_bf16_weights_are_not_made_fp32_in_silence(weights: str, moments: str, refused: bool, monkeypatch: pytest.MonkeyPatch):
    accelerator, model = Accelerator(cpu=True, mixed_precision="bf16"), tiny_llama()
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    monkeypatch.setattr(accelerator, "prepare", lambda *given: given)  # sharding needs a GPU
    if weights == "bf16":
        model.bfloat16()
    if moments == "8bit":
        optimizer = build(parse(OptimizerConfig, {"weights": weights, "moments": moments}, "optimizer"), model.parameters())
    else:
        optimizer = torch.optim.AdamW(model.parameters())
    if not refused:
        assert prepare(accelerator, model, optimizer, precision="fp8_blockwise")
        return
    with pytest.raises(
        UserError, match=r"^mixed_precision: bf16, under which Accelerate's FSDP2 makes fp32 of this optimizer's bf16 weights"
    ):
        prepare(accelerator, model, optimizer, precision="fp8_blockwise")
