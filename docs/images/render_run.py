"""Draw run.svg: the plan and the result of a finished run, as in the terminal.

python docs/images/render_run.py RUN_DIR docs/images/run.svg
"""

import io
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lowprec.cli.tables import summary_table
from lowprec.conversion.plan import GemmPlan, LayerPlan, PartPlan, Plan


def load_plan(path: Path) -> Plan:
    """Read the plan.json of a run."""
    data = json.loads(path.read_text(encoding="utf-8"))
    layers = []
    for layer in data["layers"]:
        fields = {key: value for key, value in layer.items() if key not in ("converted", "native")}
        gemms = tuple(GemmPlan(**gemm) for gemm in layer["gemms"])
        layers.append(LayerPlan(**{**fields, "shape": tuple(layer["shape"]), "gemms": gemms}))
    return Plan(
        device=data["device"],
        layers=tuple(layers),
        parts=tuple(PartPlan(**part) for part in data["parts"]),
    )


def main(run: Path, picture: Path) -> None:
    console = Console(record=True, width=130, file=io.StringIO())
    console.print(Text("$ lowprec train configs/llama-tiny-cpu.yaml", style="bold"))
    console.print(Text(str(load_plan(run / "plan.json"))))
    console.print(
        Text(summary_table(json.loads((run / "summary.json").read_text(encoding="utf-8"))))
    )
    console.save_svg(str(picture), title="lowprec")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
