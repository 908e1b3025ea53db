"""OperandSpec: how one operand of a GEMM is represented, and its notation in configurations and
equations.

The notation is an element format and, in brackets, a block with its scale format and options:

    bf16                            cast, without scales
    e4m3[1x128 fp32]                one fp32 scale for 128 neighbours along the contraction axis
    e2m1[16x16 e4m3 4/6]            NVFP4 weights, four over six (4/6:mae chooses by magnitudes)
    e2m1[1x16 e4m3 prescale:16/17 stochastic]
    e2m1[1x32 e8m0:floor prescale:0.75 stochastic]
    int8[row fp32 asymmetric]
    e5m2[tensor fp32 delayed:1024]
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from lowprec.errors import UserError, nearest
from lowprec.formats.element import E2M1, E4M3, E5M2, FORMATS, ElementFormat
from lowprec.formats.rounding import ROUNDINGS, Rounding
from lowprec.formats.scaling import ALL, ERROR_MEASURES, RULES, BlockScaling


@dataclass(frozen=True, kw_only=True)
class OperandSpec:
    """The representation of an operand [R, K] whose contraction axis K is last."""

    element: ElementFormat
    """Format of an element."""
    scaling: BlockScaling | None = None
    """Scaling of blocks of elements. None: the elements are cast without scales (bf16, fp16,
    fp32)."""
    rounding: Rounding = "nearest"
    """Rounding of an element to its format."""
    # The three fields below choose the kernels. They are strings and a bool, computed once, because
    # torch.compile makes variables of integers that it finds in objects.
    kind: str = field(init=False, repr=False, compare=False)
    """Name of the scaling in FP8 kernels: 1x128, 128x128, tensor or row; "" if no FP8 kernel takes
    it."""
    notation: str = field(init=False, repr=False, compare=False)
    """Notation that `str` returns and `parse` reads."""
    one_pass: bool = field(init=False, repr=False, compare=False)
    """Flag: a kernel can quantise and dequantise the operand in one pass over memory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _kind(self.element, self.scaling))
        object.__setattr__(self, "notation", _notation(self.element, self.scaling, self.rounding))
        object.__setattr__(self, "one_pass", _one_pass(self.element, self.scaling, self.rounding))
        element = self.element
        scaling = self.scaling
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"unknown rounding '{self.rounding}'{nearest(self.rounding, ROUNDINGS)}"
            )
        if scaling is None:
            if element.saturates:
                raise ValueError(f"{element.name} needs a scaling: it can't hold unscaled values")
            return
        if not scaling.symmetric and not element.is_integer:
            raise ValueError(
                f"{element.name} is symmetric about zero: a zero point goes with an integer format"
            )
        if not element.saturates:
            raise ValueError(
                f"{element.name} takes no scaling: it has the range of fp32, or is used with loss "
                "scaling"
            )
        if scaling.scale_format == "e4m3" and element != E2M1:
            raise ValueError(
                "an e4m3 scale under a tensor scale goes with e2m1 elements (NVFP4), not "
                f"{element.name}"
            )
        if scaling.scale_format == "e8m0" and scaling.rule == "even" and element.is_integer:
            raise ValueError(
                "the rule 'even' rounds amax to a float's mantissa: an integer format has none"
            )

    @property
    def stochastic(self) -> bool:
        """Flag: rounding draws random numbers."""
        return self.rounding == "stochastic"

    def __str__(self) -> str:
        return self.notation

    @classmethod
    def parse(cls, text: str) -> "OperandSpec":
        """Return the spec that `text` denotes; the inverse of `str`.

        Raises:
            UserError: `text` can't be read. The message has the nearest known word.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(?:\[([^\]]*)\])?\s*", text)
        if match is None:
            raise UserError(f"'{text}' is no operand: write it like 'bf16' or 'e4m3[1x128 fp32]'")
        name = match[1]
        words = (match[2] or "").split()
        if name not in FORMATS:
            raise UserError(f"unknown element format '{name}'{nearest(name, FORMATS)}")
        roundings: list[Any] = [word for word in words if word in ROUNDINGS]
        words = [word for word in words if word not in ROUNDINGS]
        if len(roundings) > 1:
            raise UserError(f"'{text}' names two roundings: {roundings[0]} and {roundings[1]}")
        try:
            scaling = _parse_scaling(words) if words else None
            return cls(
                element=FORMATS[name],
                scaling=scaling,
                rounding=roundings[0] if roundings else "nearest",
            )
        except ValueError as error:
            raise UserError(f"'{text}': {error}") from None


def _notation(element: ElementFormat, scaling: BlockScaling | None, rounding: str) -> str:
    """Return `OperandSpec.notation`."""
    words = [str(scaling)] * (scaling is not None) + [rounding] * (rounding != "nearest")
    return f"{element.name}[{' '.join(words)}]" if words else element.name


def _one_pass(element: ElementFormat, scaling: BlockScaling | None, rounding: str) -> bool:
    """Return `OperandSpec.one_pass`."""
    if scaling is None or element.is_integer or not element.saturates or rounding == "toward_zero":
        return False
    plain = (
        scaling.rule != "quest"
        and not scaling.four_over_six
        and not scaling.history
        and scaling.symmetric
    )
    return plain and scaling.block in ((1, 16), (1, 32), (1, 64), (1, 128))


def _kind(element: ElementFormat, scaling: BlockScaling | None) -> str:
    """Return `OperandSpec.kind`."""
    if (
        scaling is None
        or element not in (E4M3, E5M2)
        or scaling.scale_format == "e4m3"
        or scaling.prescale != 1.0
    ):
        return ""
    kind = {(1, 128): "1x128", (128, 128): "128x128", (ALL, ALL): "tensor", (1, ALL): "row"}.get(
        scaling.block, ""
    )
    return kind if scaling.scale_format == "fp32" or kind in ("1x128", "128x128") else ""


def _parse_scaling(words: list[str]) -> BlockScaling:
    """Return the scaling that the words in brackets denote, its block first."""
    fields: dict[str, Any] = {"block": _parse_block(words[0])}
    for word in words[1:]:
        new = _parse_word(word)
        if twice := fields.keys() & new.keys():
            raise UserError(f"'{word}' sets {twice.pop()} a second time")
        fields |= new
    return BlockScaling(**fields)


def _parse_word(word: str) -> dict[str, Any]:
    """Return the fields of `BlockScaling` that a word sets."""
    key, _, value = word.partition(":")
    if word in ("fp32", "e4m3"):
        return {"scale_format": word}
    if word == "e8m0" or (key == "e8m0" and value in RULES):
        return {"scale_format": "e8m0"} | ({"rule": value} if value else {})
    if word == "asymmetric":
        return {"symmetric": False}
    if word == "4/6" or (key == "4/6" and value in ERROR_MEASURES):
        return {"four_over_six": True} | ({"four_over_six_error": value} if value else {})
    if key == "prescale" and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", value):
        return {"prescale": float(value)}
    if key == "prescale" and re.fullmatch(r"[1-9]\d{0,5}/[1-9]\d{0,5}", value):
        return {"prescale": float(Fraction(value))}
    if key == "delayed" and value.isdecimal():
        return {"history": int(value)}
    known = (
        "fp32",
        "e4m3",
        *(f"e8m0:{rule}" for rule in RULES),
        "asymmetric",
        "4/6",
        "4/6:mae",
        "prescale:0.75",
        "prescale:16/17",
        "delayed:1024",
        *ROUNDINGS,
    )
    raise UserError(f"unknown word '{word}'{nearest(word, known)}")


def _parse_block(word: str) -> tuple[int, int]:
    """Return the block's rows and columns."""
    if word == "tensor":
        return ALL, ALL
    if word == "row":
        return 1, ALL
    parts = word.split("x")
    if len(parts) != 2 or not all(part == "all" or part.isdecimal() for part in parts):
        raise UserError(f"'{word}' is no block: write 'tensor', 'row' or ROWSxCOLUMNS like '1x128'")
    rows, cols = (ALL if part == "all" else int(part) for part in parts)
    return rows, cols
