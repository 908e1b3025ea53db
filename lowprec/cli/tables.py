"""Tables that the commands print on a terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowprec.conversion.shares import HIGH_PRECISION, format_shares

_WIDTH = 110


def summary_table(summary: dict[str, Any]) -> str:
    """Return the result of a run, from its summary. The warnings about its precision come last."""
    table = Table(
        title=f"{_title(summary)}: {summary['steps']} steps in {_duration(summary['wall_s'])}",
        title_justify="left",
    )
    table.add_column("result")
    table.add_column("value", overflow="fold")
    bits = summary["bits_per_byte"]
    speed = summary["tokens_per_second"]
    table.add_row("validation loss", f"{summary['val_loss']:.4f} nats per token")
    table.add_row(
        "bits per byte",
        "unknown: the tokenizer does not give the bytes of a token"
        if bits is None
        else f"{bits:.4f}",
    )
    table.add_row("tokens per second", "-" if speed is None else f"{speed:,.0f}")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    totals = summary["plan"]
    table.add_row(
        "precision",
        f"{totals['native'] + totals['emulated']} of {totals['linears']} linear layers converted, "
        f"{totals['native']} native and {totals['emulated']} emulated on {summary['device']}",
    )
    for kind, what in (("weights", "linear weights"), ("flops", "their operations")):
        table.add_row(f"{what}, by recipe", format_shares(summary["ran"][kind]))
    table.add_row("written to", summary["output_dir"])
    return "\n".join([_text(table), *summary["warnings"]])


def _title(summary: dict[str, Any]) -> str:
    """Return the recipes that a run has run in, each with its share of the linear weights."""
    shares = summary["ran"]["weights"]
    low = [name for name in shares if name != HIGH_PRECISION]
    low.sort(key=lambda name: -shares[name])
    told = ", ".join(f"{name} in {shares[name]:.1%}" for name in low)
    return f"{told} of the linear weights" if low else HIGH_PRECISION


def doctor_table(report: dict[str, Any]) -> str:
    """Return the machine, its recipes and its optional parts."""
    device = report["device"]
    machine = Table(show_header=False, title="machine", title_justify="left")
    machine.add_row("device", ", ".join(f"{key} {value}" for key, value in device.items()))
    machine.add_row("platform", f"{report['platform']}, Python {report['python']}")
    machine.add_row(
        "versions",
        ", ".join(f"{name} {version or 'missing'}" for name, version in report["versions"].items()),
    )

    recipes = Table(title=f"recipes on {device['type']}", title_justify="left")
    for column in ("recipe", "runs", "why"):
        recipes.add_column(column)
    for recipe in report["recipes"]:
        recipes.add_row(
            recipe["name"], "native" if recipe["native"] else "emulated", escape(recipe["reason"])
        )

    optional = Table(title="optional parts", title_justify="left")
    for column in ("package", "for", "state"):
        optional.add_column(column)
    for part in report["optional"]:
        optional.add_row(
            part["name"], part["what"], part["version"] or escape(f"missing: {part['install']}")
        )
    return "\n".join(map(_text, (machine, recipes, optional)))


def bench_table(result: dict[str, Any], rivals: tuple[str, ...]) -> str:
    """Return the times of quantising and dequantising, in ms, and the rivals' times over ours."""
    rows, columns = result["shape"]
    how = "compiled" if result["compiled"] else "eager"
    title = (
        f"quantise + dequantise {result['dtype']} {rows} x {columns} on {result['device']}, {how}; "
        "ms, median (p20-p80)"
    )
    against = [name for rival in rivals for name in (rival, "times", "same bits")]
    table = _bench(title, "operand", "notation", "lowprec", "copies", "floor", "of floor", *against)
    copy = result["copy"]["median"]
    for row in result["rows"]:
        cells = [
            row["name"],
            escape(row["operand"]),
            _milliseconds(row["ours"]),
            f"{row['ours']['median'] / copy:.0f}",
        ]
        cells += [_floor(row), _of_floor(row)]
        for rival in rivals:
            theirs = row[rival]
            ratio = "-" if theirs is None else f"{theirs['median'] / row['ours']['median']:.1f}"
            cells += [
                _milliseconds(theirs),
                ratio,
                {True: "yes", False: "no", None: "-"}[row["equal"]],
            ]
        table.add_row(*cells)
    table.add_row(
        "a copy", "", _milliseconds(result["copy"]), "1", *[""] * 2, *[""] * (3 * len(rivals))
    )
    return _text(table)


def gemm_table(result: dict[str, Any]) -> str:
    """Return the times of each layer's products by each backend. Lines below the table name the
    backends that take no product, and the failures."""
    title = (
        f"{result['recipe']} on {result['device']}, results in bf16; ms, median (p20-p80); "
        "error: of that, and of results in fp32"
    )
    table = _bench(
        title, "GEMM", "MxNxK", "by", "ms", "TFLOP/s", "floor", "of floor", "error", "in fp32"
    )
    for row in result["rows"]:
        rate = "-" if row["tflops"] is None else f"{row['tflops']:.3g}"
        name = row["name"] if row["native"] else f"{row['name']} (emulated)"
        figures = (
            _milliseconds(row["time"]),
            rate,
            _floor(row),
            _of_floor(row),
            _error(row["error"]),
            _error(row["error_fp32"]),
        )
        table.add_row(row["gemm"], _by(row["product"]), name, *figures)
    notes = [
        f"{refusal['backend']} takes no {', '.join(refusal['gemms'])}: {refusal['reason']}"
        for refusal in result["unsupported"]
    ]
    return "\n".join([_text(table), *notes, *_failures(result["rows"], "product")])


def linear_table(result: dict[str, Any]) -> str:
    """Return the times of linear layers' forward and backward, shape by shape. Lines below the
    table name the failures."""
    title = (
        f"linear layers on {result['device']}, {result['recipe']}: "
        "forward + backward in bf16 tensors; ms, median (p20-p80)"
    )
    table = _bench(
        title, "MxNxK", "layer", "ms", "speed-up", "floor", "of floor", "error y", "dx", "dw"
    )
    for row in result["rows"]:
        errors = row["errors"] or {}
        figures = (_milliseconds(row["time"]), _times(row["speedup"]), _floor(row), _of_floor(row))
        table.add_row(
            _by(row["shape"]),
            row["name"],
            *figures,
            *(_error(errors.get(name)) for name in ("y", "dx", "dw")),
        )
    return "\n".join([_text(table), *_failures(result["rows"], "shape")])


def linear_row(row: dict[str, Any]) -> str:
    """Return one row of `linear_table` as a line, which is printed as soon as it is measured."""
    name = f"{_by(row['shape'])} {row['name']}"
    if row["failure"]:
        return f"{name}: failed: {row['failure']}"
    return f"{name}: {_milliseconds(row['time'])} ms, {_times(row['speedup'])}"


def train_table(result: dict[str, Any]) -> str:
    """Return the speed of training steps. Lines below the table give the precision of each row, or
    why it failed."""
    how = [
        f"batch {result['batch']} x {result['seq']} tokens",
        "blocks compiled" if result["compiled"] else "eager",
    ]
    how.append(f"liger: {', '.join(result['liger']) or 'none'}")
    title = (
        f"{result['model']}, {result['parameters'] / 1e6:,.0f} M parameters in bf16, "
        f"on {result['device']}; {', '.join(how)}"
    )
    table = _bench(
        title,
        "precision",
        "tokens/s",
        "speed-up",
        "step, ms (p20-p80)",
        "floor, ms",
        "of floor",
        "memory",
        "loss",
    )
    for row in result["rows"]:
        speed = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
        memory = "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f} GiB"
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        # A row whose recipe pays for no layer has measured bf16. A line below says which it is.
        named = row["name"] if _runs_its_recipe(row) else HIGH_PRECISION
        table.add_row(
            named,
            speed,
            _times(row["speedup"]),
            _milliseconds(row["step"]),
            _floor(row),
            _of_floor(row),
            memory,
            loss,
        )
    notes = [f"{row['name']}: {row['precision']}" for row in result["rows"] if row["precision"]]
    return "\n".join([_text(table), *notes, *_failures(result["rows"])])


def _runs_its_recipe(row: dict[str, Any]) -> bool:
    return row["weights"] is None or set(row["weights"]) != {HIGH_PRECISION}


def _bench(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def _failures(rows: list[dict[str, Any]], shape: str | None = None) -> list[str]:
    """Return a line for each row that failed. `shape` is the key of the shape that names the
    row."""
    failed = [row for row in rows if row["failure"]]
    places = [
        [*filter(None, [row.get("gemm")]), _by(row[shape])] if shape else [] for row in failed
    ]
    return [
        f"{' '.join([row['name'], *place])} failed: {row['failure']}"
        for row, place in zip(failed, places, strict=True)
    ]


def _milliseconds(timing: dict[str, float] | None) -> str:
    if timing is None:
        return "-"
    digits = 3 if timing["median"] < 1 else 2
    return f"{timing['median']:.{digits}f} ({timing['p20']:.{digits}f}-{timing['p80']:.{digits}f})"


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _floor(row: dict[str, Any]) -> str:
    return "-" if row["floor"] is None else f"{row['floor']['ms']:.3g}"


def _of_floor(row: dict[str, Any]) -> str:
    """Return the share of its floor that a row reaches."""
    return "-" if row["of_floor"] is None else f"{row['of_floor']:.0%}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def recipes_table(recipes: list[dict[str, Any]]) -> str:
    """Return the recipes as equations."""
    lines = []
    for recipe in recipes:
        lines += [
            f"{recipe['name']}: {recipe['about']}",
            *(f"    {recipe[gemm]}" for gemm in ("fprop", "dgrad", "wgrad")),
        ]
    return "\n".join(
        [
            *lines,
            "",
            "element[rows x columns under one scale, the scale's format](tensor); x, w, g: input, "
            "weight, gradient",
        ]
    )


def _text(table: Table) -> str:
    console = Console(width=_WIDTH, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
