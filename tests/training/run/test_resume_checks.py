"""A run that resumes is checked: it needs the same model and optimizer, and steps that are left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lowprec import UserError
from lowprec.config.yaml import load_mapping
from lowprec.training.run import directory as run_directory
from lowprec.training.run import resume_checks
from lowprec.training.run.models import ModelConfig, build_config
from lowprec.training.run.training_args import total_steps
from tests.builders import counting, small_trainer, tiny_config
from tests.processes import lowprec
from tests.runs import CONFIG, losses, make_corpus, overrides


def config(vocab_size: int = 256, layers: int = 1) -> LlamaConfig:
    return tiny_config(vocab_size=vocab_size, num_hidden_layers=layers, use_cache=True)


def checkpoint_of(run: Path, data: dict[str, Any] | None = None, *, step: int = 4, optimizer: bool = True) -> Path:
    """Make a checkpoint of a run with the configuration `data` and return its path."""
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    config().save_pretrained(path)
    if optimizer:
        (path / "optimizer.pt").write_bytes(b"")
    if data is not None:
        (run / run_directory.CONFIG).write_text(json.dumps(data))
    return path


def test_steps_left(tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path, step=6)
    with pytest.raises(UserError, match="is the end of its run, after 6 steps"):
        resume_checks.check_steps_left(checkpoint, 3)
    for steps in (6, 7):  # without a summary, the end after step 6 is left to do
        resume_checks.check_steps_left(checkpoint, steps)
    (tmp_path / run_directory.SUMMARY).write_text('{"steps": 6}')
    for steps in (6, 3):
        with pytest.raises(UserError, match="is the end of its run, after 6 steps, and the run is finished"):
            resume_checks.check_steps_left(checkpoint, steps)
    resume_checks.check_steps_left(checkpoint, 7)


@pytest.mark.parametrize("epochs", [0.02, 0.5, 1.5, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_counted_as_the_trainer_counts_them(epochs: float, drop_last: bool, accumulate: int, tmp_path: Path):
    settings = {"max_steps": -1, "num_train_epochs": epochs, "gradient_accumulation_steps": accumulate, "dataloader_drop_last": drop_last}
    trainer = small_trainer(tmp_path, data=counting(26), **settings)
    found = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert total_steps(trainer.args, 26) == found[-1]


def test_steps_on_several_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    args = small_trainer(tmp_path, max_steps=-1, num_train_epochs=2).args
    monkeypatch.setattr(type(args), "world_size", 3)
    assert total_steps(args, 28) == 6  # 7 batches of 4: 3 on each rank, some twice
    args.dataloader_drop_last = True
    assert total_steps(args, 28) == 4


@pytest.mark.parametrize(
    "model",
    [
        {"path": "{folder}/model"},
        {"path": "{folder}/./model/", "preset": None},
        {"path": "{folder}/model", "overrides": {"num_hidden_layers": 1, "rms_norm_eps": 1e-6, "use_cache": False, "eos_token_id": 0}},
    ],
)
def test_the_same_model_in_other_words(model: dict[str, Any], tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path, {"model": {"path": "o1/model"}})
    config().save_pretrained(tmp_path / "model")
    model = {**model, "path": model["path"].format(folder=tmp_path)}
    resume_checks.check_same_model(checkpoint, build_config(ModelConfig(**model), 256), {"model": model})


def test_another_model(tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path, {"model": {"path": "model"}})
    config().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text().replace("256", "512"))
    same = {"model": {"path": "model"}}  # the configuration has the same words
    with pytest.raises(UserError, match="is of another model: vocab_size is 256 there, 512 here"):
        resume_checks.check_same_model(checkpoint, build_config(ModelConfig(path=str(tmp_path / "model")), 256), same)
    resume_checks.check_same_model(checkpoint, config(vocab_size=512), same, any_vocabulary=True)
    with pytest.raises(UserError, match="num_hidden_layers is 1 there, 2 here"):
        resume_checks.check_same_model(checkpoint, config(layers=2), same)
    (checkpoint / "config.json").unlink()  # a sharded checkpoint has no configuration
    with pytest.raises(UserError, match="is of another model"):
        resume_checks.check_same_model(checkpoint, None, {"model": {"preset": "llama-tiny"}})


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"optimizer": {"moments": "bf16"}}, "optimizer.moments: .* with fp32, not bf16"),
        ({"optimizer": {"moments": "8bit"}}, {}, "optimizer.moments: .* with 8bit, not fp32"),
        ({"optimizer": {"moments": "8bit"}}, {"optimizer": {"moments": "4bit"}}, "resume with moments: 8bit"),
        ({"optimizer": {"weights": "bf16"}}, {"optimizer": {"weights": "fp32"}}, "optimizer.weights: .* with bf16, not fp32"),
        ({}, {"optimizer": {"weights": "bf16"}}, "optimizer.weights: .* with fp32, not bf16"),
        ({"trainer": {"optim": "adafactor"}}, {}, "trainer.optim: .* state of adafactor, not of adamw_torch"),
    ],
)
def test_another_optimizer(before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        resume_checks.check_same_optimizer(checkpoint_of(tmp_path / "a", before), now)
    resume_checks.check_same_optimizer(checkpoint_of(tmp_path / "b", before, optimizer=False), now)  # the optimizer begins anew


def test_the_configuration_until_a_step_is_that_of_the_steps_before_it(tmp_path: Path):
    """config.yaml is that after step 8 here, config-8.yaml that of the steps before."""
    (tmp_path / run_directory.CONFIG).write_text("optimizer: {moments: 8bit}")
    for step in (8, 10):
        (tmp_path / f"config-{step}.yaml").write_text("optimizer: {moments: fp32}")
    resume_checks.check_same_optimizer(checkpoint_of(tmp_path, step=4), {})
    resume_checks.write_config(tmp_path, tmp_path / "checkpoint-4", {"optimizer": {"moments": "fp32"}, "device": "cpu"})
    found = sorted(path.name for path in tmp_path.glob("*.yaml"))
    assert found == ["config-4.yaml", "config.yaml", "replaced-config-10.yaml", "replaced-config-8.yaml"]
    assert load_mapping(tmp_path / "config-4.yaml") == {"optimizer": {"moments": "fp32"}}


def test_the_same_optimizer_in_other_words(tmp_path: Path):
    checkpoint = checkpoint_of(tmp_path, {"optimizer": {"moments": "fp32"}, "trainer": {"optim": "adamw_torch_fused"}})
    resume_checks.check_same_optimizer(checkpoint, {"trainer": {"optim": "adamw_torch"}})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for half an epoch and return the run's directory."""
    output = tmp_path_factory.mktemp("runs") / "first"
    lowprec(*command(corpus, output, precision__recipe="mxfp4"), check=True)
    return output


def command(corpus: Path, output: Path, *more: str, **settings: Any) -> list[str]:
    given = {"trainer__output_dir": str(output), "trainer__max_steps": -1, "trainer__num_train_epochs": 0.5, **settings}
    return ["train", str(CONFIG), *overrides(corpus, **given), *more]


def test_refusals_change_nothing(run: Path, corpus: Path, refused: Callable[..., str]):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    resume = "trainer.resume_from_checkpoint=true"
    assert "is the end of its run" in refused(*command(corpus, run, resume))
    assert "optimizer.moments: " in refused(*command(corpus, run, resume, "optimizer.moments=8bit", trainer__num_train_epochs=1))
    assert "vocab_size is 320 there, 512 here" in refused(*command(corpus, run, resume, "model.overrides.vocab_size=512"))
    overwrite = [f"model.path={run}/model", "model.preset=null", "model.overrides={}", "trainer.overwrite_output_dir=true"]
    assert "this run reads" in refused(*command(corpus, run, *overwrite, trainer__save_strategy="no"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_more_epochs_or_more_data_resume_in_another_directory(run: Path, corpus: Path, tmp_path: Path):
    """Another configuration is logged and kept, also in another directory."""
    first, done = (run / run_directory.CONFIG).read_text(), max(losses(run))
    resume = f"trainer.resume_from_checkpoint={run}/checkpoint-{done}"
    result = lowprec(*command(corpus, tmp_path / "epochs", resume, precision__recipe="bf16", trainer__num_train_epochs=1), check=True)
    assert f"another configuration than until step {done}: " in result.stderr
    assert (tmp_path / "epochs" / f"config-{done}.yaml").read_text() == first
    assert 2 * done - 1 <= max(losses(tmp_path / "epochs")) <= 2 * done
    more = make_corpus(tmp_path / "more", documents=80)
    lowprec(*command(corpus, tmp_path / "data", resume, f"data.source={more}"), check=True)
    assert max(losses(tmp_path / "data")) > done
    assert (run / run_directory.CONFIG).read_text() == first
