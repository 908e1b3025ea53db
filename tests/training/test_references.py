"""A model that the trained one is compared with has its precision: DPO's first loss is ln 2, GRPO's first KL is 0."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from lowprec import LowPrecisionCallback, UserError, convert
from lowprec.conversion.discover import recipes_of
from lowprec.training.accelerate import controller, prepare
from lowprec.training.control.references import References
from tests.builders import small_trainer, tiny_llama
from tests.training.checkpoint.test_trl_peft import LORA, SETTINGS, llama, tokenizer

LN_2 = torch.tensor(2.0).log().item()
PAIRS = Dataset.from_list([{"prompt": f"{number}: the", "chosen": " quick brown fox", "rejected": " lazy dog"} for number in range(8)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    llama().save_pretrained(folder)
    return folder


def dpo(
    saved: str, folder: Path, precision: Any, *, lora: Any = None, ref_model: Any = None, given: Any = (), **settings: Any
) -> DPOTrainer:
    args = DPOConfig(output_dir=str(folder), **{**SETTINGS, "max_steps": 2, **settings})
    return DPOTrainer(
        LlamaForCausalLM.from_pretrained(saved),
        ref_model=ref_model,
        args=args,
        train_dataset=PAIRS,
        eval_dataset=PAIRS.select(range(4)),
        processing_class=tokenizer(),
        callbacks=[LowPrecisionCallback(precision, references=given)],
        peft_config=lora,
    )


def logged(trainer: Trainer, key: str = "loss") -> list[float]:
    trainer.train()
    return [record[key] for record in trainer.state.log_history if key in record]


@pytest.mark.parametrize(
    "recipe, lora", [("mxfp4_aws", None), ("fp8_delayed", None), ("fp8_delayed", LORA)], ids=["aws", "delayed", "lora"]
)
def test_the_first_loss_is_that_of_equal_models(recipe: str, lora: Any, saved: str, tmp_path: Path):
    first, second = logged(dpo(saved, tmp_path, recipe, lora=lora))
    assert first == LN_2
    assert second != LN_2


def test_the_reference_follows_phases_and_evaluation(saved: str, tmp_path: Path):
    """With a learning rate of 0 both models stay the same."""
    precision = {"recipe": "mxfp4", "evaluation": "fp8_blockwise", "schedule": [{"until": "1 step", "recipe": "bf16"}, {}]}
    trainer: Any = dpo(saved, tmp_path, precision, learning_rate=0.0, eval_strategy="steps", eval_steps=1)
    assert logged(trainer) == [LN_2, LN_2]
    evaluated = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert evaluated == [LN_2, LN_2]
    assert recipes_of(trainer.ref_model) == recipes_of(trainer.model)
    assert not trainer.ref_model.training
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_log_probabilities_that_are_computed_before(saved: str, tmp_path: Path):
    """TRL keeps them on disk by the weights, so those of another precision must not be taken."""
    early = {"precompute_ref_log_probs": True}
    assert logged(dpo(saved, tmp_path / "1", "fp8_blockwise", **early))[0] == LN_2
    assert logged(dpo(saved, tmp_path / "2", "mxfp4", **early))[0] == LN_2
    with pytest.raises(UserError, match=r"ref_model.*computed before it could be converted.*references=\[model\]"):
        dpo(saved, tmp_path / "3", "mxfp4", ref_model=LlamaForCausalLM.from_pretrained(saved), **early).train()
    own = LlamaForCausalLM.from_pretrained(saved)
    assert logged(dpo(saved, tmp_path / "4", "mxfp4", ref_model=own, given=[own], **early))[0] == LN_2
    with pytest.raises(UserError, match=r"leave precision\.evaluation out"):
        dpo(saved, tmp_path / "5", {"recipe": "mxfp4", "evaluation": "bf16"}, **early)


def test_a_copy_of_the_converted_model(saved: str, tmp_path: Path):
    own = LlamaForCausalLM.from_pretrained(saved)
    convert(own, "mxfp4")
    assert logged(dpo(saved, tmp_path, "mxfp4", ref_model=copy.deepcopy(own)))[0] == LN_2


def test_the_first_divergence_of_grpo_and_kto_is_zero(saved: str, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(saved)
    own = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}
    grpo = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        args=GRPOConfig(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 2, **own}),
        train_dataset=PAIRS.select_columns(["prompt"]),
        processing_class=tokenizer(),
        callbacks=[LowPrecisionCallback("mxfp4")],
    )
    first, second = logged(grpo, "kl")
    assert first == 0
    assert second != 0
    rows = [{"prompt": f"{number}: the", "completion": " quick brown fox", "label": bool(number % 2)} for number in range(8)]
    kto = KTOTrainer(
        LlamaForCausalLM.from_pretrained(saved),
        args=KTOConfig(output_dir=str(tmp_path), **{**SETTINGS, "max_steps": 2}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[LowPrecisionCallback("mxfp4")],
    )
    assert logged(kto, "rewards/chosen")[0] == 0


def test_what_is_a_reference(tmp_path: Path):
    trainer: Any = small_trainer(tmp_path, callback := LowPrecisionCallback("mxfp4"), max_steps=1)
    trainer.teacher_model = tiny_llama(hidden_size=32)
    trainer.copies = [tiny_llama(seed=1), "no model"]
    trainer.same = trainer.model
    trainer.trained = tiny_llama(seed=2)
    trainer.create_optimizer()
    trainer.optimizer.add_param_group({"params": list(trainer.trained.parameters())})
    trainer.train()
    assert [bool(recipes_of(model)) for model in (trainer.teacher_model, trainer.copies[0], trainer.trained)] == [False, True, False]
    assert trainer.same.training
    assert callback.controller.plan is not None


def test_a_loop_of_ones_own_names_its_reference():
    reference, model = tiny_llama(), tiny_llama()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    precision = {"recipe": "mxfp4", "schedule": [{"until": "1 step", "recipe": "bf16"}, {}]}
    model, optimizer = prepare(accelerator, model, optimizer, precision=precision, references=[reference])
    ids = torch.arange(32)[None]
    for _ in range(2):
        assert recipes_of(reference) == recipes_of(model)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert controller(accelerator).phase == 1
    assert recipes_of(reference) == recipes_of(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_sharded_reference_or_model_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"references: expected models \(nn\.Module\), got str"):
        LowPrecisionCallback("mxfp4", references=["model"])  # pyright: ignore[reportArgumentType]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer: Any = small_trainer(tmp_path, callback := LowPrecisionCallback("mxfp4"), max_steps=1)
        trainer.ref_model = tiny_llama()
        fully_shard(trainer.ref_model)
        with pytest.raises(UserError, match=r"ref_model, .*: it is sharded already, .*references=\[model\]"):
            References(callback.controller, ()).find(trainer, trainer.model)
        late: Any = small_trainer(tmp_path, max_steps=1)
        fully_shard(late.model)
        late.add_callback(LowPrecisionCallback("mxfp4"))
        late.callback_handler.model = late.model
        with pytest.raises(UserError, match=r"the model is sharded already, .*callbacks=\[LowPrecisionCallback"):
            late.callback_handler.on_train_begin(late.args, late.state, late.control)
    finally:
        dist.destroy_process_group()
