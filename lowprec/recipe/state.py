"""The state that a recipe keeps between steps: named buffers of the layer, so that they move, are
saved and are restored with it.

    rounding_state             int64 [3], for stochastic rounding and fresh Hadamard signs: a key of
                               two 32-bit words and the number of forward passes so far. Each pass
                               derives a new key, and each operand and each transform its own key
                               from that (see `formats.random`).
    amax_history_<gemm>_<a|b>  fp32 [n], for delayed scaling: the last amaxes of this operand, the
                               oldest first; zeros where there was none yet.

A recipe that needs neither adds no buffer, and the layer's state dict is nn.Linear's. Ranks that
start from the same buffers mix their rank into the key: with equal draws, half of the rounding
noise would not average out between them.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowprec.errors import UserError
from lowprec.formats.random import derive_key
from lowprec.quant import OperandSpec
from lowprec.recipe.base import GEMMS, FromFprop, Recipe

ROUNDING_STATE = "rounding_state"
OPERANDS = tuple((gemm, side) for gemm in GEMMS for side in ("a", "b"))
"""The six operands as (gemm, side); an operand's number is its place here."""


def history_name(gemm: str, side: str) -> str:
    """Return the name of the buffer with an operand's amax history."""
    return f"amax_history_{gemm}_{side}"


HISTORIES = tuple(history_name(*operand) for operand in OPERANDS)
"""Names of the buffers with amax histories, in the order of `OPERANDS`."""


def is_state(name: str) -> bool:
    """Return whether a buffer of this full name belongs to a recipe's state."""
    last = name.rpartition(".")[2]
    return last == ROUNDING_STATE or last in HISTORIES


def operand_spec(recipe: Recipe, gemm: str, side: str) -> OperandSpec | None:
    """Return the representation that an operand is quantised to for this GEMM; None if it is
    not."""
    source = getattr(recipe.gemm(gemm), side)
    return source.requantize if isinstance(source, FromFprop) else source


def history_length(recipe: Recipe, gemm: str, side: str) -> int:
    """Return the number of amaxes that `recipe` remembers of an operand; 0 where it does not scale
    by them."""
    spec = operand_spec(recipe, gemm, side)
    return spec.scaling.history if spec is not None and spec.scaling is not None else 0


def new_state(
    recipe: Recipe, device: torch.device, seed: int = 0, layer: int = 0
) -> dict[str, Tensor]:
    """Return the buffers that `recipe` needs, as they are before the first step.

    Args:
        seed, layer: key of the draws of stochastic rounding; each layer of a model should have its
            own.
    """
    state = {}
    with torch.inference_mode(False):  # training changes the buffers in place
        if recipe.draws:
            state[ROUNDING_STATE] = torch.tensor(
                [seed % 2**32, layer, 0], dtype=torch.int64, device=device
            )
        for operand in OPERANDS:
            if length := history_length(recipe, *operand):
                state[history_name(*operand)] = torch.zeros(
                    length, dtype=torch.float32, device=device
                )
    return state


def states_of(
    recipes: Sequence[Recipe], device: torch.device, seed: int = 0, layer: int = 0
) -> dict[str, Tensor]:
    """Return the buffers that any of `recipes` needs; see `new_state`. Raise UserError if two want
    histories of different lengths for one operand."""
    state: dict[str, Tensor] = {}
    for recipe in recipes:
        for name, buffer in new_state(recipe, device, seed, layer).items():
            if name in state and state[name].shape != buffer.shape:
                lengths = f"{len(state[name])} and {len(buffer)}"
                raise UserError(
                    f"recipe {recipe.name}: one layer can't keep amax histories of two lengths, "
                    f"{lengths}, for one operand"
                )
            state.setdefault(name, buffer)
    return state


# This is an operator, because it must run once: compiled code could otherwise derive the key again
# in the backward, when the count has changed.
@torch.library.custom_op("lowprec::next_key", mutates_args={"rounding_state"})
def next_key(rounding_state: Tensor, rank: int, advance: bool) -> Tensor:
    """Return the key of the next forward pass, int64 [2]; count the pass if `advance`."""
    key = derive_key(derive_key(rounding_state[:2], rank), rounding_state[2])
    if advance:
        rounding_state[2] += 1
    return key


@next_key.register_fake
def _(rounding_state: Tensor, rank: int, advance: bool) -> Tensor:
    return rounding_state.new_empty(2)


def this_rank() -> int:
    """Return the rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
