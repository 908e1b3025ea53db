"""What Accelerate's FSDP2 is told of dtypes; tests/distributed/test_sharding_fsdp.py has what comes of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.fsdp import MixedPrecisionPolicy

import trainers.callback
from tests.trainers.hf import small_model, small_trainer
from trainers import LowPrecisionCallback
from trainers.accelerate import prepare
from trainers.sharding import SUMS_IN_FP32, sum_in_fp32


def _plugin(mixed_precision: str | None = "bf16", **settings: Any) -> FullyShardedDataParallelPlugin:
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    if mixed_precision is not None:
        plugin.set_mixed_precision(mixed_precision)  # as Accelerate does when it starts
    return plugin


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_gathered_in_16_bits_and_gradients_summed_in_fp32(name: str, dtype: torch.dtype):
    state = SimpleNamespace(fsdp_plugin=_plugin(name))
    assert sum_in_fp32(state)
    assert state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    assert not sum_in_fp32(state)  # done


@pytest.mark.parametrize("own", [{"reduce_dtype": torch.bfloat16}, {"reduce_dtype": torch.bfloat16, "output_dtype": torch.float32}])
def test_somebodys_own_policy_stays(own: dict[str, torch.dtype]):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, **own)
    plugin = _plugin(mixed_precision_policy=policy)
    assert not sum_in_fp32(SimpleNamespace(fsdp_plugin=plugin))
    assert plugin.mixed_precision_policy is policy


@pytest.mark.parametrize("plugin", [None, _plugin(None), _plugin(fsdp_version=1)])
def test_nothing_is_done_without_fsdp2_and_mixed_precision(plugin: FullyShardedDataParallelPlugin | None):
    before = None if plugin is None else plugin.mixed_precision_policy
    assert not sum_in_fp32(SimpleNamespace(fsdp_plugin=plugin))
    assert plugin is None or plugin.mixed_precision_policy is before
    assert not sum_in_fp32(SimpleNamespace())


def test_the_callback_does_it_before_the_trainer_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    plugin = _plugin()
    monkeypatch.setattr(trainers.callback, "AcceleratorState", lambda: SimpleNamespace(fsdp_plugin=plugin))
    with caplog.at_level("INFO", logger="lowprec"):
        small_trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"))
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue,reportOptionalMemberAccess]
    assert SUMS_IN_FP32 in caplog.text


def test_a_loop_of_ones_own_does_it_before_accelerate_shards(caplog: pytest.LogCaptureFixture):
    accelerator, plugin, model = Accelerator(cpu=True), _plugin(), small_model()
    accelerator.state.fsdp_plugin = plugin
    try:
        with caplog.at_level("INFO", logger="lowprec"):
            prepare(accelerator, model, torch.optim.AdamW(model.parameters()), precision="fp8_blockwise")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue,reportOptionalMemberAccess]
    assert SUMS_IN_FP32 in caplog.text
