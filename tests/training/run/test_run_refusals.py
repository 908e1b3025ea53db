"""Runs that `lowprec train` refuses in one line, before it writes, deletes or trains; and runs that resume with another configuration."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowprec import UserError
from lowprec.cli.main import main
from lowprec.files import keep_lines_until
from lowprec.training.checkpoint import files as checkpoint_files
from lowprec.training.checkpoint.torn import set_aside_torn
from lowprec.training.file_names import EVENTS
from lowprec.training.run import arguments as run_arguments
from lowprec.training.run import directory as run_directory
from lowprec.training.run.models import ModelConfig, build_config
from tests.processes import lowprec
from tests.runs import CONFIG, losses, make_corpus, overrides

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


def command(corpus: Path, output: Path | None, *more: str, **settings: Any) -> list[str]:
    given = {} if output is None else {"trainer__output_dir": str(output)}
    return ["train", str(CONFIG), *overrides(corpus, **{**given, "trainer__save_steps": 2, **settings}), *more]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two runs of four steps, a in mxfp4_aws and b in fp8_blockwise, and return their directory."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in (("a", "mxfp4_aws"), ("b", "fp8_blockwise")):
        lowprec(*command(corpus, folder / name, precision__recipe=recipe, trainer__max_steps=4), check=True)
    return folder


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_transformers_loads_the_finished_model(runs: Path):
    model = AutoModelForCausalLM.from_pretrained(runs / "a" / "model", output_loading_info=True)
    assert not any(model[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [name for name in model[0].state_dict() if "rounding_state" in name]
    tokenizer = AutoTokenizer.from_pretrained(runs / "a" / "model")
    prompt = tokenizer("the quick", return_tensors="pt")["input_ids"]
    assert model[0].generate(prompt, max_new_tokens=2, do_sample=False).shape[1] == prompt.shape[1] + 2
    trained = AutoModelForCausalLM.from_pretrained(runs / "a" / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model[0].state_dict().items())


def test_refusals_beside_finished_runs_change_nothing(runs: Path, corpus: Path, refused: Refused):
    before = everything(runs)
    cases: list[tuple[list[str], str]] = [
        # a checkpoint of another run for this run's directory
        (command(corpus, runs / "b", f"trainer.resume_from_checkpoint={runs}/a/checkpoint-2"), "holds another run"),
        # a run that has finished
        (command(corpus, runs / "b", "trainer.max_steps=4", "trainer.resume_from_checkpoint=true"), "is the end of its run, after 4 steps"),
        # no checkpoint
        (command(corpus, None, f"trainer.resume_from_checkpoint={runs}/a"), f"did you mean {runs}/a/checkpoint-4?"),
        (command(corpus, None, "trainer.resume_from_checkpoint=yes"), "no such checkpoint: yes; true takes the last one"),
        # another model
        (
            command(
                corpus, runs / "b", "trainer.max_steps=8", "trainer.resume_from_checkpoint=true", "model.overrides.num_hidden_layers=2"
            ),
            "is of another model",
        ),
        # no place to write
        (command(corpus, runs / "a" / "config.yaml"), "config.yaml is a file"),
        (command(corpus, runs / "a" / "config.yaml" / "sub"), "config.yaml is a file"),
        # a setting that no run can have, while the directory would be overwritten
        (command(corpus, runs / "b", "trainer.overwrite_output_dir=true", "trainer.report_to=wandbb"), "wandbb"),
        (command(corpus, runs / "b", "trainer.overwrite_output_dir=true", "trainer.per_device_eval_batch_size=0"), "from 1, got 0"),
    ]
    for arguments, message in cases:
        assert message in refused(*arguments), arguments
    assert everything(runs) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.per_device_train_batch_size=0", "trainer.per_device_train_batch_size: expected a number from 1, got 0"),
        ("trainer.gradient_accumulation_steps=0", "trainer.gradient_accumulation_steps: expected a number from 1, got 0"),
        ("trainer.learning_rate=-1", "trainer.learning_rate: expected a number from 0, got -1"),
        ("trainer.num_train_epochs=0", "trainer.num_train_epochs: expected a number above 0, got 0"),
        ("trainer.max_steps=0", "trainer.max_steps: 0 steps train nothing"),
        ("trainer.use_liger_kernel=true", "trainer.use_liger_kernel: say kernels.liger: auto"),
        ("model.overrides.num_attention_heads=3", "is not a multiple of the number of attention heads"),
        ("model.overrides.num_hidden_layers=-1", "model.overrides.num_hidden_layers: expected a number from 1, got -1"),
        ("model.overrides.num_hidden_layers=two", "model.overrides.num_hidden_layers: "),
        ("model.overrides.head_dim=0", "model.overrides.head_dim: expected a number from 1, got 0"),
        # phases out of order, which shows only after they are converted to steps
        (
            "precision.schedule=[{until: 2k steps, recipe: bf16}, {until: 50%}, {until: 100%}]",
            "precision.schedule.1.until: phases out of order: 50% is step 6, the phase before ends at step 2000",
        ),
        (
            "precision.schedule=[{until: 7 steps, recipe: bf16}, {until: 2k tokens}, {until: 100%}]",
            "precision.schedule.1.until: phases out of order: 2k tokens is step 4, the phase before ends at step 7",
        ),
    ],
)
@pytest.mark.parametrize("what", ["plan", "train"])
def test_values_that_no_run_can_have(what: str, override: str, message: str, corpus: Path, tmp_path: Path, refused: Refused):
    settings = {"trainer__max_steps": 12, "trainer__gradient_accumulation_steps": 2}
    assert message in refused(what, str(CONFIG), *overrides(corpus, **settings), override)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.fsdp=true", "trainer.fsdp: Accelerate shards on GPUs only; on a CPU leave it out"),
        ("trainer.fsdp_config={version: 1}", "trainer.fsdp: low precision needs FSDP2; say version: 2 in trainer.fsdp_config"),
    ],
)
def test_sharding_that_is_refused(override: str, message: str, corpus: Path, tmp_path: Path, refused: Refused):
    """The refusal comes before anything is written. The Trainer would fail, or train the whole model."""
    given = command(corpus, tmp_path / "run", override, trainer__fsdp=True)
    assert message in refused(*given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision.recipe=fp8_delayed", "a recipe that keeps state (amax histories, rounding keys) could not resume from a checkpoint"),
        ("optimizer.moments=8bit", "optimizer.weights and optimizer.moments have to be fp32"),
    ],
)
def test_state_and_low_bit_optimizers_are_not_offloaded(
    override: str, message: str, corpus: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_arguments, "offloads", lambda args: True)  # on a CPU nothing is sharded
    assert f"FSDP's offloading of parameters to host memory (cpu_offload): {message}" in refused(
        *command(corpus, tmp_path / "run", override)
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("trainer.lr_scheduler_type=cosine_with_min_lr",),
            "trainer.lr_scheduler_kwargs: cosine_with_min_lr: One of min_lr or min_lr_rate",
        ),
        (
            ("trainer.lr_scheduler_type=cosine", "trainer.lr_scheduler_kwargs={min_lr: 0.1}"),
            "trainer.lr_scheduler_kwargs: cosine: get_cosine_schedule_with_warmup() got an unexpected keyword argument 'min_lr'",
        ),
    ],
)
def test_wrong_settings_of_the_learning_rate_schedule(
    overrides: tuple[str, ...], message: str, corpus: Path, tmp_path: Path, refused: Refused
):
    assert message in refused(*command(corpus, tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("galore_torch") is not None, reason="GaLore is installed")
def test_an_optimizer_that_is_not_installed(corpus: Path, tmp_path: Path, refused: Refused):
    message = refused(*command(corpus, tmp_path / "run", trainer__optim="galore_adamw"))
    assert "trainer.optim: galore_adamw: You need to install" in message
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_does_not_fit_the_epochs(corpus: Path, tmp_path: Path, refused: Refused):
    """The error shows after the data is loaded and before anything is written."""
    schedule = "precision.schedule=[{until: 2k steps, recipe: bf16}, {until: 50%}, {until: 100%}]"
    given = command(corpus, tmp_path / "run", schedule, trainer__max_steps=-1, trainer__num_train_epochs=1)
    assert "precision.schedule.1.until: phases out of order: 50% is step" in refused(*given)
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_the_model(runs: Path, corpus: Path, refused: Refused):
    given = [argument for argument in overrides(corpus) if not argument.startswith("model.")]
    given += ["model.preset=null", f"model.path={runs}/a/model"]
    assert "no weights in" in refused("train", str(CONFIG), *given, "model.overrides.num_hidden_layers=3")
    assert "don't fit its configuration" in refused("train", str(CONFIG), *given, "model.overrides.intermediate_size=512")


def test_configuration_files_that_are_not_text(tmp_path: Path, refused: Refused):
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file in UTF-8" in refused("plan", "bin.yaml")
    (tmp_path / "folder").mkdir()
    assert "folder: a folder, not a file" in refused("plan", "folder")


def test_data_that_fills_no_batch(corpus: Path, tmp_path: Path, refused: Refused):
    settings = {"trainer__per_device_train_batch_size": 4096, "trainer__dataloader_drop_last": True, "trainer__max_steps": 2}
    with pytest.raises(SystemExit) as stopped:
        main(command(corpus, tmp_path / "run", **settings))
    assert stopped.value.code == 2


def test_a_run_that_resumes_with_another_configuration_logs_it(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    lowprec(*command(corpus, run, precision__recipe="mxfp4", trainer__max_steps=4), check=True)
    first = (run / "config.yaml").read_text()
    assert "output_dir" not in first
    more = ["trainer.resume_from_checkpoint=true", "trainer.max_steps=6"]
    result = lowprec(*command(corpus, run, *more, precision__recipe="fp8_blockwise"), check=True)
    assert f"resuming from {run}/checkpoint-4, after step 4" in result.stderr
    assert "another configuration than until step 4: " in result.stderr
    assert "precision" in result.stderr.split("another configuration than until step 4: ")[1].splitlines()[0]
    assert (run / "config-4.yaml").read_text() == first
    assert "fp8_blockwise" in (run / "config.yaml").read_text()
    assert "resume_from_checkpoint" not in (run / "config.yaml").read_text()
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    again = lowprec(*command(corpus, run, "trainer.resume_from_checkpoint=true", "trainer.max_steps=8"), check=True)
    assert "another configuration" in again.stderr  # the resumed run has more steps
    assert (run / "config-6.yaml").is_file()
    once_more = [f"trainer.resume_from_checkpoint={run}/checkpoint-6", "trainer.max_steps=7"]
    past = (run / "config-6.yaml").read_text()
    lowprec(*command(corpus, run, *once_more), check=True)
    assert (run / "config-6.yaml").read_text() == past  # the configuration until step 6, not one that was tried since
    (run / "config-mine.yaml").write_text("mine")
    lowprec(*command(corpus, run, "trainer.overwrite_output_dir=true", trainer__max_steps=2), check=True)
    assert [path.name for path in run.glob("config-*.yaml")] == ["config-mine.yaml"]


def test_an_events_file_of_another_origin(tmp_path: Path):
    path = tmp_path / EVENTS
    path.write_text('{"my": 1}\n[2]\n{"step": 5}\n')
    with pytest.raises(UserError, match="holds another run"):
        run_directory.locate("x.yaml", {"output_dir": str(tmp_path)})
    keep_lines_until(path, 4)
    assert path.read_text() == '{"my": 1}\n'


def test_a_file_named_like_a_checkpoint(tmp_path: Path):
    (tmp_path / "checkpoint-5").write_text("mine")
    assert set_aside_torn(tmp_path) == []
    assert checkpoint_files.last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("kind", "field"),
    [("llama", "eos_token_id"), ("llama", "bos_token_id"), ("qwen2", "max_window_layers"), ("deepseek_v3", "first_k_dense_replace")],
)
def test_fields_that_may_be_0(kind: str, field: str, tmp_path: Path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), overrides={field: 0})
    assert getattr(build_config(model, 256), field) == 0


@pytest.mark.parametrize("field", ["n_embd", "hidden_size", "n_layer"])
def test_sizes_may_not_be_0_under_any_name(field: str, tmp_path: Path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model.overrides.{field}: expected a number from 1, got 0"):
        build_config(ModelConfig(path=str(tmp_path), overrides={field: 0}), 256)
