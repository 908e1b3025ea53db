"""The values that each field of transformers.TrainingArguments may have in a run.

transformers checks few of them, and fails in the middle of a run. The rules here follow from the
type of a field, so a field that a later version adds has a rule as well:

    a number    finite and not negative, unless `_RANGES` has a row for the field
    an Enum     one of its values
    a path      a name that a file system takes
    a mapping   finite numbers in it

`_WORDS` has the words of the fields whose type is plain text, and `UNUSABLE` the settings that this
run has another way for.
"""

import enum
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowprec.config.schema import check_path, check_plain
from lowprec.errors import UserError, nearest, shown

_LARGEST_INT = 2**53
_LARGEST_FLOAT = 3.4e38
"""Largest number in fp32: optimizers compute in it."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field may have."""

    low: float = 0
    high: float | None = None
    """Largest value. None: the largest integer or fp32 number."""
    above: bool = False
    """Flag: `low` itself is excluded."""
    below: bool = False
    """Flag: `high` itself is excluded."""
    infinite: bool = False
    """Flag: infinity has a meaning."""
    also: tuple[float, ...] = ()
    """Values outside of the range with a meaning of their own."""
    steps: bool = False
    """Flag: a number of steps; below 1 a share of all steps."""

    def holds(self, value: float) -> bool:
        """Return True if the field may have `value`."""
        if value in self.also:
            return True
        if not math.isfinite(value):
            return self.infinite and value > 0
        if self.steps and value > 1 and value != int(value):
            return False
        high = self._high(value)
        above_low = value > self.low if self.above else value >= self.low
        below_high = value < high if self.below else value <= high
        return above_low and below_high

    def _high(self, value: float) -> float:
        if self.high is not None:
            return self.high
        return _LARGEST_INT if isinstance(value, int) else _LARGEST_FLOAT

    def words(self, value: float) -> str:
        """Return the range in words, as an error about `value` says it."""
        if self.steps:
            return "a whole number of steps, or a share of all steps below 1"
        text = f"a number {'above' if self.above else 'from'} {self.low:g}"
        high = self._high(value)
        if value > high or self.below:
            text += f" {'below' if self.below else 'to'} {high:g}"
        also = [f"{number:g}" for number in self.also] + ["infinity"] * self.infinite
        return " or ".join([text, *also])


_COUNT = Range(low=1)
_SHARE = Range(high=1)
_BETA = Range(high=1, below=True)
_SEED = Range(high=2**32 - 1)
_STEPS = Range(steps=True)
_ANY_NUMBER = Range()

_RANGES = {
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    # A smaller number is 0 in fp32.
    "adam_epsilon": Range(low=1.2e-38),
    "data_seed": _SEED,
    "dataloader_num_workers": Range(high=1024),
    "dataloader_prefetch_factor": Range(low=1, high=2**20),
    "ddp_bucket_cap_mb": Range(low=1, high=2**20),
    "ddp_timeout": Range(low=1, high=10**9),
    "eval_accumulation_steps": _COUNT,
    "eval_steps": _STEPS,
    "gradient_accumulation_steps": _COUNT,
    "label_smoothing_factor": _SHARE,
    "local_rank": Range(low=-1),
    "logging_steps": _STEPS,
    # Infinity: the norm is measured, and nothing is clipped.
    "max_grad_norm": Range(infinite=True),
    "max_steps": Range(low=1, also=(-1,)),
    "num_train_epochs": Range(above=True, high=10**9),
    "per_device_eval_batch_size": Range(low=1, high=2**31 - 1),
    "per_device_train_batch_size": Range(low=1, high=2**31 - 1),
    "save_steps": _STEPS,
    "seed": _SEED,
    "torch_empty_cache_steps": _COUNT,
    "warmup_steps": _STEPS,
}
"""Ranges that differ from the rule: finite and not negative."""

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "detail", "passive")

_WORDS: dict[str, tuple[str, ...]] = {
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"),
    "include_for_metrics": ("inputs", "loss"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
    "torch_compile_mode": (
        "default",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
    ),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}

PATHS = ("output_dir", "resume_from_checkpoint")
"""Fields that name a file or a folder."""


def check_field(name: str, hint: Any, value: Any, section: str = "trainer") -> None:
    """Raise UserError if the field `name` of type `hint` may not have `value`, which is of that
    type. `section` is the section of the configuration that holds the field."""
    where = f"{section}.{name}"
    if value is None:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        allowed = _RANGES.get(name, _ANY_NUMBER)
        if not allowed.holds(value):
            raise UserError(f"{where}: expected {allowed.words(value)}, got {shown(value)}")
    elif isinstance(value, Mapping):
        try:
            check_plain(value, finite=True)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    words = _WORDS.get(name) or tuple(_enum_values(hint))
    if words:
        for word in [value] if isinstance(value, str) else _texts(value):
            _check_word(where, word, words, several=name == "debug")
    if name in PATHS and isinstance(value, str):
        try:
            check_path(value)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


def _texts(value: Any) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _check_word(where: str, word: str, words: tuple[str, ...], *, several: bool) -> None:
    # `debug` holds words with spaces between them.
    for each in word.split() if several else [word]:
        if each not in words:
            raise UserError(f"{where}: unknown value {shown(each)}{nearest(each, words)}")


def _enum_values(hint: Any) -> Iterator[str]:
    """Yield the values of the Enums in a type."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        yield from (str(member.value) for member in hint)
    for argument in typing.get_args(hint):
        yield from _enum_values(argument)
