"""The command that resumes a run."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lowprec.distributed.processes import world_size
from lowprec.training.file_names import CONFIG

_PROGRAMS = ("pretrain.py", "sft.py")
"""Programs that take a configuration and settings of it as their arguments, as `lowprec train`
does."""

_LAUNCHERS = ("torchrun", "accelerate", "torch.distributed.run")


def resume_command(directory: Path) -> str:
    """Return the command that resumes the run in `directory`, started in the way that this process
    was started."""
    script = Path(sys.argv[0])
    if script.name in _PROGRAMS:
        module = []
        program = [sys.argv[0]]
    else:
        module = ["-m"]
        program = ["lowprec", "train"]
    if world_size() > 1:
        start = [*_launcher([*module, program[0]]), *module]
    elif not module:
        start = ["python"]
    elif script.name == "__main__.py":
        start = ["python", *module]
    else:
        start = []
    settings = [str(directory / CONFIG), "trainer.resume_from_checkpoint=true"]
    return shlex.join([*start, *program, *settings])


def _launcher(program: Sequence[str]) -> list[str]:
    """Return the command of the launcher that started this process, up to the program.

    Args:
        program: the words with which the program's own part of that command begins.
    """
    command = _parent_command()
    places = [
        number
        for number in range(len(command))
        if command[number : number + len(program)] == list(program)
    ]
    launches = [number for number, word in enumerate(command[:3]) if Path(word).name in _LAUNCHERS]
    if not places or not launches:
        processes = os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))
        return ["torchrun", "--nproc-per-node", processes]
    name = Path(command[launches[0]]).name
    is_module = command[launches[0] - 1] == "-m"
    first = ["python", "-m", name] if is_module else [name]
    return [*first, *command[launches[0] + 1 : places[0]]]


def _parent_command() -> list[str]:
    """Return the command of the process that started this one; [] if the system does not say."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [os.fsdecode(word) for word in words if word]
