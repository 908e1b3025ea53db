"""Checkpoints that hold weights in low precision are refused before a run reads them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowprec import UserError
from lowprec.training.run.models import ModelConfig, build_config, build_model
from tests.builders import tiny_llama

NAME = "model.layers.0.mlp.down_proj.weight"
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


def changed(saved: Path, folder: Path, change: Change) -> Path:
    """Write the saved model with other tensors, and return its folder."""
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((saved / "config.json").read_text())
    return folder


def as_float8(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = (tensors[NAME] * 100).to(torch.float8_e4m3fn)
    tensors[f"{NAME}_scale_inv"] = torch.full((1, 1), 0.01)


def as_int8(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = (tensors[NAME] * 100).to(torch.int8)


def as_packed(tensors: dict[str, Tensor]) -> None:
    del tensors[NAME]
    tensors[NAME.replace("weight", "qweight")] = torch.zeros(8, 64, dtype=torch.int32)


def as_cast_codes(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = (tensors[NAME] * 100).to(torch.float8_e4m3fn).bfloat16()
    tensors[f"{NAME}_scale"] = torch.full((1,), 0.01)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (as_float8, f"{NAME} is F8_E4M3"),
        (as_int8, f"{NAME} is I8"),
        (as_packed, "model.layers.0.mlp.down_proj.qweight is I32"),
        (as_cast_codes, f"{NAME}_scale is a scale"),
    ],
)
def test_codes_without_a_quantization_config_are_refused_in_one_line(change: Change, what: str, saved: Path, tmp_path: Path):
    folder = changed(saved, tmp_path, change)
    with pytest.raises(UserError) as error:
        build_config(ModelConfig(path=str(folder)), 64)
    assert str(error.value) == (
        f"model.path: {folder / 'model.safetensors'} holds weights in low precision ({what}), and config.json has no quantization_config "
        "that says how to read them: a run starts from weights in high precision: dequantise the model, save it in bf16 or fp32 with "
        "`save_pretrained`, and take that folder"
    )


def test_a_quantised_model_is_refused(saved: Path, tmp_path: Path):
    folder = changed(saved, tmp_path, as_float8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    for path in (folder, folder / "config.json"):
        with pytest.raises(UserError, match=r"model\.path: .* is a quantised model \(quantization_config: fp8\): a run starts from"):
            build_config(ModelConfig(path=str(path)), 64)


def test_weights_in_high_precision_and_integers_that_are_no_weights_are_read(saved: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()
        tensors["model.position_ids"] = torch.zeros(1, 8, dtype=torch.int32)
        tensors["model.mask"] = torch.zeros(8, 8, dtype=torch.uint8)

    model = ModelConfig(path=str(changed(saved, tmp_path, change)))
    built = build_model(model, build_config(model, 64), attn_implementation="eager")
    assert built.get_parameter(NAME).dtype == torch.float32
