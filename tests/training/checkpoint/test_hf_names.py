"""Mixtures of experts resume exactly, although transformers saves them under other names."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lowprec
from lowprec import LowPrecisionCallback
from lowprec.training.checkpoint import hf_names
from lowprec.training.checkpoint.hf_names import accept_original_names
from tests.builders import losses, prose, small_trainer, tiny_config, tiny_llama
from tests.processes import lowprec as command
from tests.runs import CONFIG, make_corpus, overrides
from tests.runs import losses as run_losses

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PHASES = [{"until": "50%", "recipe": "bf16"}, {"recipe": "mxfp4_aws"}]


def mixtral(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, use_cache=False))


def qwen(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    more = {"num_key_value_heads": 2, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **more, use_cache=False))


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def named(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("model", [mixtral, qwen])
@pytest.mark.parametrize("precision", ["none", "mxfp4_aws", {"recipe": "mxfp4_aws", "schedule": PHASES, "guard": {"snapshot_every": 4}}])
def test_a_resumed_run_is_the_same_run(model: Any, precision: Any, tmp_path: Path):
    settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "data": prose(40)}
    first = small_trainer(tmp_path, LowPrecisionCallback(precision), model=model(), **settings)
    first.train()
    expected = {name: tensor.clone() for name, tensor in named(first.model).items()}
    again = small_trainer(tmp_path, LowPrecisionCallback(precision), model=model(seed=7), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert {step: loss for step, loss in losses(again).items() if step > 5} == {step: losses(first)[step] for step in (6, 7, 8)}
    for trainer in (again, first):  # the second run of the same Trainer resumes
        state = named(trainer.model)
        assert all(torch.equal(value, state[name]) for name, value in expected.items())
        first.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path):
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"load_best_model_at_end": True, "learning_rate": 1.0, "evaluated": prose(8)}
    trainer = small_trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"), model=mixtral(), **settings)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("checkpoint-4")  # at this rate the loss rises
    expected = MixtralForCausalLM.from_pretrained(best).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_has_its_bits_in_its_own_dtype(dtype: torch.dtype, tmp_path: Path):
    model = mixtral().to(dtype)
    model.model.norm.float()
    lowprec.convert(model, "mxfp4_aws")
    for buffer in model.buffers():
        if buffer.dtype == torch.int64:
            buffer[2] = torch.randint(1, 100, ())
    state = saved(model, tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in state
    other = mixtral(seed=1).to(dtype)
    other.model.norm.float()
    lowprec.convert(other, "mxfp4_aws")
    accept_original_names(other)
    draws = torch.get_rng_state()
    result = other.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), draws)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_weights_with_the_models_own_names_or_unknown_ones_are_not_renamed(tmp_path: Path):
    model = mixtral()
    accept_original_names(model)
    own = copy.deepcopy(model.state_dict())
    assert not model.load_state_dict(own).missing_keys
    del own["lm_head.weight"]
    assert model.load_state_dict(own, strict=False).missing_keys == ["lm_head.weight"]
    strange = {"adapter.weight": torch.ones(1)}
    result = model.load_state_dict(strange, strict=False)
    assert result.unexpected_keys == ["adapter.weight"]
    assert set(result.missing_keys) == set(model.state_dict())
    plain: LlamaForCausalLM = tiny_llama()
    accept_original_names(plain)
    assert not plain.load_state_dict(saved(plain, tmp_path)).missing_keys


def test_the_command_trains_and_resumes_a_mixture_from_its_configuration(tmp_path: Path):
    model = tmp_path / "model"
    MixtralConfig(**SIZES | {"vocab_size": 320}, num_key_value_heads=2, num_local_experts=4).save_pretrained(model)
    own = [setting for setting in overrides(make_corpus(tmp_path / "corpus")) if not setting.startswith("model.")]
    arguments = ["train", str(CONFIG), *own, f"model={{path: {model}}}", "precision.recipe=mxfp4_aws", "precision.guard=true"]
    arguments += ["trainer.max_steps=6", "trainer.save_steps=4", "trainer.save_strategy=steps"]
    command(*arguments, f"trainer.output_dir={tmp_path / 'whole'}", check=True)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    command(*arguments, f"trainer.output_dir={tmp_path / 'again'}", "trainer.resume_from_checkpoint=true", check=True)
    first, again = run_losses(tmp_path / "whole"), run_losses(tmp_path / "again")
    assert again == {step: first[step] for step in (5, 6)}
    layers = json.loads((tmp_path / "again" / "plan.json").read_text())["layers"]
    assert {layer["experts"] for layer in layers if "experts" in layer["name"] and layer["converted"]} == {4}


class OwnModel(PreTrainedModel):
    """A user's own model, with a buffer that is not saved."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(64, 64)
        self.middle = nn.Linear(64, 64)
        self.register_buffer("scale", torch.ones(64), persistent=False)
        self.head = nn.Linear(64, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        logits = self.head(self.middle(self.embed(input_ids) * self.scale))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("kind", ["own", "llama"])
def test_a_resumed_run_with_another_recipe_builds_no_second_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def model() -> Any:
        return OwnModel(tiny_config()) if kind == "own" else tiny_llama()

    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    small_trainer(tmp_path, LowPrecisionCallback("fp8_delayed"), model=model(), **settings).train()
    built = []
    monkeypatch.setattr(hf_names, "_build", lambda *given: built.append(given))
    for recipe in ("mxfp8", "mxfp4_aws"):
        again = small_trainer(tmp_path / "again", LowPrecisionCallback(recipe), model=model(), **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert again.state.global_step == 4
    assert not built


def test_a_users_own_model_has_no_other_names():
    model = OwnModel(tiny_config())
    accept_original_names(model)
    state = model.state_dict()
    state["center.weight"] = state.pop("middle.weight")
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["middle.weight"]
    assert result.unexpected_keys == ["center.weight"]
