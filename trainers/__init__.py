"""Training with lowprec: a callback for the Hugging Face Trainer, and config-driven runs.

Names are imported on first use, so that `lowprec --help` stays quick.
"""

from typing import Any

__all__ = ["LowPrecisionCallback"]


def __getattr__(name: str) -> Any:
    if name != "LowPrecisionCallback":
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    from trainers.callback import LowPrecisionCallback

    return LowPrecisionCallback
