"""Shared by all tests."""

import os

# Two test processes share two cores (pytest -n 2): one thread each. Set before torch is imported, and inherited by subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test draws the same numbers alone, in any order and in any process: one that fails fails again."""
    torch.manual_seed(0)
