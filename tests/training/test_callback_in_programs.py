"""The callback in programs that do more than train once: several runs, other loops, late models, a loss outside of the model."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed
from transformers.training_args import ParallelMode

import lowprec
from lowprec import LowPrecisionCallback, UserError
from lowprec.conversion.discover import recipes_of
from lowprec.distributed.processes import use_one_gpu
from lowprec.observe import LayerProbe
from lowprec.recipe.state import is_state
from lowprec.training.control import recovery
from lowprec.training.control.controller import PrecisionController
from tests.builders import losses, prose, small_trainer, tiny_llama
from tests.training.control.test_guard_in_training import GUARD, NaNGradient

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"),
]


def test_two_callbacks_in_one_trainer(tmp_path: Path):
    with pytest.raises(UserError, match="this Trainer has two LowPrecisionCallbacks"):
        small_trainer(tmp_path, LowPrecisionCallback("mxfp8"), LowPrecisionCallback("mxfp4"))


def test_one_callback_twice_in_one_trainer(tmp_path: Path):
    callback = LowPrecisionCallback("mxfp8")
    with pytest.raises(UserError, match="this Trainer has the same LowPrecisionCallback twice"):
        small_trainer(tmp_path, callback, callback)
    trainer = small_trainer(tmp_path, callback)
    trainer.add_callback(callback)
    with pytest.raises(UserError, match="this Trainer has the same LowPrecisionCallback twice"):
        trainer.train()


def test_a_class_is_no_callback_with_a_precision(tmp_path: Path):
    with pytest.raises(UserError, match=r'Give the Trainer an instance, such as callbacks=\[LowPrecisionCallback\("fp8_blockwise"\)\]'):
        Trainer(tiny_llama(), small_trainer(tmp_path).args, callbacks=[LowPrecisionCallback])


@pytest.mark.parametrize("settings", [{}, {"torch_compile": True, "torch_compile_backend": "eager"}], ids=["eager", "compiled"])
def test_a_callback_that_is_added_later(settings: dict[str, Any], tmp_path: Path):
    """The model is converted when training begins, and trains as if the callback had been there from the start."""
    model = tiny_llama()
    late = small_trainer(tmp_path / "late", model=model, max_steps=3, **settings)
    late.add_callback(LowPrecisionCallback("mxfp4_aws"))
    late.train()
    early = small_trainer(tmp_path / "early", LowPrecisionCallback("mxfp4_aws"), max_steps=3, **settings)
    early.train()
    assert losses(late) == losses(early)
    assert len(recipes_of(model)) == 14
    assert (tmp_path / "late" / "plan.json").read_text() == (tmp_path / "early" / "plan.json").read_text()


def test_a_callback_that_is_added_later_to_a_run_that_resumes(tmp_path: Path):
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    for recipe in ("fp8_blockwise", "fp8_delayed"):
        small_trainer(tmp_path, LowPrecisionCallback(recipe), **saves).train()
        late = small_trainer(tmp_path, **saves)
        late.add_callback(LowPrecisionCallback(recipe))
        if recipe == "fp8_blockwise":
            late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            continue
        with pytest.raises(UserError, match=r"without recipe state; give the callback to the Trainer when it is made: callbacks=\["):
            late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_callback_that_takes_the_place_of_another(tmp_path: Path):
    trainer = small_trainer(tmp_path, LowPrecisionCallback("mxfp8"), max_steps=1)
    trainer.add_callback(LowPrecisionCallback("mxfp4"))
    with pytest.raises(UserError, match=r"two LowPrecisionCallbacks.*trainer\.remove_callback\(LowPrecisionCallback\)"):
        trainer.train()
    trainer.remove_callback(LowPrecisionCallback)
    trainer.train()
    assert {recipe.name for recipe in recipes_of(trainer.model).values()} == {"mxfp4"}


def test_a_model_that_takes_the_place_of_another(tmp_path: Path):
    callback = LowPrecisionCallback("mxfp4_aws")
    trainer = small_trainer(tmp_path / "1", callback, max_steps=2)
    trainer.model = trainer.model_wrapped = tiny_llama(seed=1)
    set_seed(trainer.args.seed)  # as the Trainer did when it was made
    trainer.train()
    assert len(recipes_of(trainer.model)) == 14
    other = small_trainer(tmp_path / "2", callback, model=tiny_llama(seed=1), max_steps=2)
    other.train()
    assert losses(other) == losses(trainer)


def test_two_trainers_that_share_a_callback_by_turns(tmp_path: Path):
    """Recipes with state resume, too: the callback converted both models before they loaded a checkpoint."""
    callback = LowPrecisionCallback("fp8_delayed")
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    first, second = (small_trainer(tmp_path / name, callback, **saves) for name in "ab")
    first.train()
    second.train()
    expected = losses(first)
    set_seed(first.args.seed)
    first.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(second) == expected == losses(first)


def test_compiled_code_is_seen_or_said_not_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    seen, declared = LowPrecisionCallback("mxfp8"), LowPrecisionCallback("mxfp8", compiled=True)
    trainer = small_trainer(tmp_path, seen, max_steps=1)
    assert not seen.controller.compiled
    trainer.model.model.layers[0].compile(backend="eager")
    trainer.train()
    assert seen.controller.compiled
    assert "compiled=True" not in caplog.text
    small_trainer(tmp_path, declared, max_steps=1).train()
    assert "compiled=True was declared, but no module of the model is compiled" in caplog.text


def test_several_gpus_in_one_process(tmp_path: Path):
    """The Trainer would use nn.DataParallel; `lowprec train` uses one GPU."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2  # as on a machine with two
    assert args.parallel_mode is ParallelMode.NOT_DISTRIBUTED
    with pytest.raises(UserError, match=r"2 GPUs.*nn\.DataParallel.*CUDA_VISIBLE_DEVICES=0"):
        Trainer(tiny_llama(), args, callbacks=[LowPrecisionCallback("mxfp8")])
    assert use_one_gpu(args) == 2
    assert args.parallel_mode is ParallelMode.NOT_PARALLEL
    Trainer(tiny_llama(), args, callbacks=[LowPrecisionCallback("mxfp8")])


def test_one_callback_in_two_trainers_one_after_the_other(tmp_path: Path):
    model = tiny_llama()
    callback = LowPrecisionCallback({"recipe": "mxfp4", "guard": GUARD})
    small_trainer(tmp_path / "1", callback, NaNGradient(model, 15), model=model, max_steps=18).train()
    assert callback.controller.raised
    assert not callback.controller.recovery.snapshots.steps  # their memory is free
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    plain = small_trainer(tmp_path / "2", **saves)
    plain.train()
    second = small_trainer(tmp_path / "2", callback, **saves)
    second.train(resume_from_checkpoint=str(tmp_path / "2" / "checkpoint-2"))  # a checkpoint without the controller's state
    assert not callback.controller.raised
    assert callback.controller.recoveries == 0


def test_a_finished_model_loads_its_own_state_dict(tmp_path: Path):
    trainer = small_trainer(tmp_path, LowPrecisionCallback("fp8_delayed"), max_steps=2)
    trainer.train()
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert not any(map(is_state, state))
    kept = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    trainer.model.load_state_dict(state)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in trainer.model.named_buffers())


def test_a_finished_model_that_trains_again_is_saved_with_its_state(tmp_path: Path):
    """It is trained in a Trainer without the callback, and in a loop of the user's own."""
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = small_trainer(tmp_path / "1", LowPrecisionCallback("fp8_delayed"), **saves)
    trainer.train()
    model = trainer.model
    assert not any(map(is_state, model.state_dict()))
    small_trainer(tmp_path / "2", model=model, **saves).train()
    saved = load_file(tmp_path / "2" / "checkpoint-2" / "model.safetensors")
    fresh = tiny_llama(seed=7)
    lowprec.convert(fresh, "fp8_delayed")
    fresh.load_state_dict(saved)
    kept = dict(model.named_buffers())
    assert all(torch.equal(buffer, kept[name]) for name, buffer in fresh.named_buffers())

    trainer.train()
    model.eval()
    model(input_ids=torch.arange(32)[None])
    assert not any(map(is_state, model.state_dict()))
    lowprec.convert(model, "fp8_delayed")
    fresh.load_state_dict(model.state_dict())


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_delayed"])
def test_a_model_that_model_init_makes(recipe: str, tmp_path: Path):
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def trainer() -> Trainer:
        made = small_trainer(tmp_path, **saves)
        return Trainer(None, made.args, model_init=lambda: tiny_llama(), train_dataset=prose(20), callbacks=[LowPrecisionCallback(recipe)])

    first = trainer()
    first.train()
    assert not any(map(is_state, first.model.state_dict()))
    again = trainer()
    if recipe == "fp8_delayed":
        with pytest.raises(UserError, match="give the Trainer a model instead"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    else:
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert losses(again)[4] == losses(first)[4]


def test_a_model_that_returns_no_loss_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="lowprec"):
        callback = LowPrecisionCallback({"recipe": "mxfp8", "guard": GUARD})
        small_trainer(tmp_path, callback, max_steps=3, label_smoothing_factor=0.1).train()
    told = [record.message for record in caplog.records if "returns no loss" in record.message]
    assert len(told) == 1


def test_a_probe_that_is_not_read_is_taken_away(monkeypatch: pytest.MonkeyPatch):
    """The probe's hooks and its setting of the compiler are removed."""
    model = tiny_llama()
    controller = PrecisionController({"recipe": "mxfp8", "probe_every": 2})
    controller.convert(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    def stance() -> str:
        return torch._dynamo.eval_frame._stance.stance

    before = stance(), hooks()
    controller.start(model, optimizer, total_steps=4)
    controller.before_step(0)
    assert (stance(), hooks()) != before
    controller.start(model, optimizer, step=1, total_steps=4)  # as in a loop that loads a checkpoint
    assert (stance(), hooks()) == before
    controller.before_step(2)
    controller.stop()
    assert (stance(), hooks()) == before
    controller.start(model, optimizer, step=3, total_steps=4)
    controller.before_step(4)  # the run is over
    assert (stance(), hooks()) == before


def test_one_snapshot_at_least_has_settled():
    model = tiny_llama()
    controller = PrecisionController({"recipe": "mxfp8", "guard": {**GUARD, "snapshot_every": 1}})
    controller.convert(model)
    optimizer = torch.optim.AdamW(model.parameters())
    controller.start(model, optimizer, total_steps=100)
    for step in range(1, 20):
        controller.before_step(step - 1)
        controller.after_step(step)
        if step % 2:
            controller.saved(step)
        steps = controller.recovery.snapshots.steps
        assert step < 2 or steps[0] <= step + 1 - 3  # if the next one is a breach
        assert len(steps) <= 2
        assert steps[-1] >= step - 4


def test_quantisation_errors_are_in_the_state():
    controller = PrecisionController({"recipe": "mxfp8", "guard": True})
    controller.recovery.sqnr = {"a": 12.5}
    other = PrecisionController({"recipe": "mxfp8", "guard": True})
    other.load_state_dict(controller.state_dict())
    assert other.recovery.sqnr == {"a": 12.5}
    other.forget()
    assert other.recovery.sqnr is None
    old = controller.state_dict()
    del old["sqnr"]
    other.load_state_dict(old)  # an older checkpoint


def test_ranks_that_measured_other_layers_reduce_the_same(monkeypatch: pytest.MonkeyPatch):
    """An expert may have had tokens on one rank only."""
    model, reduced = tiny_llama(), []
    controller = PrecisionController({"recipe": "mxfp8", "guard": True})
    controller.convert(model, "cpu")
    names = list(recipes_of(model))

    def all_reduce(lowest: torch.Tensor, op: Any) -> None:
        reduced.append(lowest.clone())
        lowest[1] = 5.0  # the other rank's measurement

    monkeypatch.setattr(recovery.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(recovery.dist, "all_reduce", all_reduce)
    found = recovery.worst_sqnr(model, {names[3]: LayerProbe(sqnr_x=20.0, sqnr_w=30.0, sqnr_g=10.0)}, "cpu")
    assert [len(values) for values in reduced] == [len(names)]
    assert found == {names[1]: 5.0, names[3]: 10.0}


@pytest.mark.parametrize("tokens", ["8", 0, -1, 1.5, True])
def test_tokens_are_a_number(tokens: Any):
    with pytest.raises(UserError, match="tokens: the tokens of a forward pass are a whole number from 1"):
        LowPrecisionCallback("mxfp8", tokens=tokens)


def test_numbers_of_numpys_are_numbers():
    tokens: Any = np.prod([8, 256])
    controller = LowPrecisionCallback("mxfp8", tokens=tokens).controller
    assert (controller.tokens, type(controller.tokens)) == (2048, int)


@pytest.mark.parametrize(
    "precision, message",
    [
        ({"recipe": "fp16", "loss_scaling": {"init_scale": float("inf")}}, "loss_scaling.init_scale: "),
        ({"recipe": "fp16", "loss_scaling": {"init_scale": 1e39}}, "loss_scaling.init_scale: "),
        ({"recipe": "fp16", "loss_scaling": {"growth_factor": float("inf")}}, "loss_scaling.growth_factor: "),
        ({"recipe": "mxfp4", "guard": {"sqnr_floor": float("nan")}, "probe_every": 2}, "guard.sqnr_floor: "),
        ({"recipe": "mxfp4", "guard": {"loss_ratio": float("nan")}}, "guard.loss_ratio: "),
        ({"recipe": "mxfp4", "guard": {"gradient_ratio": -float("inf")}}, "guard.gradient_ratio: "),
        ({"recipe": "mxfp4", "guard": {"sqnr_floor": float("inf")}, "probe_every": 2}, "guard.sqnr_floor: "),
        ({"recipe": "mxfp4", "rules": [{"modules": "(", "recipe": "bf16"}]}, r"rules.0.modules: rule '\(' is not a regular expression"),
    ],
)
def test_wrong_numbers_and_expressions_are_one_line_at_once(precision: Any, message: str):
    with pytest.raises(UserError, match=message) as caught:
        LowPrecisionCallback(precision)
    assert "\n" not in str(caught.value)
