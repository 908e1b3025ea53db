"""Refuse weights that are stored in low precision already.

transformers casts what a file holds to the model's dtype. Codes of float8 or int8 without their
scales are other weights than the model's, and the run would go on with them.
"""

import json
import re
from pathlib import Path
from typing import Any

from lowprec.errors import UserError
from lowprec.training.checkpoint.structure import check_safetensors

_CODES = re.compile(r"F[468](_.*)?|[IU]4")
"""Dtypes of safetensors that hold codes only."""

_SMALL_INTEGERS = ("I8", "U8", "I16", "I32", "U32")
"""Dtypes that hold codes, possibly several in a number, if the tensor is a weight."""

_WEIGHT = re.compile(r"(.*\.)?(weight|weight_packed|qweight|.*_proj|.*_blocks)")
"""Names of weights; other small integers may be indices or masks."""

_SCALE = re.compile(r"(.*\.weight|.*_proj)_(scale|scale_inv|scale_2|absmax)")
"""Names of the scales beside codes."""

_ADVICE = (
    "a run starts from weights in high precision: dequantise the model, save it in bf16 or fp32 "
    "with `save_pretrained`, and take that folder"
)


def check_stored_weights(path: Path, config: Any) -> None:
    """Raise UserError if a folder in Hugging Face's format holds weights in low precision, or a
    configuration that says so.

    Args:
        path: the folder, or a config.json.
        config: the folder's configuration.
    """
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "quantised")
        raise UserError(
            f"model.path: {path} is a quantised model (quantization_config: {method}): {_ADVICE}"
        )
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else ():
        if (found := _sign_of_codes(file)) is not None:
            raise UserError(
                f"model.path: {file} holds weights in low precision ({found}), and config.json "
                f"has no quantization_config that says how to read them: {_ADVICE}"
            )


def _sign_of_codes(file: Path) -> str | None:
    """Return what shows that a file holds codes, a tensor and its dtype or scales; None if nothing
    does."""
    if check_safetensors(file) is not None:
        return None  # damaged: the reader of the weights says how
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype = str(entry.get("dtype"))
        is_weight = len(entry.get("shape", ())) > 1 and _WEIGHT.fullmatch(name) is not None
        if _CODES.fullmatch(dtype) or (is_weight and dtype in _SMALL_INTEGERS):
            return f"{name} is {dtype}"
    scale = next(filter(_SCALE.fullmatch, header), None)
    return None if scale is None else f"{scale} is a scale"
