"""Shared by all tests."""

import os

# Two test processes share two cores (pytest -n 2): one thread each. Set before torch is imported, and inherited by subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
