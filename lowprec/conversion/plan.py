"""The Plan: the precision and the backend of each linear layer, native or emulated, and the reason
where a layer stays in high precision."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from lowprec.conversion.shares import flops_by_recipe, weights_by_recipe
from lowprec.files import to_json, write_atomically

NATIVE = "native"
EMULATED = "emulated"
KEPT = "kept in high precision"
NOT_CALLED = "not called"


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
    """None: kept in high precision."""
    rule: str
    """The rule that decided: its expression, or "default"."""
    gemms: tuple[GemmPlan, ...] = ()
    reason: str = ""
    """The reason why it is kept in high precision, or emulated."""
    blocked: bool = False
    """Flag: the layer was meant to be converted, but can't be."""
    experts: int = 1
    """Number of matrices of this shape in the parameter."""
    per_token: float = 1
    """Number of these matrices that multiply a token."""
    slow: bool = False
    """Flag: it is kept in high precision because the recipe would slow it down."""
    called: bool = True
    """Flag: the model calls the layer, as far as is known. False: it was converted, but the first
    step did not multiply by its weight in the recipe."""

    @property
    def converted(self) -> bool:
        """Flag: the layer has a recipe."""
        return self.recipe is not None

    @property
    def native(self) -> bool:
        """Flag: all three products run in the recipe's formats on the hardware."""
        return self.converted and all(gemm.native for gemm in self.gemms)

    @property
    def status(self) -> str:
        """NATIVE, EMULATED, KEPT or NOT_CALLED."""
        if not self.called:
            return NOT_CALLED
        if not self.converted:
            return KEPT
        return NATIVE if self.native else EMULATED

    @property
    def weights(self) -> int:
        """Number of weights, in all experts."""
        return self.experts * self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """A choice outside the linear layers: attention, kernels, compile, AMP."""

    name: str
    choice: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every linear layer of a model, with its precision.

    `print(plan)` shows a table; a notebook shows it in HTML.
    """

    device: str
    """The device type that it was made for."""
    layers: tuple[LayerPlan, ...]
    parts: tuple[PartPlan, ...] = ()
    recipe: str | None = None
    """The recipe that the configuration asks for."""
    warnings: tuple[str, ...] = ()
    """Lines that a user should see: the recipe runs in few layers, why, and how to change that."""

    def with_parts(self, parts: Iterable[PartPlan]) -> "Plan":
        """Return a plan that shows these parts as well."""
        return replace(self, parts=(*self.parts, *parts))

    def with_uncalled(self, reasons: Mapping[str, str]) -> "Plan":
        """Return a plan in which the converted layers of these names are not called, and count as
        converted no longer.

        Args:
            reasons: why each layer was not called in the first step, by name (`observe.Calls`).
        """
        layers = tuple(
            _uncalled(layer, reasons[layer.name])
            if layer.converted and layer.name in reasons
            else layer
            for layer in self.layers
        )
        plan = replace(self, layers=layers)
        uncalled = [layer.name for layer in layers if not layer.called]
        if not uncalled:
            return plan
        why = "; ".join(plan.reasons_of(uncalled))
        warning = f"{len(uncalled)} converted layers were not called: {why}"
        return replace(plan, warnings=(*self.warnings, warning))

    @property
    def converted(self) -> list[LayerPlan]:
        """The layers that have a recipe."""
        return [layer for layer in self.layers if layer.converted]

    def reasons_of(self, names: Container[str]) -> list[str]:
        """Return a line for each reason that the rows of these layers give: the layers, with their
        numbers merged, and the reason."""
        merged: dict[str, list[str]] = {}
        for group in _groups([layer for layer in self.layers if layer.name in names]):
            merged.setdefault(group[0].reason, []).append(_merged_name(group))
        return [f"{', '.join(layers)}: {reason}" for reason, layers in merged.items()]

    def totals(self) -> dict[str, Any]:
        """Return counts of layers by status and by recipe, the share of linear weights that is
        converted, and the shares of weights and operations by recipe (`shares.py`)."""
        weights = sum(layer.weights for layer in self.layers)
        converted = sum(layer.weights for layer in self.converted)
        return {
            "linears": len(self.layers),
            **dict.fromkeys((NATIVE, EMULATED, KEPT, NOT_CALLED), 0),
            **Counter(layer.status for layer in self.layers),
            "recipes": dict(Counter(layer.recipe for layer in self.converted)),
            "converted_weights": converted / weights if weights else 0.0,
            "weights": weights_by_recipe(self.layers),
            "flops": flops_by_recipe(self.layers),
        }

    def summary(self) -> str:
        """Return one line: '21 of 22 linear layers converted (97.3% of their weights):
        fp8_blockwise x 21; 0 native, 21 emulated on cpu'."""
        totals = self.totals()
        recipes = (
            ", ".join(f"{name} x {count}" for name, count in totals["recipes"].items())
            or "no recipe"
        )
        uncalled = f"; {totals[NOT_CALLED]} not called" if totals[NOT_CALLED] else ""
        return (
            f"{len(self.converted)} of {totals['linears']} linear layers converted "
            f"({totals['converted_weights']:.1%} of their weights): {recipes}; "
            f"{totals[NATIVE]} native, {totals[EMULATED]} emulated on {self.device}{uncalled}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        layers = [
            {**asdict(layer), "converted": layer.converted, "native": layer.native}
            for layer in self.layers
        ]
        return {
            "device": self.device,
            "totals": self.totals(),
            "layers": layers,
            "parts": [asdict(part) for part in self.parts],
            "recipe": self.recipe,
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_atomically(Path(path), to_json(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    def __repr__(self) -> str:
        """Return counts by recipe and status: '<Plan for cuda: 22 linear layers, 21 fp8_blockwise
        native, 1 kept in high precision>'."""
        counts = Counter(
            f"{layer.recipe} {layer.status}" if layer.converted else layer.status
            for layer in self.layers
        )
        parts = [
            f"{len(self.layers)} linear layers",
            *(f"{count} {what}" for what, count in counts.items()),
        ]
        return f"<Plan for {self.device}: {', '.join(parts)}>"

    def __str__(self) -> str:
        groups = _groups(self.layers)
        lines = _text_table(_HEADER, [_row(group) for group in groups])
        if self.parts:
            width = max(len(part.name) for part in self.parts)
            lines += ["", *(f"{part.name.ljust(width)}  {_choice(part)}" for part in self.parts)]
        reasons: dict[str, int] = Counter(
            f"{group[0].status}: {group[0].reason}" for group in groups if group[0].reason
        )
        if reasons:
            of_all = f"of {len(groups)} rows"
            lines += ["", *(f"{reason} [{n} {of_all}]" for reason, n in reasons.items())]
        return "\n".join([*lines, "", self.summary()])

    def _repr_html_(self) -> str:
        """Return the plan as HTML, which notebooks show: the rows of `print`, each with its
        reason, the parts, and the totals."""
        rows = [(*_row(group), group[0].reason) for group in _groups(self.layers)]
        tables = [_html_table((*_HEADER, "reason"), rows)]
        if self.parts:
            parts = [(part.name, part.choice, part.reason) for part in self.parts]
            tables.append(_html_table(("part", "choice", "reason"), parts))
        return "".join([*tables, f"<p>{escape(self.summary())}</p>"])


_HEADER = ("layers", "N x K", "count", "recipe", "backend", "status")


def _row(group: list[LayerPlan]) -> tuple[str, ...]:
    """Return the cells of a group's row, as `_HEADER` names them."""
    first = group[0]
    experts = f"{first.experts} x " if first.experts > 1 else ""
    backends = dict.fromkeys(gemm.backend for gemm in first.gemms)
    return (
        _merged_name(group),
        f"{experts}{first.shape[0]} x {first.shape[1]}",
        str(len(group)),
        first.recipe or "-",
        "/".join(backends) or "-",
        first.status,
    )


def _uncalled(layer: LayerPlan, reason: str) -> LayerPlan:
    """Return the plan of a converted layer that was not called."""
    reason = f"planned as {layer.recipe}, but in the first step {reason}"
    return replace(layer, recipe=None, gemms=(), called=False, reason=reason)


def _groups(layers: Iterable[LayerPlan]) -> list[list[LayerPlan]]:
    """Return layers in groups that differ in the numbers of their names only."""
    groups: dict[Any, list[LayerPlan]] = {}
    for layer in layers:
        key = (re.sub(r"\d+", "#", layer.name), replace(layer, name=""))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _merged_name(group: list[LayerPlan]) -> str:
    """Return 'model.layers.{0-11}.mlp.up_proj' for layers whose names differ in one number; the
    first and the last name otherwise."""
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


def _choice(part: PartPlan) -> str:
    return f"{part.choice} ({part.reason})" if part.reason else part.choice


def _text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
