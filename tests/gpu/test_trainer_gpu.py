"""The trainer layer over native FP8 layers: probes, and the callback with a PEFT model and in TRL's SFTTrainer."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torchao.optim
from datasets import Dataset
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.utils import fresh_cache
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lowprec import LowPrecisionCallback, convert
from lowprec.distributed.processes import use_one_gpu
from lowprec.integrations import compile_blocks
from lowprec.nn import LowPrecisionLinear
from lowprec.observe import LayerProbe, Probe
from lowprec.recipe import library
from lowprec.training.data.tokenizer import END, byte_tokenizer
from lowprec.training.optim.adamw import OptimizerConfig, build
from tests.builders import tiny_llama

pytestmark = pytest.mark.gpu

TEXTS = [f"{number}: " + "the quick brown fox jumps over the lazy dog. " * 2 for number in range(32)]
PRECISION = {"recipe": "fp8_blockwise", "skip_slow": False}
TIMED = {"deterministic": False, "triton.autotune_pointwise": True}
"""The settings by which TorchInductor chooses kernels by default."""
ROWS = [list(text.encode())[:64] for text in TEXTS]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms require it
    torch.use_deterministic_algorithms(True)
    with inductor.patch(TIMED):
        yield
    torch.use_deterministic_algorithms(False)


def llama(vocabulary: int = 256) -> Any:
    return tiny_llama(vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_attention_heads=4, use_cache=True)


def train(model: Any, *, probed: bool) -> tuple[list[float], list[dict[str, LayerProbe]]]:
    optimizer, watched, found, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), Probe(model), [], []
    batch = torch.tensor(ROWS[:4], device="cuda")
    for number in range(3):
        if probed and number != 1:
            watched.begin()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        if watched.armed:
            found.append(watched.end())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, found


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_delayed", "mxfp4_aws"])
def test_training_is_the_same_bits_with_a_probe(recipe: str):
    plain = llama().to("cuda", torch.bfloat16)
    convert(plain, {"recipe": recipe, "skip_slow": False})
    probed = copy.deepcopy(plain)
    losses, _ = train(plain, probed=False)
    again, found = train(probed, probed=True)
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), probed.state_dict().values(), strict=True))
    assert [len(layers) for layers in found] == [14, 14]
    floor = 10 if recipe == "mxfp4_aws" else 20
    for layer in found[-1].values():
        assert floor < layer.sqnr_g < 60
        assert min(layer.sqnr_x, layer.sqnr_w) > floor


@pytest.mark.parametrize("recipe", ["fp8_blockwise", "fp8_rowwise", "mxfp8"])
def test_a_probe_measures_what_it_measures_on_a_cpu(recipe: str):
    torch.manual_seed(0)
    linear = nn.Linear(384, 256, bias=False, dtype=torch.bfloat16)
    x, g = torch.randn(192, 384).bfloat16(), torch.randn(192, 256).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        layer = LowPrecisionLinear.from_linear(copy.deepcopy(linear), library.get(recipe)).to(device)
        watched = Probe(layer)
        with watched.sampling():
            layer(x.to(device).requires_grad_()).backward(g.to(device))
        found.append(watched.layers[""])
    for name in ("sqnr_x", "sqnr_w", "sqnr_g", "underflow_x", "underflow_g", "saturated_x"):
        assert getattr(found[1], name) == pytest.approx(getattr(found[0], name), rel=1e-6), name


@torch.no_grad()
def logits(model: Any, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cuda", dtype):  # the Trainer uses autocast, too
        return model.eval()(input_ids=torch.tensor(ROWS[7:8], device="cuda")).logits.float()


def test_adapters_train_on_a_converted_model_and_are_saved(tmp_path: Path):
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    rows: Any = [{"input_ids": row, "labels": row} for row in ROWS]
    settings: dict[str, Any] = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": True, "gradient_checkpointing": True}
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), lora)
    args = TrainingArguments(output_dir=str(tmp_path), **settings)
    use_one_gpu(args)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[LowPrecisionCallback(PRECISION)])
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    converted = [name for name, module in model.named_modules() if isinstance(module, LowPrecisionLinear)]
    assert len(converted) == 14
    assert all(name.endswith("base_layer") for name in converted)
    model.save_pretrained(tmp_path / "adapters")
    loaded = llama()
    convert(loaded, PRECISION)
    loaded = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "adapters")).to("cuda")
    assert torch.equal(logits(loaded), logits(trainer.model))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_supervised_fine_tuning(autocast: str, tmp_path: Path):
    """The run has two phases and a guard; it is evaluated and saved, resumes, and its checkpoint is loaded."""
    trl = pytest.importorskip("trl")
    data = Dataset.from_dict({"text": TEXTS})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=END, bos_token=END, pad_token=END)
    precision = {"guard": {"snapshot_every": 4}, "skip_slow": False, "loss_scaling": {"init_scale": 1024, "growth_interval": 3}}
    precision |= {"schedule": [{"until": "3 steps", "recipe": "bf16"}, {"recipe": "fp8_blockwise"}]}
    settings: dict[str, Any] = {"max_steps": 8, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "logging_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "report_to": "none", "disable_tqdm": True}
    settings |= {"bf16": autocast == "bf16", "fp16": autocast == "fp16"}

    def fine_tune(folder: Path, checkpoint: Path | None = None) -> tuple[Any, list[dict[str, Any]]]:
        args = trl.SFTConfig(output_dir=str(folder), max_length=64, **settings)
        use_one_gpu(args)
        model, few = llama(vocabulary=257), data.select(range(4))
        trainer = trl.SFTTrainer(
            model, args, train_dataset=data, eval_dataset=few, processing_class=tokenizer, callbacks=[LowPrecisionCallback(precision)]
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer, [record for record in trainer.state.log_history if "loss" in record]

    trainer, records = fine_tune(tmp_path)
    losses = [record["loss"] for record in records]
    assert losses[-1] < losses[0] - 0.5
    assert [record.get("loss_scale") for record in records] == ([None] * 8 if autocast == "bf16" else [1024] * 2 + [2048] * 3 + [4096] * 3)
    assert [record["phase"] for record in records] == [1] * 3 + [2] * 5
    _, again = fine_tune(tmp_path / "again", tmp_path / "checkpoint-4")
    assert [record["loss"] for record in again] == losses
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    convert(loaded, PRECISION)
    dtype = torch.bfloat16 if autocast == "bf16" else torch.float16
    assert torch.equal(logits(loaded.to("cuda"), dtype), logits(trainer.model, dtype))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_overflows_are_skipped_steps_and_no_breach(optim: str, tmp_path: Path):
    """The Trainer's default optimizer is fused: torch lets it look for overflows itself, and Accelerate does not hear of them."""
    rows: Any = [{"input_ids": row, "labels": row} for row in ROWS]
    settings: dict[str, Any] = {
        "max_steps": 20,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "optim": optim,
    }
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "fp16": True}
    args = TrainingArguments(output_dir=str(tmp_path), **settings)
    use_one_gpu(args)
    scaling = {"init_scale": 2.0**24, "growth_interval": 100}
    precision = {"recipe": "fp16", "loss_scaling": scaling, "guard": {"skipped_steps": 20}}
    trainer = Trainer(llama(), args, train_dataset=rows, callbacks=[LowPrecisionCallback(precision)])
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    fallen = [round(math.log2(scaling["init_scale"] / record["loss_scale"])) for record in records]
    assert [record["skipped_steps"] for record in records] == fallen
    assert fallen[-1] > 3
    assert records[-1]["guard_recoveries"] == 0
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the list of kernels that TorchInductor chooses by timing from now on; earlier timings are unknown to it."""
    found: list[str] = []
    choose = CachingAutotuner.autotune_to_one_config

    def autotune(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(self.fn.__name__)
        choose(self, *args, **kwargs)

    monkeypatch.setattr(CachingAutotuner, "autotune_to_one_config", autotune)
    torch.compiler.reset()
    with fresh_cache():
        yield found
    torch.compiler.reset()


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_no_kernel_of_a_step_is_chosen_by_timing(weights: Any, moments: Any, timed: list[str]):
    config = OptimizerConfig(weights=weights, moments=moments)
    for ours in (True, False):
        parameter = nn.Parameter(torch.ones(256, 512, device="cuda", dtype=torch.bfloat16 if weights == "bf16" else torch.float32))
        parameter.grad = torch.randn_like(parameter)
        theirs = torchao.optim.AdamW8bit if moments == "8bit" else torchao.optim.AdamW4bit
        optimizer = build(config, [parameter]) if ours else theirs([parameter])
        torch.compiler.reset()
        optimizer.step()
        assert bool(timed) != ours  # torchao's own step times its kernels, so the test would notice


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("recipe", ["bf16", "fp8_blockwise", "mxfp4"])
def test_no_kernel_of_compiled_blocks_is_chosen_by_timing(recipe: str, timed: list[str]):
    for asked in (True, False):
        torch.use_deterministic_algorithms(asked)
        torch.compiler.reset()
        model = llama().to("cuda", torch.bfloat16)
        convert(model, {"recipe": recipe, "skip_slow": False})
        with inductor.patch(TIMED):
            compile_blocks(model, "blocks", "cuda")
            train(model, probed=False)
        assert bool(timed) != asked
