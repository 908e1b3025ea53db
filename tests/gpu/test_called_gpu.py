"""On a GPU: compiled blocks do not hide calls, and the shipped 125M run trains in the recipe that it names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import lowprec
from lowprec.integrations.compile import compile_blocks
from lowprec.observe.called import BYPASSED, Calls
from tests.builders import tiny_llama

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def product(layer: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight)  # pyright: ignore[reportArgumentType]


class Reading(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * product(self.up_proj, x))


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_calls_of_compiled_blocks(recipe: str, checkpointing: bool):
    results = []
    for watches in (False, True):
        torch._dynamo.reset()
        model: Any = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=3)
        model.cuda()
        for layer in model.model.layers:
            layer.mlp.__class__ = Reading
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        lowprec.convert(model.train(), {"recipe": recipe, "skip_slow": False})
        compile_blocks(model, "blocks", "cuda")
        torch._dynamo.utils.counters.clear()
        calls = Calls(model)
        tokens = torch.arange(64, device="cuda").repeat(2, 4)
        losses = []
        for step in range(3):
            if watches and step != 1:
                calls.begin()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            if watches and step != 1:
                assert calls.end() == {f"model.layers.{n}.mlp.up_proj": BYPASSED for n in range(3)}
            losses.append(loss.item())
        results.append((losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert results[0] == results[1]


@pytest.mark.parametrize("forced", [True, False])
def test_the_shipped_125m_run_trains_in_its_recipe_or_says_at_both_ends_that_it_does_not(forced: bool, tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number:02d}.txt").write_text(f"document {number}: " + "the quick brown fox jumps over the lazy dog. " * 400)
    arguments = [
        *("train", "llama-125m-fp8-blockwise", f"data.source={corpus}", "data.tokenizer=bytes", "compile=off"),
        *("trainer.max_steps=2", "trainer.per_device_train_batch_size=2", f"trainer.output_dir={tmp_path / 'run'}"),
        *(() if forced else ("precision.skip_slow=true",)),
    ]
    # Weights & Biases prints a line of its own if it is told its mode.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-m", "lowprec", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    title, last = result.stdout.splitlines()[0], result.stdout.splitlines()[-1]
    if forced:
        assert summary["recipe"] == "fp8_blockwise"
        assert set(summary["ran"]["weights"]) == {"fp8_blockwise", "high precision"}
        assert summary["ran"]["flops"]["fp8_blockwise"] > 0.7
        assert (summary["plan"]["native"], summary["plan"]["not called"]) == (84, 0)
        assert title.startswith("fp8_blockwise in ")
        return
    assert (summary["recipe"], summary["asked_recipe"]) == (None, "fp8_blockwise")
    assert title.startswith("high precision: ")
    told = "fp8_blockwise runs in none of the 85 linear layers: it does not pay"
    assert last.startswith(told)
    assert last.endswith("precision.skip_slow: false runs all layers in it nevertheless")
    assert next(line for line in result.stderr.splitlines() if "linear layers" in line) == last
