"""A run that gets SIGINT, SIGTERM or SIGUSR1 finishes its step, saves, and ends; resumed, it is the same run."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lowprec import LowPrecisionCallback
from lowprec.training.checkpoint.files import is_whole
from lowprec.training.control.stop_signals import StoppedBySignal, StopSignals
from tests.builders import counting, losses, prose, small_trainer, tiny_llama
from tests.processes import run_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SETTINGS: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 3}


class SignalAt(TrainerCallback):
    """A callback that sends a signal to its own process at an event of the Trainer."""

    def __init__(self, event: str, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.armed = True

        def send(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed and state.global_step == step:
                self.armed = False
                signal.raise_signal(number)

        setattr(self, event, send)


def trainer_of(folder: Path, precision: Any, *more: TrainerCallback, seed: int = 0, **settings: Any) -> tuple[Any, LowPrecisionCallback]:
    callback = LowPrecisionCallback(precision)
    given = {"data": prose(200), "evaluated": counting(4), "model": tiny_llama(seed=seed), **SETTINGS, **settings}
    return small_trainer(folder, *more, callback, **given), callback


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def stop(trainer: Any, callback: LowPrecisionCallback, checkpoint: str | None = None) -> StoppedBySignal:
    """Train until a signal stops the run; check that the handlers are those of before."""
    before = handlers()
    with StopSignals() as signals:
        assert handlers() != before
        with pytest.raises(StoppedBySignal) as stopped:
            callback.train(trainer, checkpoint, signals=signals)
    assert handlers() == before
    return stopped.value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the Trainer of a run that no signal stops."""
    trainer, _ = trainer_of(tmp_path_factory.mktemp("whole"), PRECISION)
    trainer.train()
    return trainer


PRECISION = {"recipe": "mxfp4_aws", "schedule": [{"until": "512 tokens", "recipe": "fp8_delayed"}, {}], "guard": {"warmup": 2}}


@pytest.mark.parametrize(
    ("event", "at", "stops_after"),
    [
        ("on_train_begin", 0, 1),  # before the first step
        ("on_step_begin", 1, 2),
        ("on_pre_optimizer_step", 1, 2),
        ("on_prediction_step", 3, 3),  # in an evaluation
        ("on_save", 4, 4),
        ("on_log", 4, 4),
    ],
)
def test_a_run_stops_after_its_step_and_resumes(
    event: str, at: int, stops_after: int, whole: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    trainer, callback = trainer_of(tmp_path, PRECISION, SignalAt(event, at))
    stopped = stop(trainer, callback)
    assert (stopped.code, stopped.signal) == (143, signal.SIGTERM)
    checkpoint = tmp_path / f"checkpoint-{stops_after}"
    assert trainer.state.global_step == stops_after
    assert is_whole(checkpoint)
    told = capfd.readouterr().err
    assert "lowprec: SIGTERM: the run saves and ends" in told
    resume = f"trainer.train(resume_from_checkpoint={str(checkpoint)!r})"
    assert f"lowprec: SIGTERM: saved {checkpoint} after step {stops_after}; resume by: {resume}" in told

    again, callback = trainer_of(tmp_path, PRECISION, seed=7)
    with StopSignals() as signals:
        callback.train(again, str(checkpoint), signals=signals)
    assert losses(again) == losses(whole)
    evaluated = [[record["eval_loss"] for record in each.state.log_history if "eval_loss" in record] for each in (again, whole)]
    assert evaluated[0] == evaluated[1]
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


def test_each_way_to_save(tmp_path: Path):
    """Without saves, with the best one alone, and by epochs, a stop saves once, and does not end the run as a finished one."""
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_total_limit": 1,
        "eval_steps": 1,
        "save_steps": 1,
    }
    ways: list[dict[str, Any]] = [
        {"save_strategy": "no"},
        best | {"learning_rate": 1.0},  # the first checkpoint stays the best one
        best | {"save_strategy": "best", "learning_rate": 1.0},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
    ]
    for number, settings in enumerate(ways):
        folder = tmp_path / str(number)
        trainer, callback = trainer_of(folder, "mxfp8", SignalAt("on_step_begin", 2, signal.SIGUSR1), **settings)
        assert stop(trainer, callback).code == 138
        assert is_whole(folder / "checkpoint-3")
        assert not any("train_runtime" in record for record in trainer.state.log_history)
        evaluated = any("eval_loss" in record for record in trainer.state.log_history)
        assert evaluated is (settings.get("eval_strategy") != "epoch")


def test_the_last_step_ends_the_run(tmp_path: Path):
    trainer, callback = trainer_of(tmp_path, "mxfp8", SignalAt("on_step_begin", 5))
    with StopSignals() as signals:
        callback.train(trainer, signals=signals)
    assert trainer.state.global_step == 6
    assert any("train_runtime" in record for record in trainer.state.log_history)


class Breach(TrainerCallback):
    """A callback that makes gradients of one step NaN."""

    def __init__(self, model: Any, step: int) -> None:
        self.step, self.active = step, False
        model.model.layers[0].mlp.up_proj.weight.register_hook(lambda g: g * torch.nan if self.active else g)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step == self.step
        if self.active:
            self.step = -1
            signal.raise_signal(signal.SIGTERM)


def test_a_step_that_the_guard_takes_back_is_not_saved(tmp_path: Path):
    """The run first goes back to a checkpoint, and stops after a step from there."""
    model = tiny_llama()
    guard = {"data": "replay", "warmup": 2}
    trainer, callback = trainer_of(tmp_path, {"recipe": "mxfp8", "guard": guard}, Breach(model, 4), model=model, save_steps=1)
    stop(trainer, callback)
    step = trainer.state.global_step
    assert step < 5
    assert is_whole(tmp_path / f"checkpoint-{step}")
    assert callback.controller.recoveries == 1


def test_handlers_come_back_after_an_error_and_do_nothing_without_being_asked(tmp_path: Path):
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert handlers() == before
    trainer, callback = trainer_of(tmp_path, "mxfp8", max_steps=1)
    trainer.train()
    callback.train(trainer)
    assert handlers() == before


def test_a_signal_that_the_program_ignores_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGUSR1)
            assert not signals.stops()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread(caplog: pytest.LogCaptureFixture):
    """It can't install handlers, and can send signals."""
    before, found = handlers(), []

    def enter() -> None:
        with StopSignals():
            found.append(handlers())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
    assert "not the main thread" in caplog.text
    with StopSignals() as signals:
        thread = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT))
        thread.start()
        thread.join()
        time.sleep(0)
        assert signals.stops()
        assert signals.agreed is signal.SIGINT


PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, "")
from lowprec.training.control.stop_signals import StopSignals
with StopSignals() as signals:
    pid = os.fork()  # as a data loader's process
    for number in map(int, sys.argv[1:]):
        signal.raise_signal(number)
        time.sleep(0.01)
    if pid == 0:
        os._exit(7 if signals.received is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    if signals.stops():
        signals.stop("saved")
"""


def test_a_second_order_ends_the_process_at_once(tmp_path: Path):
    """SIGUSR1 is a warning: an order after it is the first one."""
    one, two, three = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    for sent, code in (((one,), 130), ((three, three), 138), ((three, two), 138), ((one, two), -two), ((two, three, one), -one)):
        assert outcome(*sent) == code


def outcome(*sent: int) -> int:
    """Fork a process that gets these signals, and return its exit code, negative for a death by a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            sys.argv = ["", *map(str, sent)]
            exec(PROGRAM, {})
        except SystemExit as error:
            code = int(str(error.code))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


RANKS = """
import os, signal, sys
from pathlib import Path
from lowprec import LowPrecisionCallback
from lowprec.distributed.processes import name_the_cpu
from lowprec.training.control.stop_signals import StoppedBySignal, StopSignals
from tests.builders import losses, prose, small_trainer
from tests.training.control.test_stop_signals import SignalAt

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
def trainer(name, *more):
    callback = LowPrecisionCallback("mxfp4_aws")
    made = small_trainer(folder / name, callback, *more, data=prose(60), max_steps=5, ddp_backend="gloo")
    name_the_cpu(made.args)
    return made, callback

whole, _ = trainer("whole")
whole.train()
stopped, callback = trainer("stopped", *([SignalAt("on_step_begin", 1, signal.SIGUSR1)] if rank else []))
try:
    with StopSignals() as signals:
        callback.train(stopped, signals=signals)
except StoppedBySignal as end:
    assert end.code == 138
else:
    raise AssertionError
assert stopped.state.global_step == 2
again, callback = trainer("stopped")
callback.train(again, str(folder / "stopped" / "checkpoint-2"))
assert losses(again) == losses(whole)
"""


def test_ranks_stop_after_the_same_step(tmp_path: Path):
    """One rank alone gets the signal."""
    run_ranks(RANKS, tmp_path, str(tmp_path))


def test_the_command_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lowprec.training.run import resume_command as module

    tail = f"{tmp_path}/config.yaml trainer.resume_from_checkpoint=true"
    parent: list[str] = []
    monkeypatch.setattr(module, "_parent_command", lambda: parent)

    def command(argv: str) -> str:
        monkeypatch.setattr(sys, "argv", [argv, "train", "x"])
        return module.resume_command(tmp_path)

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command("/venv/bin/lowprec") == command("/home/me/mine.py") == f"lowprec train {tail}"
    assert command("/venv/lowprec/__main__.py") == f"python -m lowprec train {tail}"
    assert command("trainers/sft.py") == f"python trainers/sft.py {tail}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command("trainers/sft.py") == f"torchrun --nproc-per-node 2 trainers/sft.py {tail}"
    parent[:] = ["/bin/python", "/venv/bin/torchrun", "--nproc-per-node", "2", "-m", "lowprec", "train", "x"]
    assert command("/venv/lowprec/__main__.py") == f"torchrun --nproc-per-node 2 -m lowprec train {tail}"
    parent[:] = ["python", "-m", "torch.distributed.run", "--nproc-per-node=2", "trainers/sft.py", "x"]
    assert command("trainers/sft.py") == f"python -m torch.distributed.run --nproc-per-node=2 trainers/sft.py {tail}"
    parent[:] = ["/bin/python", "/venv/bin/accelerate", "launch", "--config_file", "a.yaml", "trainers/sft.py", "x"]
    assert command("trainers/sft.py") == f"accelerate launch --config_file a.yaml trainers/sft.py {tail}"
