"""Settings that all tests share."""

import os

# Two test processes share two cores (pytest -n 2), so each has one thread. This is set before torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch, so that a test draws the same numbers alone, in any order and in any process: a test that fails fails again."""
    torch.manual_seed(0)
