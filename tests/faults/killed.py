"""A run that may kill itself inside of its file operations, by SIGKILL.

`python -m tests.faults.killed SPEC ARGUMENTS`: ARGUMENTS are those of `lowprec`, or the folder of a plain Trainer. SPEC is JSON:

    kind        "train", "replay" (with a fault that the guard goes back for) or "trainer" (a plain Trainer with the callback)
    folder      only operations on files below it count
    kill_at     number of the operation before which, or inside of which, the program kills itself; null: it does not
    cut         flag: the program kills itself in the next operation that writes tensors instead, with half of its file written
    count_to    file that gets the number of operations; null: none
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

BREACH = 9
"""Number of steps after which the fault of "replay" breaks the next one, unless the guard has raised the layer."""
LAYER = "model.layers.0.mlp.up_proj"
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "os.chmod", "os.link", "os.symlink", "os.truncate")


class Operations:
    """Counts the operations that change files below a folder, and kills the program at one of them."""

    def __init__(self, folder: str, kill_at: int | None, *, cut: bool) -> None:
        self.folder, self.kill_at, self.cut = os.path.abspath(folder), kill_at, cut
        self.count = 0
        sys.addaudithook(self._audit)
        torch.save = self._counted(torch.save, 1)
        safetensors.torch.save_file = self._counted(safetensors.torch.save_file, 1)
        for name, module in list(sys.modules.items()):  # those that have imported it by its name
            if name.startswith(("transformers", "lowprec")) and "save_file" in vars(module):
                module.save_file = safetensors.torch.save_file  # pyright: ignore[reportAttributeAccessIssue]
            if name.startswith("transformers") and "safe_save_file" in vars(module):
                module.safe_save_file = safetensors.torch.save_file  # pyright: ignore[reportAttributeAccessIssue]

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._is_mine(path):
                self._count_or_die()
        elif event in _CHANGES and (self._is_mine(args[0]) or (type(args[-1]) is int and args[-1] >= 0)):
            self._count_or_die()  # a path that is relative to an open folder is one of `rmtree`

    def _is_mine(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.folder)

    def _count_or_die(self) -> None:
        self.count += 1
        if self.count == self.kill_at and not self.cut:
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, save: Any, place: int) -> Any:
        """Return a function that writes tensors to the file in its argument number `place`, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            path: Any = args[place] if len(args) > place else kwargs.get("filename", kwargs.get("f"))
            mine = self._is_mine(path)
            if mine:
                self._count_or_die()
            result = save(*args, **kwargs)
            if mine and self.cut and self.kill_at is not None and self.count >= self.kill_at:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted


class Fault(TrainerCallback):
    """NaN in the gradients of one layer in one step, until the guard gives the layer more precision."""

    def __init__(self, model: Any) -> None:
        self.layer, self.active = model.get_submodule(LAYER), False
        self.layer.weight.register_hook(lambda gradient: gradient * torch.nan if self.active else gradient)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active = state.global_step == BREACH and self.layer.recipe.name == "mxfp4"


def command(arguments: list[str], *, faulty: bool) -> None:
    """Run `lowprec`."""
    from lowprec.cli.main import main
    from lowprec.training.run import pretrain

    build = pretrain.build_trainer

    def build_faulty(config: Any, model: Any, *rest: Any) -> Any:
        trainer = build(config, model, *rest)
        trainer.add_callback(Fault(model))
        return trainer

    if faulty:
        pretrain.build_trainer = build_faulty
    main(arguments)


def plain_trainer(folder: Path) -> None:
    """Train in a plain Trainer, from the last checkpoint if there is one; then write its weights and losses."""
    from lowprec import LowPrecisionCallback
    from tests.builders import losses, prose, small_trainer

    saves = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 16}
    trainer = small_trainer(folder, LowPrecisionCallback("mxfp4_aws"), data=prose(100), **saves)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) is not None)
    assert trainer.model is not None
    weights = {name: value.contiguous() for name, value in trainer.model.state_dict().items()}
    (folder / "losses.json").write_text(json.dumps(losses(trainer)))
    safetensors.torch.save_file(weights, folder / "weights.tmp")
    os.replace(folder / "weights.tmp", folder / "weights.safetensors")


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    operations = Operations(spec["folder"], spec["kill_at"], cut=spec["cut"])
    if spec["kind"] == "trainer":
        plain_trainer(Path(sys.argv[2]))
    else:
        command(sys.argv[2:], faulty=spec["kind"] == "replay")
    if spec["count_to"]:
        Path(spec["count_to"]).write_text(str(operations.count))


if __name__ == "__main__":
    main()
