"""The watch, compared with gradients and losses that are computed without it."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lowprec
from lowprec.training.control import step_stats as watching
from lowprec.training.control.step_stats import Watch
from tests.builders import tiny_llama

# Norms of fp32 gradients, summed in another order: relative rounding errors of 2^-24 that at most add up over a few thousand values.
CLOSE = 1e-5


def _model(**config: Any) -> LlamaForCausalLM:
    return tiny_llama(use_cache=True, **config).train()


def _batch(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(seed))


def _step(model: Any, *seeds: int, scale: float = 1.0, **arguments: Any) -> list[float]:
    """Run the backwards of a step and return the losses of its micro-batches; the gradients stay in the model."""
    model.zero_grad()
    losses = [model(input_ids=_batch(seed), labels=_batch(seed), **arguments).loss for seed in seeds]
    for loss in losses:
        (scale * loss).backward()
    return [loss.item() for loss in losses]


def _norms(model: nn.Module) -> dict[str, float]:
    named = ((name.rpartition(".")[0], parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient.double().norm().item() for name, gradient in named if gradient is not None}


def _total(norms: dict[str, float]) -> float:
    return math.sqrt(sum(norm * norm for norm in norms.values()))


def test_a_step_is_measured_and_the_next_starts_anew():
    model = _model()
    watch = Watch(model)
    for seed in (0, 1):
        losses = _step(model, seed)
        expected = _norms(model)
        model.zero_grad()  # as the Trainer does before the step's end
        loss, total, layers = watch.read()
        assert loss == losses[0]
        assert list(layers) == watch.names == list(expected)
        assert layers == pytest.approx(expected, rel=CLOSE)
        assert total == pytest.approx(_total(expected), rel=CLOSE)
    assert watch.read() == (None, 0.0, dict.fromkeys(watch.names, 0.0))


def test_after_a_backward_that_failed_the_next_is_measured():
    model = _model()
    watch = Watch(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.layers[0].register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        _step(model, 0)
    handle.remove()
    watch.read()
    _step(model, 0)
    assert watch.read()[2] == pytest.approx(_norms(model), rel=CLOSE)


def test_parameters_without_a_gradient_count_as_zero():
    model = _model()
    unused = nn.Linear(4, 4, bias=False)
    model.add_module("unused", unused)
    watch = Watch(model)
    _step(model, 0)
    expected = _norms(model)
    assert "unused" not in expected
    assert watch.read()[2] == pytest.approx(expected | {"unused": 0.0}, rel=CLOSE)


def test_names_are_in_model_order():
    names = Watch(_model()).names
    assert (names[0], names[-1]) == ("model.embed_tokens", "lm_head")
    assert names.index("model.layers.0.mlp.down_proj") < names.index("model.layers.1.self_attn.q_proj")


def test_micro_batches_of_a_step():
    model = _model()
    watch = Watch(model)
    losses = _step(model, 0, 1, 2)
    loss, total, _ = watch.read()
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert total == pytest.approx(_total(_norms(model)), rel=CLOSE)  # the norm of the summed gradients, not of the last one
    # With the number of tokens in the step, the model returns shares of the step's loss.
    shares = _step(model, 0, 1, 2, num_items_in_batch=90)
    assert watch.read()[0] == pytest.approx(sum(shares), rel=1e-6)
    assert sum(shares) == pytest.approx(sum(losses) / 3, rel=1e-5)


@pytest.mark.parametrize("of_all_ranks", [False, True])
def test_the_loss_over_two_ranks(of_all_ranks: bool, monkeypatch: pytest.MonkeyPatch):
    """Each rank's loss is a share if the number of items is that of all ranks; it is a mean if the number is the rank's own."""
    monkeypatch.setattr(watching, "_ranks", lambda: 2)
    monkeypatch.setattr(watching.dist, "all_reduce", lambda sums: sums.mul_(2))  # the other rank saw the same
    model = _model()
    watched = Watch(model, items_of_all_ranks=of_all_ranks)
    mean = _step(model, 1)[0]
    assert watched.read()[0] == pytest.approx(mean, rel=1e-6)
    model.zero_grad()
    items = 30  # in one batch: see the test above
    share = _step(model, 1, num_items_in_batch=items * (2 if of_all_ranks else 1))[0]
    assert share == pytest.approx(mean / (2 if of_all_ranks else 1), rel=1e-6)
    assert watched.read()[0] == pytest.approx(mean, rel=1e-6)


def test_the_loss_scale_is_divided_out():
    model = _model()
    watch = Watch(model)
    _step(model, 0)
    plain = watch.read()
    _step(model, 0, scale=1024.0)
    assert watch.read(scale=1024.0) == plain  # a power of two is exact


def test_values_that_are_not_finite_show_where_they_are():
    model = _model()
    watch = Watch(model)
    model.model.layers[1].register_full_backward_hook(lambda *_: (torch.full((2, 16, 64), math.nan),))
    _step(model, 0)
    loss, total, layers = watch.read()
    assert loss is not None
    assert math.isfinite(loss)
    assert math.isnan(total)
    assert {name for name, norm in layers.items() if math.isnan(norm)} == {
        name for name in watch.names if name.startswith(("model.layers.0.", "model.embed_tokens"))
    }
    _step(model, 0)
    model.lm_head.weight.data.fill_(math.inf)
    _step(model, 0)
    assert not math.isfinite(watch.read()[0] or 0.0)


def test_evaluation_adds_no_loss():
    model = _model()
    watch = Watch(model)
    losses = _step(model, 0)
    with torch.no_grad():
        model(input_ids=_batch(1), labels=_batch(1))
    model.eval()(input_ids=_batch(1), labels=_batch(1))
    assert watch.read()[0] == losses[0]


@pytest.mark.parametrize("output", [{"loss": torch.tensor(3.0)}, {"logits": torch.ones(1)}, (torch.ones(1),), torch.ones(2)])
def test_models_that_return_something_else(output: Any):
    class Model(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return output

    model = Model(2, 2)
    watch = Watch(model)
    model(torch.ones(2))
    assert watch.read() == (3.0 if isinstance(output, dict) and "loss" in output else None, 0.0, {"": 0.0})


def test_frozen_weights_are_not_watched_but_their_adapters_are():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    watch = Watch(model)
    _step(model, 0)
    _, total, layers = watch.read()
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.default"
    assert list(layers) == [prefix.format(layer, letter) for layer in (0, 1) for letter in "AB"]
    assert layers == pytest.approx(_norms(model), rel=CLOSE)
    assert total > 0


def test_tied_weights_count_once():
    model = _model(tie_word_embeddings=True)
    watch = Watch(model)
    _step(model, 0)
    _, total, layers = watch.read()
    assert "lm_head" not in layers
    assert layers == pytest.approx(_norms(model), rel=CLOSE)
    assert total == pytest.approx(_total(_norms(model)), rel=CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_adds_neither_loss_nor_gradient_twice(reentrant: bool):
    model = _model()
    lowprec.convert(model, "fp8_blockwise")
    watch = Watch(model)
    _step(model, 0, 1)
    plain = watch.read()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _step(model, 0, 1)
    assert watch.read() == plain


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_stay_whole_graphs():
    model = _model()
    watch = Watch(model)
    _step(model, 0)
    loss, total, layers = watch.read()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    _step(model, 0)
    compiled = watch.read()
    assert graphs
    assert compiled[:2] == pytest.approx((loss, total), rel=CLOSE)
    assert compiled[2] == pytest.approx(layers, rel=CLOSE)


def test_norms_of_half_precision_gradients_are_fp32():
    model = nn.Linear(64, 64, bias=False, dtype=torch.float16)
    watch = Watch(model)
    model.weight.backward(torch.full((64, 64), 6e4, dtype=torch.float16))
    exact = 64 * torch.tensor(6e4, dtype=torch.float16).item()
    assert watch.read()[1] == pytest.approx(exact, rel=CLOSE)  # beyond fp16's range


def test_detached_hooks_see_nothing_and_watching_changes_nothing():
    model = _model()
    other = copy.deepcopy(model)
    watch = Watch(model)
    assert _step(model, 0) == _step(other, 0)
    assert all(torch.equal(one.grad, two.grad) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    watch.read()
    watch.detach()
    _step(model, 0)
    assert watch.read()[:2] == (None, 0.0)


class _Reader(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[tuple[float | None, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.watch = Watch(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(self.watch.read()[:2])


def test_the_trainer_logs_the_same_loss_and_norm_although_it_clips(tmp_path: Path):
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(64).repeat(8).view(16, 32)]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    settings |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}
    reader = _Reader()
    args = TrainingArguments(output_dir=str(tmp_path), **settings)
    trainer = Trainer(_model(), args, train_dataset=rows, callbacks=[reader])  # pyright: ignore[reportArgumentType]
    trainer.train()
    logged = [(record["loss"], record["grad_norm"]) for record in trainer.state.log_history if "grad_norm" in record]
    assert len(logged) == len(reader.steps) == 3
    assert [loss for loss, _ in reader.steps] == pytest.approx([loss for loss, _ in logged], abs=1e-4)  # the log rounds
    assert [norm for _, norm in reader.steps] == pytest.approx([norm for _, norm in logged], rel=CLOSE)
