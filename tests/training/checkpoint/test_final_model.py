"""The flag of a finished model is one of its hooks: copies, pickles and compiled code have it too."""

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import lowprec
from lowprec.recipe.finished import finished_flag
from lowprec.recipe.state import is_state
from lowprec.training.checkpoint.final_model import follow
from lowprec.training.checkpoint.recipe_state import RecipeState
from lowprec.training.checkpoint.saved import load_tensors, save_tensors


def _finished() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32))
    lowprec.convert(model, "fp8_delayed")
    follow(model).finished = True
    return model


def _has_state(model: nn.Module) -> bool:
    return any(map(is_state, model.state_dict()))


def test_a_second_call_of_follow_returns_the_same_flag():
    model = _finished()
    assert follow(model) is finished_flag(model)
    assert (len(model._state_dict_hooks), len(model._forward_pre_hooks), len(model._load_state_dict_pre_hooks)) == (1, 1, 1)
    assert not [name for name in vars(model) if "lowprec" in name]


def test_a_copy_has_a_flag_of_its_own():
    model = _finished()
    other = copy.deepcopy(model)
    assert not _has_state(other)
    other(torch.randn(4, 32))
    assert _has_state(other)
    assert not _has_state(model)
    lowprec.convert(model, "fp8_delayed")
    assert _has_state(model)


def test_a_pickled_model_keeps_its_flag():
    file = io.BytesIO()
    torch.save(_finished(), file)
    file.seek(0)
    model = torch.load(file, weights_only=False)
    assert not _has_state(model)
    model.load_state_dict(model.state_dict())
    model(torch.randn(4, 32))
    assert _has_state(model)


def test_compiled_code_lowers_the_flag_and_depends_on_it_in_training_only():
    model, counter = nn.Sequential(nn.Linear(32, 32)), CompileCounter()
    model[0].register_buffer("rounding_state", torch.zeros(3, dtype=torch.int64))
    flag = follow(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 32)
    for flag.finished in (True, False):
        compiled.eval()(x)
    assert counter.frame_count == 1
    flag.finished = True
    compiled.train()(x)
    assert not flag.finished
    assert follow(compiled) is flag
    flag.finished = True
    assert not _has_state(compiled)


@pytest.mark.parametrize("written", [True, False])
def test_tensors_are_a_part_of_a_checkpoint(written: bool, tmp_path: Path):
    model = _finished()
    model(torch.randn(4, 32))
    if written:
        save_tensors(RecipeState(model), tmp_path)
        assert set(load_file(tmp_path / "lowprec_state.safetensors")) == set(filter(is_state, model.state_dict()))
    other = _finished()
    assert load_tensors(RecipeState(other), tmp_path) is written
    kept = dict(model.named_buffers())
    assert all(torch.equal(buffer, kept[name]) is written for name, buffer in other.named_buffers() if kept[name].any())
