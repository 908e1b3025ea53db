"""The environment does not change what a run computes: the configuration rules, and a line says so."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lowprec import UserError
from lowprec.config.schema import parse
from lowprec.training.run.arguments import make_arguments
from lowprec.training.run.config import RunConfig
from lowprec.training.run.environment import rule_environment
from lowprec.training.run.setup import RunSetup
from tests import processes
from tests.builders import small_trainer
from tests.runs import CONFIG, losses, make_corpus, overrides

VARIABLES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")


def setup(**trainer: Any) -> RunSetup:
    config = {"model": {"preset": "llama-tiny"}, "precision": "fp8_blockwise", "device": "cpu", "trainer": {"max_steps": 2, **trainer}}
    return RunSetup.of(parse(RunConfig, config))


@pytest.mark.parametrize("value", ["bf16", "fp16", "fp8"])
def test_mixed_precision_is_overruled(value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with caplog.at_level(logging.WARNING, "lowprec"):
        args, _ = make_arguments(setup())
    assert args.mixed_precision == "no"
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"ACCELERATE_MIXED_PRECISION={value} is overruled by the configuration: no")
    assert second.startswith("ACCELERATE_DYNAMO_BACKEND=INDUCTOR is overruled")


def test_no_is_what_the_launcher_sets_and_contradicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    args = small_trainer(tmp_path).args
    args.bf16 = True
    with caplog.at_level(logging.WARNING, "lowprec"):
        rule_environment(args, "cpu")
    assert not caplog.records
    assert args.mixed_precision == os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_variables_that_say_the_same_say_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """`accelerate launch` sets them."""
    given = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    given |= {"ACCELERATE_USE_CPU": "true", "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, "lowprec"):
        make_arguments(setup())
    assert not caplog.records


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "true", "does not train by Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "does not train by tensor or context parallelism"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "products of fp32 would have another format"),
        ("DNNL_DEFAULT_FPMATH_MODE", "any", "products of fp32 would have another format"),
    ],
)
def test_what_cannot_be_overruled_is_refused(variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}={value}: .*{message}"):
        make_arguments(setup())


def test_the_device_and_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = small_trainer(tmp_path).args
    with pytest.raises(UserError, match="device: the run is on cuda, and the environment chooses cpu"):
        rule_environment(args, "cuda")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    rule_environment(args, "cpu")
    with pytest.raises(UserError, match="TORCHDYNAMO_DISABLE=1: nothing would be compiled"):
        rule_environment(args, "cpu", compiled=True)


def test_the_numbers_of_a_run(tmp_path: Path):
    corpus = make_corpus(tmp_path / "corpus")
    found = []
    for name, environment in (("plain", {}), ("other", dict.fromkeys(VARIABLES, "bf16") | {"ACCELERATE_DYNAMO_BACKEND": "EAGER"})):
        settings = {"trainer__max_steps": 2, "trainer__output_dir": str(tmp_path / name), "trainer__save_strategy": "no"}
        result = processes.run("-m", "lowprec", "train", str(CONFIG), *overrides(corpus, **settings), **environment)
        assert result.returncode == 0, result.stderr[-3000:]
        assert [variable in result.stderr for variable in VARIABLES] == [bool(environment)] * 2
        found.append(losses(tmp_path / name))
    assert found[0] == found[1]
