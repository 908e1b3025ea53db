"""Values that no run can have: each is refused by one line, by `plan` and by `train`, before anything is written."""

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, TrainingArguments

from lowprec.errors import UserError
from lowprec.training.run import directory, model_checks
from lowprec.training.run.model_checks import build_skeleton, check_memory
from lowprec.training.run.models import ModelConfig, build_config
from lowprec.training.run.training_args import check_trainer
from tests.runs import CONFIG, SMALL, make_corpus

Refused = Callable[..., str]

HINTS = typing.get_type_hints(TrainingArguments)
NUMBERS = [
    field.name for field in dataclasses.fields(TrainingArguments) if {int, float} & {HINTS[field.name], *typing.get_args(HINTS[field.name])}
]
"""Fields that hold a number, in any version of transformers."""


@pytest.mark.parametrize("value", [math.nan, -math.inf, -2, -0.5, "nan", True, 2**63, 1e300])
def test_every_number_has_a_range(value: Any):
    for name in NUMBERS:
        with pytest.raises(UserError, match=rf"^trainer\.{name}: [^\n]+$"):
            check_trainer({name: value})


def test_infinity_means_that_nothing_is_clipped():
    assert check_trainer({"max_grad_norm": math.inf}) == {"max_grad_norm": math.inf}
    for name in set(NUMBERS) - {"max_grad_norm"}:
        with pytest.raises(UserError, match=rf"^trainer\.{name}: "):
            check_trainer({name: math.inf})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("seed", 2**32, "a number from 0 to 4.29497e+09"),
        ("adam_beta2", 1.0, "a number from 0 below 1, got 1.0"),
        ("adam_epsilon", 0.0, "a number from 1.2e-38, got 0.0"),
        ("adam_epsilon", 5e-324, "a number from 1.2e-38, got 5e-324"),
        ("label_smoothing_factor", 1.5, "a number from 0 to 1"),
        ("save_steps", 2.5, "a whole number of steps, or a share of all steps below 1, got 2.5"),
        ("max_steps", -7, "a number from 1 or -1, got -7"),
        ("dataloader_num_workers", 10**6, "a number from 0 to 1024"),
        ("ddp_timeout", 10**14, "a number from 1 to 1e+09"),
        ("num_train_epochs", 1e30, "a number above 0 to 1e+09"),
        ("log_level", "loud", "unknown value 'loud'; known: critical, debug"),
        ("lr_scheduler_type", "cosin", "unknown value 'cosin'; did you mean 'cosine'?"),
        ("optim", "adamw_toch", "unknown value 'adamw_toch'; did you mean 'adamw_torch'?"),
        ("eval_strategy", "step", "unknown value 'step'; did you mean 'steps'?"),
        ("debug", "underflow", "unknown value 'underflow'"),
        ("train_sampling_strategy", "by_length", "did you mean 'group_by_length'?"),
        ("include_for_metrics", ["input"], "unknown value 'input'; did you mean 'inputs'?"),
        ("lr_scheduler_kwargs", {"power": math.nan}, "expected a finite number, got nan"),
        ("output_dir", "", "expected a path, got ''"),
        ("output_dir", "x" * 300, "the path is too long"),
        ("output_dir", "a\0b", "text can't hold a NUL character"),
        ("resume_from_checkpoint", "a/" * 3000, "the path is too long"),
    ],
)
def test_settings_of_the_trainer(name: str, value: Any, expected: str):
    with pytest.raises(UserError) as error:
        check_trainer({name: value})
    assert str(error.value).startswith(f"trainer.{name}: ")
    assert expected in str(error.value)


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"head_dim": 3}, "model: its forward pass fails (LlamaConfig): "),
        ({"num_key_value_heads": 3}, "model: 4 attention heads (num_attention_heads) can't share 3 key and value heads"),
        ({"num_attention_heads": 3}, "model: The hidden size (64) is not a multiple of the number of attention heads (3)"),
        ({"num_hidden_layers": 10**6}, "at most 4096 layers"),
        ({"hidden_size": 2**31}, "model.overrides.hidden_size: expected a number of at most 2147483647"),
        ({"hidden_size": True}, "model.overrides.hidden_size: expected a number from 1, got true"),
        ({"vocab_size": None}, "model.overrides.vocab_size: "),
        ({"vocab_size": 10}, "model: its vocabulary of 10 is smaller than the tokenizer's 257"),
        ({"hidden_act": "silou"}, "model.overrides.hidden_act: unknown activation 'silou'; did you mean 'silu'?"),
        ({"attention_dropout": 2.0}, "model: its forward pass fails (LlamaConfig): "),
        ({"initializer_range": -1.0}, "model: the model can't be built (LlamaConfig): normal expects std >= 0.0"),
        ({"initializer_range": math.nan}, "model.overrides.initializer_range: expected a finite number, got nan"),
        ({"rms_norm_eps": -1e3}, "model: the loss of a first forward pass is nan (LlamaConfig)"),
        ({"rope_parameters": {"rope_type": "linaer"}}, "model: rope_parameters.rope_type: unknown type 'linaer'; did you mean 'linear'?"),
        ({"rope_parameters": {"rope_theta": 0}}, "model: rope_parameters.rope_theta: expected a number above 0, got 0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"rope_parameters": None}, "model: the model can't be built (LlamaConfig): "),
        ({"pad_token_id": 10**6}, "model: the model can't be built (LlamaConfig): Padding_idx"),
        ({"return_dict": False}, "model: its forward pass fails (LlamaConfig): AttributeError"),
        ({"dtype": "float3"}, "model.overrides.dtype: can't be changed here: weights are fp32"),
        ({"output_attentions": True}, "model: its configuration can't be saved (LlamaConfig): "),
        ({"to_dict": 1}, "model.overrides.to_dict: LlamaConfig has no such field"),
        ({"_attn_implementation": "eager"}, "model.overrides._attn_implementation: LlamaConfig has no such field"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_fields_of_a_model(fields: dict[str, Any], expected: str):
    model = ModelConfig(preset="llama-tiny", overrides=SIZES | fields)
    with pytest.raises(UserError) as error:
        build_skeleton(model, build_config(model, 257), 16)
    assert str(error.value).startswith("model")
    assert expected in str(error.value)


@pytest.mark.parametrize("mask", ["causal", "causal & document", "causal & sliding_window(3)"])
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("gpt2", {"n_embd": 64, "n_layer": 1, "n_head": 2}),
        ("qwen2", SIZES),
        ("mixtral", SIZES | {"num_local_experts": 2}),
        ("gpt_neox", {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_right_models_pass(kind: str, fields: dict[str, Any], mask: str, tmp_path: Path):
    AutoConfig.for_model(kind, **fields, vocab_size=512).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    assert next(build_skeleton(model, build_config(model, 257), 16, mask).parameters()).is_meta


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.filterwarnings("ignore")
def test_large_models_are_tried_without_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_checks, "_SMALL", 0)
    AutoConfig.for_model(kind, **SIZES, vocab_size=512).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    assert next(build_skeleton(model, build_config(model, 257), 16).parameters()).is_meta
    if kind == "llama":
        model = ModelConfig(path=str(tmp_path), overrides={"attention_dropout": 0.1})
        build_skeleton(model, build_config(model, 257), 16, "causal & document")  # a CPU computes it
        model = ModelConfig(path=str(tmp_path), overrides={"head_dim": 3})
        with pytest.raises(UserError, match="its forward pass fails"):
            build_skeleton(model, build_config(model, 257), 16)


def test_weights_larger_than_the_memory():
    model = ModelConfig(preset="llama-tiny", overrides={"hidden_size": 2**30})
    with pytest.raises(UserError, match=r"^model: 8\.94e\+12 parameters are 33,\d+\.\d GiB in fp32, and this machine has "):
        check_memory(build_skeleton(model, build_config(model, 257), 16))


@pytest.mark.parametrize(
    "override, message",
    [
        ("trainer.learning_rate=.nan", "trainer.learning_rate: expected a number from 0, got nan"),
        ("trainer.seed=-1", "trainer.seed: expected a number from 0, got -1"),
        ("trainer.save_steps=.inf", "trainer.save_steps: expected a whole number of steps"),
        ("trainer.dataloader_persistent_workers=true", "persistent_workers option needs num_workers > 0"),
        ("trainer.dataloader_prefetch_factor=3", "trainer: --dataloader_prefetch_factor can only be set"),
        ("trainer.lr_scheduler_kwargs={a: 1}", "trainer.lr_scheduler_kwargs: cosine: "),
        ("trainer.accelerator_config=none.json", "trainer: "),
        ("trainer.report_to=tensorbord", "trainer: "),
        ("trainer.metric_for_best_model=f1", "trainer.metric_for_best_model: an evaluation of a run gives 'loss', not 'f1'"),
        ("trainer.save_strategy=best", "trainer.metric_for_best_model: save_strategy: best needs it"),
        ("trainer.torch_compile_backend=inducto", "unknown backend 'inducto'; did you mean 'inductor'?"),
        ("trainer.parallelism_config={tp_size: 2}", "trainer.parallelism_config: a run is spread by DDP or FSDP2"),
        ("trainer.deepspeed=x.json", "trainer.deepspeed: low precision needs one process, DDP or FSDP2"),
        ("trainer.push_to_hub=true", "trainer.push_to_hub: the hub can't be used: "),
        ("trainer.output_dir=/dev/null/x", "trainer.output_dir: "),
        ("data.seq_len=1", "data.seq_len: input should be greater than or equal to 2, got 1"),
        ("precision.guard.loss_ratio=.nan", "precision.guard.loss_ratio: "),
        ("precision.schedule=[{until: 999e9 steps}]", "precision.schedule.0.until: expected a share"),
        ("attention.mask=" + "~" * 300 + "causal", "attention.mask: more than 100 operators"),
        ("precision.rules=[{modules: '((((((((((a{99999999999}', recipe: bf16}]", "is not a regular expression"),
        ("model..preset=a", "an override is written key=value"),
        ("model.preset.x=1", "'preset' is not a section, it holds 'llama-tiny'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_commands_refuse_before_they_write(override: str, message: str, tmp_path: Path, refused: Refused):
    corpus = make_corpus(tmp_path / "corpus", 4)
    given = [*SMALL, f"data.source={corpus}", f"data.cache_dir={tmp_path}/cache", "trainer.max_steps=1"]
    if "metric" in override:
        given += ["trainer.load_best_model_at_end=true", "trainer.eval_strategy=steps", "trainer.save_strategy=steps"]
    # The directory and the hub are looked at when a run begins.
    commands = ["train"] if "output_dir" in override or "hub" in override else ["plan", "train"]
    for command in commands:
        assert message in refused(command, str(CONFIG), *given, override)
        assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_override_changes_one_place_of_an_aliased_section(tmp_path: Path):
    from lowprec.training.run.config import read_settings

    (tmp_path / "a.yaml").write_text("a: &x {v: 1}\nb: *x\n")
    assert read_settings(tmp_path / "a.yaml", ["a.v=2"]) == {"a": {"v": 2}, "b": {"v": 1}}


def test_a_directory_behind_a_link_to_itself(tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "run"):
        for setting in ("output_dir", "resume_from_checkpoint"):
            with pytest.raises(UserError, match=rf"^trainer\.{setting}: \S+ can't be used: a link leads to itself"):
                directory.prepare("x.yaml", {setting: str(path)})
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_home_directory_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_trainer({"output_dir": "~/run"}) == {"output_dir": f"{tmp_path}/run"}
    assert ModelConfig(path="~/model").path == f"{tmp_path}/model"


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"model_type": "llama", "num_hidden_layers": -3, "vocab_size": 300}', "model: num_hidden_layers is -3; expected a number from 1"),
        ('{"model_type": "llama", "vocab_size": NaN}', "holds no model configuration: Field 'vocab_size' expected int"),
        ('{"model_type": "vit"}', "model: ViTConfig has no vocab_size: it is no language model's"),
        ('{"a":' * 3000, "holds no model configuration: "),
        ("[]", "holds no model configuration: "),
        ("{", "holds no model configuration: "),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_configurations_of_models_in_files(tmp_path: Path, text: str, message: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^model[^\n]+$") as error:
        build_config(ModelConfig(path=str(tmp_path)), 257)
    assert message in str(error.value)
    with pytest.raises(UserError, match="neither a file nor a folder: /dev/null"):
        build_config(ModelConfig(path="/dev/null"), 257)
