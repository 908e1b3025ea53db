"""The Plan: what runs in which precision on which backend, natively or emulated, and why something
was left alone."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowprec.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class GemmPlan:
    """One of a layer's three products."""

    gemm: str
    """fprop, dgrad or wgrad."""
    equation: str
    backend: str
    native: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One linear layer, or one weight of all experts of a mixture."""

    name: str
    kind: str
    """The module's class."""
    shape: tuple[int, int]
    """(output features N, input features K)."""
    recipe: str | None
    """None: left alone."""
    rule: str
    """The rule that decided: its expression, or "default"."""
    gemms: tuple[GemmPlan, ...] = ()
    reason: str = ""
    """Why it was left alone, or is emulated."""
    blocked: bool = False
    """It was meant to be converted, but can't be."""
    experts: int = 1
    """How many matrices of this shape the parameter holds."""

    @property
    def converted(self) -> bool:
        return self.recipe is not None

    @property
    def native(self) -> bool:
        return self.converted and all(gemm.native for gemm in self.gemms)

    @property
    def status(self) -> str:
        return "native" if self.native else "emulated" if self.converted else "left alone"

    @property
    def weights(self) -> int:
        return self.experts * self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """A choice outside the linear layers: attention, kernels, compile, AMP."""

    name: str
    choice: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every linear layer of a model and what happens to it."""

    device: str
    """The device type it was made for."""
    layers: tuple[LayerPlan, ...]
    parts: tuple[PartPlan, ...] = ()

    def with_parts(self, parts: Iterable[PartPlan]) -> "Plan":
        return replace(self, parts=(*self.parts, *parts))

    @property
    def converted(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.converted]

    def totals(self) -> dict[str, Any]:
        """Counts of layers by status and by recipe, and the share of linear weights that is
        converted."""
        weights = sum(layer.weights for layer in self.layers)
        return {
            "linears": len(self.layers),
            **dict.fromkeys(("native", "emulated", "left alone"), 0),
            **Counter(layer.status for layer in self.layers),
            "recipes": dict(Counter(layer.recipe for layer in self.converted)),
            "converted_weights": sum(layer.weights for layer in self.converted) / weights
            if weights
            else 0.0,
        }

    def summary(self) -> str:
        """One line: '21 of 22 linears converted (97.3% of their weights): fp8_blockwise 21;
        emulated on cpu'."""
        totals = self.totals()
        recipes = (
            ", ".join(f"{name} x {count}" for name, count in totals["recipes"].items())
            or "no recipe"
        )
        return (
            f"{len(self.converted)} of {totals['linears']} linear layers converted "
            f"({totals['converted_weights']:.1%} of their weights): "
            f"{recipes}; {totals['native']} native, {totals['emulated']} emulated on {self.device}"
        )

    def to_dict(self) -> dict[str, Any]:
        layers = [
            {**asdict(layer), "converted": layer.converted, "native": layer.native}
            for layer in self.layers
        ]
        return {
            "device": self.device,
            "totals": self.totals(),
            "layers": layers,
            "parts": [asdict(part) for part in self.parts],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_atomically(
            Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        )

    def __str__(self) -> str:
        rows = [("layers", "N x K", "count", "recipe", "backend", "status")]
        reasons: dict[str, list[str]] = {}
        for group in self._groups():
            first = group[0]
            backends = "/".join(dict.fromkeys(gemm.backend for gemm in first.gemms)) or "-"
            shape = (
                f"{first.experts} x " * (first.experts > 1) + f"{first.shape[0]} x {first.shape[1]}"
            )
            rows.append(
                (
                    _merged_name(group),
                    shape,
                    str(len(group)),
                    first.recipe or "-",
                    backends,
                    first.status,
                )
            )
            if first.reason:
                reasons.setdefault(f"{first.status}: {first.reason}", []).append(
                    _merged_name(group)
                )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.parts:
            width = max(len(part.name) for part in self.parts)
            lines += [
                "",
                *(
                    f"{part.name.ljust(width)}  {part.choice}"
                    + f" ({part.reason})" * bool(part.reason)
                    for part in self.parts
                ),
            ]
        if reasons:
            lines += [
                "",
                *(
                    f"{reason} [{len(names)} of {len(rows) - 1} rows]"
                    for reason, names in reasons.items()
                ),
            ]
        return "\n".join([*lines, "", self.summary()])

    def _groups(self) -> list[list[LayerPlan]]:
        """Layers that differ in the numbers of their names only."""
        groups: dict[Any, list[LayerPlan]] = {}
        for layer in self.layers:
            key = (re.sub(r"\d+", "#", layer.name), replace(layer, name=""))
            groups.setdefault(key, []).append(layer)
        return list(groups.values())


def _merged_name(group: list[LayerPlan]) -> str:
    """'model.layers.{0-11}.mlp.up_proj' for layers whose names differ in one number; the first and
    the last name otherwise."""
    if len(group) == 1:
        return group[0].name
    split = [re.split(r"(\d+)", layer.name) for layer in group]
    varying = [i for i in range(len(split[0])) if len({parts[i] for parts in split}) > 1]
    if len(varying) > 1:
        return f"{group[0].name} ... {group[-1].name}"
    numbers = [int(parts[varying[0]]) for parts in split]
    merged = list(split[0])
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    merged[varying[0]] = (
        f"{{{numbers[0]}-{numbers[-1]}}}"
        if consecutive
        else "{" + ",".join(map(str, numbers)) + "}"
    )
    return "".join(merged)
