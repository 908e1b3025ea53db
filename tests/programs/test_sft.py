"""trainers/sft.py trains all weights or adapters on chats or texts, from YAML or the command line alone; misuse is one line."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from lowprec.errors import UserError
from lowprec.training.data.tokenizer import END, byte_tokenizer
from tests.builders import tiny_llama
from tests.processes import ROOT, run

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
)
TEXTS = [{"text": f"{number}: " + "the quick brown fox jumps over the lazy dog. " * 2} for number in range(32)]
CHATS = [
    {"messages": [{"role": "user", "content": f"count from {number}"}, {"role": "assistant", "content": f"{number}, {number + 1}"}]}
    for number in range(32)
]
SETTINGS = (
    "model.path=model",
    "data.seq_len=64",
    "device=cpu",
    "precision=fp8_blockwise",
    "trainer.max_steps=4",
    "trainer.learning_rate=1e-2",
    "trainer.per_device_train_batch_size=4",
    "trainer.logging_steps=1",
    "trainer.disable_tqdm=true",
)


@pytest.fixture(scope="module")
def sft() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sft", ROOT / "trainers" / "sft.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama() -> LlamaForCausalLM:
    return tiny_llama(vocab_size=257, bos_token_id=256, eos_token_id=256, use_cache=True)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    llama().save_pretrained("model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=END, bos_token=END, pad_token=END)
    tokenizer.save_pretrained("model")
    for name, rows in (("texts", TEXTS), ("chats", CHATS), ("odd", [{"question": "a", "answer": "b"}])):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("chat.jinja").write_text(TEMPLATE)


def test_all_weights_from_a_file(sft: ModuleType):
    Path("tune.yaml").write_text(
        "model: {path: model}\ndata: {source: texts.jsonl, seq_len: 64, validation_fraction: 0.25}\nprecision: {recipe: mxfp8}\n"
    )
    settings = [setting for setting in SETTINGS if setting.startswith(("device", "trainer"))]
    summary = sft.main(["tune.yaml", *settings, "trainer.save_steps=2"])
    run_dir = Path("runs/tune/001")
    assert summary["output_dir"] == str(run_dir)
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert (summary["recipe"], summary["steps"], summary["plan"]["emulated"]) == ("mxfp8", 4, 14)
    assert summary["val_loss"] < summary["train_loss"] < 5.55  # ln 257 before the first step
    trained = AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict()
    assert all(not torch.equal(trained[name], value) for name, value in llama().state_dict().items())
    # It resumes, and repeats its last steps exactly.
    again = sft.main(["tune.yaml", *settings, f"trainer.resume_from_checkpoint={run_dir / 'checkpoint-2'}", "trainer.output_dir=again"])
    assert again["val_loss"] == summary["val_loss"]
    # It is finished; without its summary, its end is left to do.
    resume = ["tune.yaml", *settings, "trainer.resume_from_checkpoint=true"]
    with pytest.raises(UserError, match="after 4 steps, and the run is finished"):
        sft.main(resume)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "model")
    ended = sft.main(resume)
    assert {**ended, "wall_s": 0} == {**summary, "wall_s": 0}
    weights = AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict()
    assert all(torch.equal(trained[name], value) for name, value in weights.items())


def test_adapters_on_chats_from_the_command_line_alone(sft: ModuleType):
    settings = ["lora={r: 4, lora_alpha: 8}", "sft.assistant_only_loss=true", "sft.chat_template_path=chat.jinja"]
    summary = sft.main([*SETTINGS, "data.source=chats.jsonl", *settings])
    run_dir = Path("runs/sft/001")
    assert (summary["steps"], summary["val_loss"], summary["output_dir"]) == (4, None, str(run_dir))
    plan = json.loads((run_dir / "plan.json").read_text())
    assert {layer["recipe"] for layer in plan["layers"] if layer["converted"]} == {"fp8_blockwise"}
    assert not (run_dir / "model" / "model.safetensors").exists()
    adapted = peft.PeftModel.from_pretrained(llama(), run_dir / "model")
    assert adapted.peft_config["default"].r == 4  # pyright: ignore[reportAttributeAccessIssue]
    weights = [value for name, value in adapted.state_dict().items() if "lora_B" in name]
    assert weights
    assert all(value.abs().max() > 0 for value in weights)  # lora_B begins at zero


def test_rows_are_joined(sft: ModuleType):
    assert sft.main([*SETTINGS, "data.source=texts.jsonl", "data.packing=true", "lora=true"])["steps"] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("llama-tiny-cpu",), "llama-tiny-cpu: no such file"),
        (("data.source=texts.jsonl", "data.max_bytes=3"), "data.max_bytes: unknown key"),
        (
            ("data.source=texts.jsonl", "kernels.liger=auto"),
            "kernels: unknown key; known: data, device, lora, model, precision, sft, trainer",
        ),
        ((), "data.source: a value is required"),
        (("data.source=texts.jsonl", "model={preset: llama-tiny}"), "model: fine-tuning starts from trained weights; set model.path alone"),
        (("data.source=texts.jsonl", "model.path=cache"), "model.path: no folder cache, and no download"),
        (("data.source=nothing.jsonl",), "data.source: no file or folder nothing.jsonl"),
        (("data.source=python-stdlib",), "data.source: python-stdlib holds programs, not rows to fine-tune on"),
        (("data.source=odd.jsonl",), "data.source: rows have answer, question; expected messages, or prompt and completion, or 'text'"),
        (("data.source=chats.jsonl",), "data.source: rows are chats, and the tokenizer has no chat template; set sft.chat_template_path"),
        (("data.source=[texts.jsonl, chat.jinja]",), "data.source: chat.jinja is not a"),
        (("data.source=texts.jsonl", "data.validation_fraction=0.001"), "data.validation_fraction: 0.001 of 32 rows is 0"),
        (("data.source=texts.jsonl", "trainer.eval_strategy=steps"), "trainer.eval_strategy: no rows to evaluate on"),
        (("data.source=texts.jsonl", "data.seq_len=4096"), "data.seq_len: 4096 is longer than the model's 2048 positions"),
        (("data.source=texts.jsonl", "lora.alpha=8"), "lora.alpha: unknown key; did you mean 'lora_alpha'?"),
        (("data.source=texts.jsonl", "lora.target_modules=conv"), "SFTTrainer: Target modules conv not found"),
        (("data.source=texts.jsonl", "sft.max_length=64"), "sft.max_length: set data.seq_len instead"),
        (("data.source=texts.jsonl", "sft.learning_rate=1"), "sft.learning_rate: set trainer.learning_rate instead"),
        (("data.source=texts.jsonl", "sft.los_type=dft"), "sft.los_type: unknown key; did you mean 'loss_type'?"),
        (("data.source=texts.jsonl", "sft.assistant_only_loss=true"), "SFTTrainer: You set `assistant_only_loss=True`, but"),
        (("data.source=texts.jsonl", "precision=fp8_blokwise"), "precision.recipe: unknown recipe 'fp8_blokwise'; did you mean"),
        (("data.source=texts.jsonl", "trainer.learning_rat=1"), "trainer.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ],
)
def test_misuse_is_the_users_error(settings: tuple[str, ...], message: str, sft: ModuleType):
    names = [setting for setting in settings if "=" not in setting]
    with pytest.raises(UserError) as error:
        sft.main([*names, *SETTINGS, *(setting for setting in settings if "=" in setting)])
    assert str(error.value).startswith(message)
    assert not list(Path("runs").glob("*/*"))  # no run is left behind


def test_as_a_program(tmp_path: Path):
    result = run(str(ROOT / "trainers" / "sft.py"), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "sft.py: usage: sft.py [CONFIG] [key=value ...]"
    assert "Traceback" not in result.stderr
