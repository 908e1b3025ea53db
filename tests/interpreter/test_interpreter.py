"""The plain Triton kernels pass `kernel_cases.py` on a CPU, in a process in which Triton interprets.

Triton decides between compiling and interpreting when it is first imported, so these tests need their own process. To run them by hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreter/kernel_cases.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")
CASES = Path(__file__).with_name("kernel_cases.py")


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7"),
    reason="Triton 3.6's interpreter takes a number from an array of one, which NumPy 2.4 refuses",
)
def test_the_kernels_by_the_interpreter():
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "--tb=short", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=CASES.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    if result.returncode != 0:
        pytest.fail(f"{CASES.name}, interpreted:\n{result.stdout[-8000:]}{result.stderr[-2000:]}", pytrace=False)
