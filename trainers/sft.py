"""Fine-tune a language model on chats or texts by TRL's SFTTrainer: all its weights, or LoRA.

python trainers/sft.py [CONFIG] [key=value ...]
python trainers/sft.py model.path=Qwen/Qwen3-0.6B data.source=chats.jsonl lora=true
torchrun --nproc-per-node 8 trainers/sft.py sft.yaml

CONFIG is a YAML file like that of a pretraining run:

model: {path: Qwen/Qwen3-0.6B}      # a folder, or a name on the Hugging Face hub
data: {source: chats.jsonl, seq_len: 1024, validation_fraction: 0.02}
precision: {recipe: fp8_blockwise}  # and rules, schedule, guard, ... as in a pretraining run
lora: {r: 16, lora_alpha: 32}       # fields of peft.LoraConfig, or true; without it, all weights
sft: {assistant_only_loss: true}    # fields of trl.SFTConfig that TrainingArguments does not have
trainer: {max_steps: 500, learning_rate: 1e-4}

A row of the data has `messages` (a chat), or `prompt` and `completion`, or text. Weights are loaded
in fp32. The result is in runs/<config name>/<number>/model: the model, or with LoRA the adapters.
"""

import contextlib
import dataclasses
import math
import os
import sys
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from huggingface_hub import snapshot_download
from pydantic import Field, field_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed

from lowprec import LowPrecisionCallback
from lowprec.config.schema import StrictConfig, parse, parse_value
from lowprec.conversion.shares import format_shares
from lowprec.distributed.processes import (
    distributed_state,
    is_main_process,
    name_the_cpu,
    on_main_process,
    use_one_gpu,
)
from lowprec.errors import TrainingStopped, UserError, nearest, reported
from lowprec.training.control.precision import PrecisionConfig, parse_precision
from lowprec.training.control.stop_signals import StopSignals
from lowprec.training.data.config import DataConfig
from lowprec.training.data.sources import ROW_SUFFIXES, resolve_sources
from lowprec.training.run import directory as run_directory
from lowprec.training.run import resume_checks
from lowprec.training.run.config import read_settings
from lowprec.training.run.environment import rule_environment
from lowprec.training.run.machine import resolve_device
from lowprec.training.run.models import ModelConfig, build_config, build_model, check_length
from lowprec.training.run.result import save_result, what_ran
from lowprec.training.run.resume_command import resume_command
from lowprec.training.run.trainer_fields import check_field
from lowprec.training.run.training_args import (
    OWN_KEYS,
    autocast_settings,
    check_trainer,
    total_steps,
)

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    sys.exit("sft.py: needs TRL: pip install 'lowprec[trl]'")

READERS = {**ROW_SUFFIXES, ".txt": "text"}
"""Suffix of a file -> its reader in `datasets`."""

ELSEWHERE = {
    "max_length": "data.seq_len",
    "packing": "data.packing",
    "dataset_text_field": "data.text_column",
}
"""Fields of SFTConfig that the section `data` sets."""


class SftData(StrictConfig):
    """The rows to train on."""

    source: str | list[str]
    """.jsonl, .json, .parquet or .txt files, a folder or a glob of them, or the name of a dataset
    on the Hugging Face hub."""
    hub_config: str | None = None
    """Configuration ("subset") of a hub dataset."""
    hub_split: str = "train"
    """Split of a hub dataset."""
    text_column: str = "text"
    """Column of the text in rows that are not chats."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; by default the model's own."""
    seq_len: int = Field(default=1024, ge=2)
    """Number of tokens that a row is cut to, or with packing, that rows are joined to."""
    packing: bool = False
    """Flag: join rows to sequences of seq_len tokens."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows that is held back, to evaluate on."""


class SftRun(StrictConfig):
    """The configuration of a fine-tuning run."""

    model: ModelConfig
    data: SftData
    precision: PrecisionConfig = PrecisionConfig()
    lora: bool | dict[str, Any] = False
    """Fields of peft.LoraConfig, or true for its defaults on all linear layers. False trains all
    weights."""
    sft: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig that are not in TrainingArguments."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Fields of TrainingArguments, and `resume_from_checkpoint` and `overwrite_output_dir`."""
    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: CUDA if there is a CUDA device, else the CPU."""

    @field_validator("precision", mode="before")
    @classmethod
    def _any_form(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping) else parse_precision(value)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Fine-tune, and return what summary.json holds."""
    if not arguments:
        raise UserError("usage: sft.py [CONFIG] [key=value ...]")
    path = None if "=" in arguments[0] else Path(arguments[0])
    settings = read_settings(path, arguments if path is None else arguments[1:])
    run = parse(SftRun, settings)
    device = resolve_device(run.device)
    args, resumes = make_arguments(run, device)
    adapters = make_adapters(run.lora)

    processes = distributed_state(device)
    with args.main_process_first(desc="model and data"):
        model_path = fetch(run.model)
        tokenizer = load_tokenizer(run.data.tokenizer or model_path)
        rows = load_rows(run.data)
    template = str(args.chat_template_path or "")
    if template and not template.endswith((".jinja", ".j2")):
        load_tokenizer(template, "sft.chat_template_path")  # TRL would ask about code in it.
    check_rows(rows, run.data, tokenizer, template)
    train_rows, validation_rows = split(rows, run.data.validation_fraction, args.seed)
    set_seed(args.seed)
    model = load_model(run, model_path, len(tokenizer))

    name = path or Path("sft")
    reads = [Path(model_path)]
    run_dir, checkpoint = on_main_process(
        processes, lambda: run_directory.prepare(name, resumes, reads=reads)
    )
    args.output_dir = str(run_dir)
    try:
        low_precision = LowPrecisionCallback(
            run.precision, tokens=args.per_device_train_batch_size * run.data.seq_len
        )
        try:
            trainer = SFTTrainer(
                model,
                args,
                train_dataset=train_rows,
                eval_dataset=validation_rows,
                processing_class=tokenizer,
                peft_config=adapters,
                callbacks=[low_precision],
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, ImportError) as error:
            raise UserError(f"SFTTrainer: {error}") from None
        summary = _train(trainer, low_precision, checkpoint, settings)
    finally:
        run_directory.release(run_dir)
        with contextlib.suppress(OSError):  # It is empty if the run did not begin.
            run_dir.rmdir()
    if is_main_process():
        losses = f"train_loss {summary['train_loss']:.4f}"
        if summary["val_loss"] is not None:
            losses += f", val_loss {summary['val_loss']:.4f}"
        print(f"linear weights: {format_shares(summary['ran']['weights'])}")
        print(f"{summary['steps']} steps, {losses}; written to {run_dir}")
        for warning in summary["warnings"]:
            print(warning)
    if not all(math.isfinite(summary[name] or 0.0) for name in ("train_loss", "val_loss")):
        raise TrainingStopped(f"the run has ended with a loss that is not finite; see {run_dir}")
    return summary


def _train(
    trainer: Any,
    low_precision: LowPrecisionCallback,
    checkpoint: Path | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train in a directory whose lock is held, and return what summary.json holds."""
    args = trainer.args
    run_dir = Path(args.output_dir)
    steps = total_steps(args, len(trainer.train_dataset))
    if checkpoint is not None:
        resume_checks.check_settings(checkpoint, settings, args)
        resume_checks.check_steps_left(checkpoint, steps)
    if args.should_save:
        if checkpoint is not None:
            run_directory.go_on_from(run_dir, checkpoint, args.save_total_limit)
        resume_checks.write_config(run_dir, checkpoint, settings)
    if "wandb" in (args.report_to or ()):
        os.environ.setdefault("WANDB_DIR", str(run_dir))
    low_precision.put_first(trainer)
    start = time.perf_counter()
    with StopSignals() as signals:
        output = low_precision.train(
            trainer,
            None if checkpoint is None else str(checkpoint),
            signals=signals,
            resume_command=resume_command(run_dir),
        )
        summary = {
            **what_ran(low_precision.controller),
            "steps": trainer.state.global_step,
            "train_loss": output.training_loss,
            "val_loss": None if trainer.eval_dataset is None else trainer.evaluate()["eval_loss"],
            "wall_s": time.perf_counter() - start,
            "plan": low_precision.plan.totals() if low_precision.plan else None,
            "output_dir": str(run_dir),
        }
        save_result(trainer, summary)
    return summary


def make_arguments(run: SftRun, device: str) -> tuple[SFTConfig, dict[str, Any]]:
    """Return TRL's arguments, and the settings below `trainer` with their types."""
    trainer = check_trainer(run.trainer)
    autocast, _ = autocast_settings(trainer, run.precision.recipe, device)
    given = {"logging_steps": 10, "report_to": "none", "save_total_limit": 2}
    if device == "cpu":
        given |= {"use_cpu": True, "dataloader_pin_memory": False}
    given |= {key: value for key, value in trainer.items() if key not in OWN_KEYS}
    given |= autocast | check_sft(run.sft)
    given |= {
        "max_length": run.data.seq_len,
        "packing": run.data.packing,
        "dataset_text_field": run.data.text_column,
    }
    if given.get("save_strategy") == "no":
        given["save_total_limit"] = None
    if given.get("eval_strategy", "no") != "no" and not run.data.validation_fraction:
        raise UserError(
            "trainer.eval_strategy: no rows to evaluate on; set data.validation_fraction"
        )
    try:
        args = SFTConfig(**given)
    except Exception as error:
        # TRL, transformers and Accelerate raise exceptions of many classes.
        raise UserError(f"trainer: {error}") from error
    use_one_gpu(args)
    name_the_cpu(args)
    rule_environment(args, device)
    return args, trainer


def check_sft(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SFTConfig, each with the type that it has there."""
    hints = typing.get_type_hints(SFTConfig)
    others = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = {field.name for field in dataclasses.fields(SFTConfig)} - others - set(ELSEWHERE)
    if settings.get("trust_remote_code"):
        raise UserError("sft.trust_remote_code: code from files is not executed")
    for key in settings:
        if key in ELSEWHERE:
            raise UserError(f"sft.{key}: set {ELSEWHERE[key]} instead")
        if key in others:
            raise UserError(f"sft.{key}: set trainer.{key} instead")
        if key not in known:
            raise UserError(f"sft.{key}: unknown key{nearest(key, known)}")
    parsed = {key: parse_value(hints[key], value, f"sft.{key}") for key, value in settings.items()}
    for key, value in parsed.items():
        check_field(key, hints[key], value, "sft")
    return parsed


def make_adapters(lora: bool | dict[str, Any]) -> Any:
    """Return peft's configuration of the adapters; None if all weights are trained."""
    if lora is False:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("lora: needs PEFT: pip install 'lowprec[peft]'") from None
    given = {} if lora is True else lora
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    for key in given:
        if key not in known:
            raise UserError(f"lora.{key}: unknown key{nearest(key, known)}")
    try:
        return LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **given})
    except (ValueError, TypeError) as error:
        raise UserError(f"lora: {error}") from None


def fetch(model: ModelConfig) -> str:
    """Return the folder of the model, downloaded if it is the name of one on the hub."""
    if model.path is None or model.preset is not None:
        raise UserError("model: fine-tuning starts from trained weights; set model.path alone")
    if not Path(model.path).exists():
        unused = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "original/*"]
        try:
            return snapshot_download(model.path, ignore_patterns=unused)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path: no folder {model.path}, and no download: {error}"
            ) from None
    if not list(Path(model.path).glob("*.safetensors")):
        raise UserError(f"model.path: {model.path} holds no weights (*.safetensors)")
    return model.path


def load_tokenizer(path: str, where: str = "data.tokenizer") -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder or on the hub."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: {path} holds no tokenizer: {reason}") from None


def load_model(run: SftRun, path: str, vocabulary: int) -> Any:
    """Return the model with its weights in fp32."""
    model = run.model.model_copy(update={"path": path})
    config = build_config(model, vocabulary)
    check_length(config, run.data.seq_len)
    return build_model(model, config, attn_implementation="sdpa")


def load_rows(data: SftData) -> Dataset:
    """Return all rows of the data's sources."""
    sources = resolve_sources(DataConfig(source=data.source))
    files = [file.path for source in sources for file in source.files]
    readers = {READERS[path.suffix.lower()] for path in files if path.suffix.lower() in READERS}
    if any(source.kind in ("python-stdlib", "site-packages") for source in sources):
        raise UserError(f"data.source: {data.source} holds programs, not rows to fine-tune on")
    try:
        if not files and len(sources) == 1:
            return load_dataset(sources[0].name, data.hub_config, split=data.hub_split)
        if len(readers) != 1 or any(source.kind == "hub" for source in sources):
            raise UserError("data.source: give files of one kind, or one dataset of the hub")
        names = [str(path) for path in files]
        return load_dataset(readers.pop(), data_files=names, split="train")
    except UserError:
        raise
    # `datasets` raises errors of many kinds, for what it can't find, download, read or convert.
    except Exception as error:
        raise UserError(f"data.source: {data.source} can't be read: {error}") from None


def check_rows(
    rows: Dataset, data: SftData, tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    """Raise UserError if the rows have no column to train on, or chats have no template."""
    columns = set(rows.column_names)
    if not len(rows):
        raise UserError(f"data.source: {data.source} holds no rows")
    chats = "messages" in columns
    if not (chats or {"prompt", "completion"} <= columns or data.text_column in columns):
        raise UserError(
            f"data.source: rows have {', '.join(sorted(columns)[:8])}; expected messages, or "
            f"prompt and completion, or '{data.text_column}' (data.text_column)"
        )
    if chats and not template and tokenizer.chat_template is None:
        raise UserError(
            "data.source: rows are chats, and the tokenizer has no chat template; set "
            "sft.chat_template_path"
        )


def split(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on and those to evaluate on."""
    if not fraction:
        return rows, None
    held = round(len(rows) * fraction)
    if not 0 < held < len(rows):
        raise UserError(f"data.validation_fraction: {fraction:g} of {len(rows)} rows is {held}")
    parts = rows.train_test_split(test_size=held, seed=seed)
    return parts["train"], parts["test"]


if __name__ == "__main__":
    with reported("sft.py"):
        main(sys.argv[1:])
