"""The parts of a checkpoint beside the weights, and the places where they are kept.

Each part is an object with a name and the pair `state_dict` and `load_state_dict`, which is torch's
own contract (`torch.distributed.checkpoint.stateful.Stateful`). Who writes the checkpoint decides
the place:

    the Trainer     trainer_state.json, under `stateful_callbacks[name]`: plain JSON data
    PEFT            <name>.safetensors beside the adapters: tensors
    Accelerate      <name>.json beside the files of `accelerator.save_state`: plain JSON data
"""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import load_file, save_file

from lowprec.errors import UserError
from lowprec.files import from_json, plain, to_json, with_floats, write_atomically

if TYPE_CHECKING:
    from transformers import TrainerState


class Saved(Protocol):
    """A part of a checkpoint."""

    @property
    def name(self) -> str:
        """Name of the part, part of the format: checkpoints of earlier versions have it."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def put_into_trainer_state(part: Saved, state: "TrainerState") -> None:
    """Put the part into the state that the Trainer writes with its next checkpoint."""
    _entries(state)[part.name] = plain(part.state_dict())


def write_valid_json(state: "TrainerState") -> None:
    """Make the Trainer write its state as valid JSON: losses that are not finite as strings (see
    `lowprec.files`). Read those of a resumed run as floats."""
    history: Any = with_floats(state.log_history)
    state.log_history = history

    def save_to_json(path: str) -> None:
        written = copy.copy(state)
        vars(written).update(plain(vars(state)))
        type(state).save_to_json(written, path)

    vars(state)["save_to_json"] = save_to_json


def load_from_trainer_state(part: Saved, state: "TrainerState") -> bool:
    """Load the part from the state of a resumed Trainer; return False if it is not there."""
    held = _entries(state).get(part.name)
    if held is None:
        return False
    part.load_state_dict(with_floats(held))
    return True


def save_json(part: Saved, directory: Path) -> None:
    """Write the part, plain JSON data, to its file in `directory`, all of it or nothing."""
    write_atomically(directory / f"{part.name}.json", to_json(part.state_dict(), indent=1) + "\n")


def read_json(part: Saved, directory: Path) -> dict[str, Any] | None:
    """Return the state of the part in its file in `directory`; None if there is no file."""
    file = directory / f"{part.name}.json"
    if not file.is_file():
        return None
    try:
        state = from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(state, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(state).__name__}")
    return state


def _entries(state: "TrainerState") -> dict[str, Any]:
    entries: Any = state.stateful_callbacks  # declared as the list that it is made of
    return entries


def tensor_file(part: Saved) -> str:
    """Return the name of the part's file."""
    return f"{part.name}.safetensors"


def save_tensors(part: Saved, directory: Path) -> None:
    """Write the part to its file in `directory`, all of it or nothing."""
    file = tensor_file(part)
    unfinished = directory / f".{file}"
    save_file(part.state_dict(), unfinished)
    os.replace(unfinished, directory / file)


def load_tensors(part: Saved, directory: Path) -> bool:
    """Load the part from its file in `directory`; return False if there is none."""
    file = directory / tensor_file(part)
    if not file.is_file():
        return False
    part.load_state_dict(load_file(file))
    return True
