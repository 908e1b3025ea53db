"""No file makes a loader execute code: in each file that a library reads lies a program, which would make a folder."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as sharded
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from lowprec import LowPrecisionCallback, UserError
from lowprec.config.yaml import load
from lowprec.training.accelerate import controller, prepare
from lowprec.training.checkpoint.manifest import MANIFEST, write_manifest
from lowprec.training.checkpoint.no_code import check_no_code
from lowprec.training.data import load_data
from lowprec.training.data.config import DataConfig
from lowprec.training.data.tokenizer import _wrap, byte_tokenizer
from lowprec.training.run.models import ModelConfig, build_config, build_model
from tests.builders import small_trainer, tiny_llama


class Program:
    """An object whose pickle makes the folder `marker` when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def as_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Program(marker)))


def as_archive(path: Path, marker: Path) -> None:
    torch.save({"state": Program(marker)}, path)


@pytest.fixture
def marker(tmp_path: Path):
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def test_the_program_would_run(tmp_path: Path):
    for number, write in enumerate((as_pickle, as_archive)):
        write(tmp_path / "file", tmp_path / str(number))
        with pytest.raises(UserError):
            check_no_code(_folder(tmp_path, "file", write, tmp_path / str(number)))
        assert not (tmp_path / str(number)).exists()
        if write is as_pickle:
            pickle.loads((tmp_path / "file").read_bytes())
        else:
            torch.load(tmp_path / "file", weights_only=False)
        assert (tmp_path / str(number)).exists()


def _folder(base: Path, name: str, write: Callable[[Path, Path], None], marker: Path) -> Path:
    folder = base / "checked"
    folder.mkdir(exist_ok=True)
    write(folder / f"{name}.pt", marker)
    return folder


def one_line(error: pytest.ExceptionInfo[UserError], name: str) -> None:
    text = str(error.value)
    assert name in text
    assert "\n" not in text


# A checkpoint of the Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    small_trainer(folder, LowPrecisionCallback("mxfp8"), max_steps=2, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


def copied(checkpoint: Path, target: Path) -> Path:
    """Copy a checkpoint without its manifest, as another program would write one."""
    shutil.copytree(checkpoint, target)
    (target / MANIFEST).unlink()
    return target


def resume(checkpoint: Path) -> None:
    callback = LowPrecisionCallback("mxfp8")
    trainer = small_trainer(checkpoint.parent / "run", callback, max_steps=2)
    callback.train(trainer, str(checkpoint))


@pytest.mark.parametrize("write", [as_pickle, as_archive])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin", "adapter/adapter_model.bin"]
)
def test_a_checkpoint_of_the_trainer(name: str, write: Callable[[Path, Path], None], trained: Path, marker: Path, tmp_path: Path):
    checkpoint = copied(trained, tmp_path / "checkpoint-1")
    (checkpoint / name).parent.mkdir(exist_ok=True)
    write(checkpoint / name, marker)
    with pytest.raises(UserError) as error:
        resume(checkpoint)
    one_line(error, name)
    if name != "scaler.pt":  # which nothing reads here
        shutil.copy(checkpoint / name, tmp_path / "alone.pt")
        with pytest.raises(Exception):  # noqa: B017  (the Trainer's own loaders refuse it in their way)
            torch.load(tmp_path / "alone.pt", weights_only=True)


@pytest.mark.parametrize("write", [as_pickle, as_archive])
def test_a_program_in_the_place_of_weights_that_the_manifest_names(
    write: Callable[[Path, Path], None], trained: Path, marker: Path, tmp_path: Path
):
    checkpoint = copied(trained, tmp_path / "checkpoint-1")
    write(checkpoint / "model.safetensors", marker)
    write_manifest(checkpoint, 1)
    with pytest.raises(UserError) as error:
        resume(checkpoint)
    one_line(error, "model.safetensors")


def test_what_nothing_reads_does_not_stop_a_run(trained: Path, marker: Path, tmp_path: Path):
    checkpoint = copied(trained, tmp_path / "checkpoint-1")
    as_archive(checkpoint / "training_args.bin", marker)
    resume(checkpoint)


def test_the_best_checkpoint_of_a_run_is_checked(trained: Path, marker: Path, tmp_path: Path):
    checkpoint = copied(trained, tmp_path / "checkpoint-1")
    best = copied(trained, tmp_path / "elsewhere")
    as_archive(best / "pytorch_model.bin", marker)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": str(best)}))
    with pytest.raises(UserError) as error:
        resume(checkpoint)
    one_line(error, "elsewhere/pytorch_model.bin")


def test_an_index_outside_of_its_folder(trained: Path, tmp_path: Path):
    checkpoint = copied(trained, tmp_path / "checkpoint-1")
    other = shutil.copy(checkpoint / "model.safetensors", tmp_path / "other.safetensors")
    for name in ("../other.safetensors", str(other)):
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UserError) as error:
            resume(checkpoint)
        one_line(error, "model.safetensors.index.json")
        with pytest.raises(UserError) as error:
            check_no_code(checkpoint)
        one_line(error, "outside of its folder")


def test_adapters_of_peft(marker: Path, tmp_path: Path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    as_archive(tmp_path / "adapter" / "adapter_model.bin", marker)
    with pytest.raises(UserError) as error:
        check_no_code(tmp_path / "adapter")
    one_line(error, "adapter_model.bin: holds ")
    with pytest.raises(pickle.UnpicklingError):
        model.load_adapter(str(tmp_path / "adapter"), "default")


# A checkpoint of Accelerate


@pytest.fixture
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerated() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    prepare(accelerator, model, optimizer, rates, precision={"recipe": "mxfp8", "guard": True})
    return accelerator


@pytest.mark.usefixtures("fresh_state")
def test_a_checkpoint_of_accelerate(marker: Path, tmp_path: Path):
    accelerator = accelerated()
    accelerator.save_state(str(tmp_path / "good"))
    names = sorted(path.name for path in (tmp_path / "good").iterdir())
    assert "lowprec_run.json" in names
    assert not [name for name in names if name.startswith("custom_checkpoint")]
    accelerator.load_state(str(tmp_path / "good"))
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model.bin", "custom_checkpoint_0.pkl"):
        for write in (as_pickle, as_archive):
            folder = shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
            write(folder / name, marker)
            with pytest.raises(UserError) as error:
                accelerator.load_state(str(folder))
            one_line(error, name)
            shutil.rmtree(folder)
    for text in ("", "{", "[]", '{"step": 3}'):
        folder = shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        (folder / "lowprec_run.json").write_text(text)
        with pytest.raises(UserError) as error:
            accelerator.load_state(str(folder))
        one_line(error, "lowprec_run.json")


@pytest.mark.usefixtures("fresh_state")
def test_a_checkpoint_of_an_earlier_version(tmp_path: Path):
    """The state of a run was an object that is registered with the accelerator, among those of the user."""

    class Registered:
        def __init__(self, state: dict[str, Any]) -> None:
            self.state = state

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    accelerator = accelerated()
    accelerator.save_state(str(tmp_path))
    state = {**json.loads((tmp_path / "lowprec_run.json").read_text()), "skipped_steps": 5}
    (tmp_path / "lowprec_run.json").unlink()
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"holds no lowprec_run\.json"):
        accelerator.load_state(str(tmp_path))
    torch.save({"mine": 1}, tmp_path / "custom_checkpoint_0.pkl")
    torch.save(state, tmp_path / "custom_checkpoint_1.pkl")
    mine = Registered({})
    again = accelerated()
    again.register_for_checkpointing(mine)
    again.load_state(str(tmp_path))
    assert mine.state == {"mine": 1}
    assert controller(again).skipped_steps == 5
    assert again._custom_objects == [mine]


# A sharded checkpoint


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "optimizer_0"
    state = {"lr": 1e-3, "betas": (0.9, 0.99), "exp_avg": torch.ones(8), "bf16": torch.ones(8, dtype=torch.bfloat16)}
    sharded.save({"optimizer": state}, storage_writer=sharded.FileSystemWriter(folder), planner=DefaultSavePlanner(), no_dist=True)
    return folder


def load_sharded(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"lr": 0.0, "betas": (0.0, 0.0), "exp_avg": torch.zeros(8), "bf16": torch.zeros(8, dtype=torch.bfloat16)}
    reader = sharded.FileSystemReader(folder)
    sharded.load({"optimizer": state}, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    return state


def put_in_metadata(folder: Path, marker: Path) -> str:
    as_pickle(folder / ".metadata", marker)
    return ".metadata: holds "


def put_in_a_member_of_metadata(folder: Path, marker: Path) -> str:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Program(marker)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return ".metadata: holds "


def put_in_a_value(folder: Path, marker: Path) -> str:
    """Put a program in the place of the learning rate, which is no tensor."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "optimizer.lr")
    program = io.BytesIO()
    torch.save(Program(marker), program)
    shard = folder / info.relative_path
    info.offset = shard.stat().st_size
    info.length = len(program.getvalue())
    shard.write_bytes(shard.read_bytes() + program.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return ".distcp: holds "


def put_in_the_place_of_a_shard(folder: Path, marker: Path) -> str:
    as_pickle(folder / "__0_0.distcp", marker)
    return ".distcp: is not the file"


def name_a_file_outside(folder: Path, marker: Path) -> str:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return "outside of its folder"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "damage", [put_in_metadata, put_in_a_member_of_metadata, put_in_a_value, put_in_the_place_of_a_shard, name_a_file_outside]
)
def test_a_sharded_checkpoint(damage: Callable[[Path, Path], str], shards: Path, marker: Path, tmp_path: Path):
    folder = shutil.copytree(shards, tmp_path / "checkpoint-2" / "optimizer_0")
    check_no_code(folder.parent)
    assert load_sharded(folder)["lr"] == 1e-3
    found = damage(folder, marker)
    with pytest.raises(UserError) as error:
        check_no_code(folder.parent)
    one_line(error, found)


# Models, tokenizers, data


PROGRAM = "from pathlib import Path\nPath({!r}).mkdir()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


@pytest.fixture
def says_yes(monkeypatch: pytest.MonkeyPatch):
    """Answer every question with yes."""
    monkeypatch.setattr("builtins.input", lambda *question: "y")


@pytest.mark.usefixtures("says_yes")
def test_a_model_that_asks_for_code(marker: Path, tmp_path: Path):
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "code.py").write_text(PROGRAM.format(str(marker)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": auto_map}))
    with pytest.raises(UserError) as error:
        build_config(ModelConfig(path=str(tmp_path)), 64)
    one_line(error, "auto_map")
    # A model that transformers has a class for is made of that class, also by kernels of its own choice.
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"auto_map": auto_map, "attn_implementation": "someone/kernels", "_attn_implementation": "someone/kernels"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **own}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(PROGRAM.format(str(marker)))
    model = ModelConfig(path=str(tmp_path))
    assert type(build_model(model, build_config(model, 64), attn_implementation="sdpa")).__name__ == "LlamaForCausalLM"


def test_weights_of_a_model(marker: Path, tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    config = build_config(model, 64)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../model.safetensors"}}))
    with pytest.raises(UserError) as error:
        build_model(model, config, attn_implementation="sdpa")
    one_line(error, "model.safetensors.index.json")
    index.unlink()
    (tmp_path / "model.safetensors").unlink()
    as_archive(tmp_path / "pytorch_model.bin", marker)
    with pytest.raises(UserError) as error:
        build_model(model, config, attn_implementation="sdpa")
    one_line(error, "pytorch_model.bin is a pickle")


@pytest.mark.usefixtures("says_yes")
def test_a_tokenizer_that_asks_for_code(marker: Path, tmp_path: Path):
    (tmp_path / "code.py").write_text(PROGRAM.format(str(marker)))
    settings = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        load_data(DataConfig(tokenizer=str(tmp_path), cache_dir=str(tmp_path / "cache")))
    one_line(error, "data.tokenizer")


def test_a_chat_template_is_run_in_a_sandbox(marker: Path, tmp_path: Path):
    tokenizer = _wrap(byte_tokenizer())
    tokenizer.chat_template = "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}".replace("MARKER", str(marker))
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_a_cache_of_tokens(marker: Path, tmp_path: Path):
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} is a number. " * 50)
    config = DataConfig(source=str(tmp_path / "text"), tokenizer="bytes", seq_len=32, packing=False, cache_dir=str(tmp_path / "cache"))
    load_data(config)
    files = list((tmp_path / "cache").rglob("*.npy"))
    assert files
    for path in files:
        np.save(path, np.array([Program(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(Exception):  # noqa: B017  (the cache finds it damaged in its own way)
        load_data(config).train[0]


def test_a_dataset_with_a_loading_script(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.py").write_text(PROGRAM.format(str(marker)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        load_data(DataConfig(source="own", tokenizer="bytes", seq_len=32, cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir ['{}']", "!!python/object/new:os.mkdir ['{}']", "!!python/name:os.mkdir"])
def test_tags_of_yaml(tag: str, marker: Path):
    with pytest.raises(UserError) as error:
        load("x: " + tag.format(marker), "config.yaml")
    one_line(error, "config.yaml: not YAML")
