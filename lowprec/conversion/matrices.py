"""Find the matrices that a model multiplies by, but not in a linear layer nor in a stack of experts
that can be converted. The plan lists them, so that its totals are those of the whole model.

These are the weights of torch's attention, recurrent and bilinear modules, packed weights of
quantised layers, and all other parameters of two and more dimensions. Left out are modules whose
weights are no factor of a matrix product (embeddings, norms, convolutions), a single row or column,
and parameters that their name shows to be added or looked up (`_NO_FACTORS`).
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from lowprec.nn import experts
from lowprec.nn.dtypes import DTYPES

_MULTIPLY = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
"""Classes of torch that multiply by their own parameters."""

_DO_NOT_MULTIPLY = (
    *(nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(_NormBase, _ConvNd, ParametrizationList),
)
"""Classes of torch whose parameters are no matrices of a product. What a parametrization computes
belongs to the module around it."""

_NO_FACTORS = re.compile(
    "bias|embed|pos|token|table|prompt|latent|quer|mask|conv|norm|scale|gamma|beta|log|code"
)
"""Parts of the names of parameters that are added, looked up or multiplied element by element."""


class Matrix(NamedTuple):
    """A matrix, or several in one tensor, of a module that is no linear layer."""

    name: str
    """Name of the parameter or buffer in its module."""
    reason: str
    """The reason why it stays as it is."""
    is_known: bool
    """Flag: it is known to be a factor of a matrix product."""
    shape: tuple[int, int] | None = None
    """(outputs, inputs), if the tensor itself has another shape."""


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that may be stacks of experts' matrices."""
    return () if isinstance(module, (*_MULTIPLY, *_DO_NOT_MULTIPLY)) else experts.stacks(module)


def matrices(module: nn.Module) -> Iterator[Matrix]:
    """Yield the matrices of a module's own that are not in `stacks_of` it."""
    kind = type(module).__name__
    if isinstance(module, _DO_NOT_MULTIPLY):
        return
    sizes: Any = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    own = dict(module.named_parameters(recurse=False))
    if all(isinstance(size, int) for size in sizes):
        tensors = {**own, **dict(module.named_buffers(recurse=False))}
        for name, tensor in tensors.items():
            if tensor.dim() > 1 and tensor.dtype not in DTYPES:
                dtype = str(tensor.dtype).removeprefix("torch.")
                reason = f"{kind} is already quantised: its '{name}' is {dtype}"
                yield Matrix(name, reason, True, sizes)
                return  # the others are its scales and zero points
    known = isinstance(module, _MULTIPLY)
    stacks = stacks_of(module)
    for name, parameter in own.items():
        shape = parameter.shape
        is_table = len(shape) > 2 and math.prod(shape[:-2]) == 1
        if name in stacks or len(shape) < 2 or min(shape[-2:]) < 2 or is_table:
            continue
        if known and "bias" not in name:
            yield Matrix(name, f"{kind} multiplies by it itself, and is no linear layer", True)
        elif not known and not _NO_FACTORS.search(name.lower()):
            reason = f"a matrix of {kind}, which does not say how it multiplies by it"
            yield Matrix(name, reason, False)
