"""Tables for the terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_WIDTH = 110


def summary_table(summary: dict[str, Any]) -> str:
    """The end of a run."""
    table = Table(title=f"{summary['recipe']}: {summary['steps']} steps in {_duration(summary['wall_s'])}", title_justify="left")
    table.add_column("result")
    table.add_column("value", overflow="fold")
    bits = summary["bits_per_byte"]
    speed = summary["tokens_per_second"]
    table.add_row("validation loss", f"{summary['val_loss']:.4f} nats per token")
    table.add_row("bits per byte", "unknown: the tokenizer does not tell the bytes of a token" if bits is None else f"{bits:.4f}")
    table.add_row("tokens per second", "-" if speed is None else f"{speed:,.0f}")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    totals = summary["plan"]
    table.add_row(
        "precision",
        f"{totals['native'] + totals['emulated']} of {totals['linears']} linear layers converted, "
        f"{totals['native']} native and {totals['emulated']} emulated on {summary['device']}",
    )
    table.add_row("written to", summary["output_dir"])
    return _text(table)


def doctor_table(report: dict[str, Any]) -> str:
    """The machine."""
    device = report["device"]
    machine = Table(show_header=False, title="machine", title_justify="left")
    machine.add_row("device", ", ".join(f"{key} {value}" for key, value in device.items()))
    machine.add_row("platform", f"{report['platform']}, Python {report['python']}")
    machine.add_row("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in report["versions"].items()))

    recipes = Table(title=f"recipes on {device['type']}", title_justify="left")
    for column in ("recipe", "runs", "why"):
        recipes.add_column(column)
    for recipe in report["recipes"]:
        recipes.add_row(recipe["name"], "native" if recipe["native"] else "emulated", escape(recipe["reason"]))

    optional = Table(title="optional parts", title_justify="left")
    for column in ("package", "for", "state"):
        optional.add_column(column)
    for part in report["optional"]:
        optional.add_row(part["name"], part["what"], part["version"] or escape(f"missing: {part['install']}"))
    return "\n".join(map(_text, (machine, recipes, optional)))


def bench_table(result: dict[str, Any], rivals: tuple[str, ...]) -> str:
    """Quantise and dequantise: milliseconds, and how many times a rival's they are."""
    rows, columns = result["shape"]
    how = "compiled" if result["compiled"] else "eager"
    title = f"quantise + dequantise fp32 {rows} x {columns} on {result['device']}, {how}; ms, median (p20-p80)"
    table = Table(title=title, title_justify="left")
    for column in ("operand", "notation", "lowprec", "copies", *(name for rival in rivals for name in (rival, "times", "same bits"))):
        table.add_column(column)
    copy = result["copy"]["median"]
    for row in result["rows"]:
        cells = [row["name"], escape(row["operand"]), _milliseconds(row["ours"]), f"{row['ours']['median'] / copy:.0f}"]
        for rival in rivals:
            theirs = row[rival]
            ratio = "-" if theirs is None else f"{theirs['median'] / row['ours']['median']:.1f}"
            cells += [_milliseconds(theirs), ratio, {True: "yes", False: "no", None: "-"}[row["equal"]]]
        table.add_row(*cells)
    table.add_row("a copy", "", _milliseconds(result["copy"]), "1", *[""] * (3 * len(rivals)))
    return _text(table)


def _milliseconds(timing: dict[str, float] | None) -> str:
    return "-" if timing is None else f"{timing['median']:.2f} ({timing['p20']:.2f}-{timing['p80']:.2f})"


def recipes_table(recipes: list[dict[str, Any]]) -> str:
    """The recipes, as equations."""
    lines = []
    for recipe in recipes:
        lines += [f"{recipe['name']}: {recipe['about']}", *(f"    {recipe[gemm]}" for gemm in ("fprop", "dgrad", "wgrad"))]
    return "\n".join([*lines, "", "element[rows x columns under one scale, the scale's format](tensor); x, w, g: input, weight, gradient"])


def _text(table: Table) -> str:
    console = Console(width=_WIDTH, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
