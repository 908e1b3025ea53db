"""LowPrecisionCallback in an ordinary transformers.Trainer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, set_seed

from lowprec import LowPrecisionCallback, UserError
from lowprec.nn import LowPrecisionLinear
from lowprec.training.optim.loss_scaling import LossScaleError
from tests.builders import losses, small_trainer, tiny_llama


def _trainer(folder: Path, *callbacks: LowPrecisionCallback, **arguments: object) -> Trainer:
    settings = {"learning_rate": 1e-2, "save_strategy": "steps", **arguments}
    return small_trainer(folder, *callbacks, model=tiny_llama(use_cache=True), **settings)


def _converted(trainer: Trainer) -> list[str]:
    return [name for name, module in trainer.model.named_modules() if isinstance(module, LowPrecisionLinear)]


def test_the_model_is_converted_when_the_trainer_is_built(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="lowprec"):
        trainer = _trainer(tmp_path, LowPrecisionCallback({"recipe": "mxfp8", "rules": [{"modules": r".*\.o_proj", "recipe": "bf16"}]}))
    assert len(_converted(trainer)) == 14
    assert trainer.optimizer is None  # no optimizer holds the parameters yet
    assert "mxfp8 x 12, bf16 x 2" in caplog.text
    assert not (tmp_path / "plan.json").exists()


def test_training_writes_the_plan_and_learns(tmp_path: Path):
    trainer = _trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"))
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 1
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [layer["name"] for layer in plan["layers"] if layer["converted"]] == _converted(trainer)
    assert plan["totals"]["emulated"] == 14
    assert not any("loss_scale" in record for record in trainer.state.log_history)  # there is no scaler on a CPU


def test_a_recipe_changes_the_training_and_fp32_does_not(tmp_path: Path):
    def losses(*callbacks: LowPrecisionCallback) -> list[float]:
        trainer = _trainer(tmp_path, *callbacks, max_steps=3)
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    plain = losses()
    assert losses(LowPrecisionCallback("fp32")) == pytest.approx(plain, rel=1e-6)
    low = losses(LowPrecisionCallback("mxfp4"))
    assert low != pytest.approx(plain, rel=1e-6)
    assert low == pytest.approx(plain, rel=0.05)


def test_a_checkpoint_loads_into_an_unconverted_model(tmp_path: Path):
    trainer = _trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"), max_steps=2)
    trainer.train()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert not any(isinstance(module, LowPrecisionLinear) for module in loaded.modules())
    trained = trainer.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in loaded.state_dict().items())


def test_the_loss_scale_of_the_wrapped_optimizer_is_set_and_logged(tmp_path: Path):
    """Accelerate's optimizer has the attribute `scaler`, None without fp16."""
    trainer = _trainer(tmp_path, LowPrecisionCallback({"recipe": "fp16", "loss_scaling": {"init_scale": 1024, "growth_interval": 7}}))
    (callback,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LowPrecisionCallback)]
    trainer.create_optimizer()

    class Optimizer:
        scaler = torch.amp.GradScaler("cpu")
        optimizer = trainer.optimizer

    state, logs = trainer.state, {"loss": 1.0}
    state.max_steps, state.log_history = 4, [{"loss": 1.0, "step": 1}]
    callback.on_train_begin(trainer.args, state, trainer.control, model=trainer.model, optimizer=Optimizer)
    Optimizer.scaler.scale(torch.ones(1))  # the scale is made when it is first used
    for scale, skipped in ((1024.0, 0), (512.0, 1), (1024.0, 1), (1024.0, 1), (256.0, 2)):
        callback.on_step_begin(trainer.args, state, trainer.control, optimizer=Optimizer)
        Optimizer.scaler.update(scale)
        callback.on_step_end(trainer.args, state, trainer.control, optimizer=Optimizer)
        callback.on_log(trainer.args, state, trainer.control, logs=logs)
        assert logs["loss_scale"] == state.log_history[-1]["loss_scale"] == scale
        assert logs["skipped_steps"] == skipped
    assert Optimizer.scaler.get_growth_interval() == 7
    Optimizer.scaler.update(0.5)
    with pytest.raises(LossScaleError, match=r"the loss scale fell to 0\.5, below its floor 1, at optimizer step 0 \(3 steps skipped\)"):
        callback.on_step_end(trainer.args, state, trainer.control, optimizer=Optimizer)


def test_fp16_weights_can_not_be_scaled(tmp_path: Path):
    trainer = _trainer(tmp_path)
    trainer.args.fp16 = True
    with pytest.raises(
        UserError, match=r"fp16 training: parameter 'model\.embed_tokens\.weight' is float16 already; load the model in float32"
    ):
        LowPrecisionCallback("fp16").on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model.half())


def test_fp16_on_a_cpu_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"trainer\.fp16: .* needs CUDA; on a CPU use precision\.recipe=fp16"):
        _trainer(tmp_path, LowPrecisionCallback("fp8_blockwise"), fp16=True)


def test_evaluation_may_have_a_recipe_of_its_own(tmp_path: Path):
    def evaluated(precision: object) -> tuple[float, float]:
        trainer = _trainer(tmp_path, LowPrecisionCallback(precision), max_steps=3)
        trainer.train()
        loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        training = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        return training[-1], loss

    low, own = evaluated("mxfp4"), evaluated({"recipe": "mxfp4", "evaluation": "fp32"})
    assert own[0] == low[0]
    assert own[1] != low[1]
    trainer = _trainer(tmp_path, max_steps=3)
    trained = _trainer(tmp_path, LowPrecisionCallback({"recipe": "mxfp4", "evaluation": "fp32"}), max_steps=3)
    trained.train()
    trainer.model.load_state_dict(trained.model.state_dict())
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(own[1], rel=1e-6)


def test_wrong_precision_fails_where_the_callback_is_made():
    with pytest.raises(UserError, match="did you mean 'fp8_blockwise'"):
        LowPrecisionCallback("fp8_blokwise")


def test_a_rule_that_matches_nothing_fails_before_training(tmp_path: Path):
    with pytest.raises(UserError, match="matches none of the 15 linear layers"):
        _trainer(tmp_path, LowPrecisionCallback({"rules": [{"modules": "encoder.*", "recipe": "bf16"}]}))


@pytest.mark.parametrize("recipe", ["mxfp4_aws", "fp8_delayed"])
def test_a_finished_model_is_saved_without_recipe_state_and_a_checkpoint_with_it(recipe: str, tmp_path: Path):
    trainer = small_trainer(tmp_path, LowPrecisionCallback(recipe), max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    plain = set(tiny_llama().state_dict())
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == plain
    assert set(load_file(tmp_path / "checkpoint-4" / "model.safetensors")) > plain
    expected = {step: loss for step, loss in losses(trainer).items() if step > 2}
    kept = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    set_seed(trainer.args.seed)  # the data's order comes from it, and tiny_llama() has drawn from the same generator
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # the same Trainer once more
    assert {step: loss for step, loss in losses(trainer).items() if step > 2} == expected
    assert all(torch.equal(buffer, kept[name]) for name, buffer in trainer.model.named_buffers())
