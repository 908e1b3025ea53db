"""Lines that reach the user in any program, and only once."""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import nn

import lowprec
from lowprec.conversion.convert import make_plan
from lowprec.log import logger, tell
from lowprec.training.log import show_log, show_plan

SUMMARY = "2 of 2 linear layers converted (100.0% of their weights): mxfp8 x 2; 0 native, 2 emulated on cpu"


@contextmanager
def fresh_logging() -> Iterator[None]:
    """Take away all handlers, pytest's too, and put them back."""
    root = logging.getLogger()
    kept = [(place, place.handlers[:], place.level, place.propagate) for place in (root, logger)]
    for place, *_ in kept:
        place.handlers[:] = []
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        logger.disabled = False
        for place, handlers, level, propagate in kept:
            place.handlers[:] = handlers
            place.setLevel(level)
            place.propagate = propagate


def nothing() -> None:
    pass


def basic() -> None:
    logging.basicConfig()


def basic_info() -> None:
    logging.basicConfig(level=logging.INFO)


def on_stdout() -> None:
    logging.basicConfig(stream=sys.stdout, level=logging.DEBUG, format="%(levelname)s %(message)s")


def to_a_string() -> None:
    logging.basicConfig(stream=io.StringIO(), level=logging.INFO)


def quiet_handler() -> None:
    logging.basicConfig(level=logging.INFO)
    logging.getLogger().handlers[0].setLevel(logging.ERROR)


def disabled() -> None:
    logging.disable(logging.CRITICAL)


def existing_loggers_disabled() -> None:
    """Disable loggers as logging.config.dictConfig does by default."""
    logger.disabled = True


def transformers_verbosity() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


PROGRAMS = [
    nothing,
    basic,
    basic_info,
    on_stdout,
    to_a_string,
    quiet_handler,
    disabled,
    existing_loggers_disabled,
    transformers_verbosity,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_summary_of_a_plan_is_seen_once_in_any_program(program: Callable[[], None], capsys: pytest.CaptureFixture[str]):
    plan = make_plan(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), "mxfp8")
    with fresh_logging():
        program()
        show_plan(plan)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count(SUMMARY) == 1


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_converting_without_a_look_at_the_plan_warns_once_where_little_is_converted(
    program: Callable[[], None], capsys: pytest.CaptureFixture[str]
):
    model = nn.ModuleDict({"body": nn.Linear(32, 32), "lm_head": nn.Linear(32, 96)})
    with fresh_logging():
        program()
        lowprec.convert(model, "mxfp8")
    printed = capsys.readouterr()
    warning = "mxfp8 runs in 25.0% of the linear weights only: the output head stays in high precision unless a rule names it (lm_head)"
    assert (printed.out + printed.err).count(warning) == 1
    lowprec.convert(model, {"recipe": "mxfp8", "rules": [{"modules": "lm_head", "recipe": "none"}]})
    lowprec.convert(model, "bf16")
    assert not any(capsys.readouterr())


def test_a_program_that_sets_the_level_of_this_logger_has_decided(capsys: pytest.CaptureFixture[str]):
    with fresh_logging():
        logger.setLevel(logging.ERROR)
        tell("a line", logging.WARNING)
        tell("a line")
        assert not any(capsys.readouterr())
        logger.setLevel(logging.WARNING)
        tell("a line", logging.WARNING)
        tell("another")
    assert capsys.readouterr().err == "a line\n"


def test_one_process_of_a_run_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        tell("a line", logging.WARNING)
    assert capsys.readouterr().err == "lowprec: a line\n"


def test_show_log_keeps_what_a_program_has_set_up():
    with fresh_logging():
        logging.basicConfig()
        show_log()
        assert not logger.handlers
