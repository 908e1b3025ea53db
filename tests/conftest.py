"""Settings that all tests share."""

import gc
import os
from pathlib import Path

# Two test processes share two cores (pytest -n 2), so each has one thread. This is set before torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Files that take longest, in this order: `--no-loadscope-reorder` hands them out first, so that both processes end at about the same time.
LONGEST = (
    "nn/test_linear.py",
    "training/run/test_run.py",
    "interpreter/test_interpreter.py",
    "nn/test_compiled_layers.py",
    "nn/test_native_path.py",
    "training/control/test_guard_in_training.py",
    "training/checkpoint/test_resume.py",
    "training/run/test_launch.py",
    "training/checkpoint/test_trl_peft.py",
    "test_package.py",
    "nn/test_experts.py",
    "formats/test_formats_rounding.py",
    "training/checkpoint/test_hf_names.py",
    "training/test_accelerate.py",
    "training/control/test_replay.py",
    "test_documentation.py",
    "cli/test_cli.py",
    "observe/test_probe.py",
    "quant/test_quantize_nvfp4.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    rank = {tests / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """Leave what was imported and collected, some millions of objects, out of garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch, so that a test draws the same numbers alone, in any order and in any process: a test that fails fails again."""
    torch.manual_seed(0)
