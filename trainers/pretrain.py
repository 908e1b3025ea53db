"""Pretrain a language model as a configuration describes it.

python trainers/pretrain.py CONFIG [key=value ...]
torchrun --nproc-per-node 8 trainers/pretrain.py llama-125m-fsdp2
accelerate launch --config_file configs/accelerate/fsdp2.yaml trainers/pretrain.py CONFIG

CONFIG is a YAML file, or the name of one that the package ships (`lowprec init` lists them). A
key=value changes a setting: precision.recipe=mxfp8 trainer.max_steps=300. `lowprec train` does the
same; this program is the place to change what a run does.
"""

import sys
from collections.abc import Sequence
from typing import Any

from lowprec.cli.tables import summary_table
from lowprec.config import shipped
from lowprec.distributed.processes import is_main_process
from lowprec.errors import UserError, reported
from lowprec.training.run.config import load_run
from lowprec.training.run.pretrain import train


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Train, and return what summary.json holds."""
    if not arguments or "=" in arguments[0]:
        raise UserError("usage: pretrain.py CONFIG [key=value ...]")
    path = shipped.find(arguments[0])
    run, data = load_run(path, arguments[1:])
    summary = train(run, data, path)
    if is_main_process():
        print(summary_table(summary))
    return summary


if __name__ == "__main__":
    with reported("pretrain.py"):
        main(sys.argv[1:])
