"""What one optimizer step shows of itself: the loss and the gradient norms, with one wait for the
device.

A training loop that clips and zeroes gradients, as the Trainer does before any callback sees the
step's end, leaves nothing to look at. So the norms are taken at the end of each backward, of all
gradients at once: a kernel for each of some hundred parameters would cost the host a quarter of a
small model's step. That is outside of compiled graphs, after FSDP2 has reduced and scattered the
gradients or DDP has averaged them, before any clipping, and still times the loss scale. An
optimizer that steps inside the backward and frees each gradient at once leaves nothing to measure.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable


class Watch:
    """Hooks on a model that measure its training steps, until `detach`.

    Attach it when the model has its final parameters: on its devices, and sharded if it will be.
    Only parameters that require gradients then are watched.

    Args:
        model: what the training loop calls, or what DDP wraps.
        items_of_all_ranks: whether `num_items_in_batch`, where the model is told it, counts those
            of all ranks: their losses add up then.
    """

    def __init__(self, model: nn.Module, items_of_all_ranks: bool = False) -> None:
        self.names: list[str] = []
        """The modules that have trainable parameters of their own, in model order."""
        self._owner: list[int] = []
        self._handles: list[Any] = []
        self._due = False
        parameters = self._parameters = self._own_parameters(model)
        device = parameters[0].device if parameters else torch.device("cpu")
        self._norms = torch.zeros(len(parameters), device=device)
        # On the device from the start: a copy from the host in every step would wait for it.
        self._shares = torch.tensor(
            [_share(parameter) for parameter in parameters], dtype=torch.float64, device=device
        )
        self._loss: Tensor | None = None
        self._micro_batches = 0
        self._items_of_all_ranks, self._told_items = items_of_all_ranks, False
        # FSDP2 calls these hooks of a sharded parameter when its gradient is there.
        self._handles += [
            parameter.register_post_accumulate_grad_hook(self._has_gradient)
            for parameter in parameters
        ]
        self._handles.append(model.register_forward_hook(self._add_loss, with_kwargs=True))

    def read(self, scale: float | None = None) -> tuple[float | None, float, dict[str, float]]:
        """The step since the last call: (loss, norm of all gradients, norm of each module's own
        gradients by its name).

        The loss is None if the model returned none. It is the mean over the micro-batches; their
        sum where the model was told `num_items_in_batch`, of which each loss is a share then. Over
        the ranks it is the mean, or the sum where that counts the items of all ranks. A parameter
        without a gradient counts as 0. Of parameters that every rank holds whole, the norm is the
        root of the mean square over the ranks, whose gradients DDP has averaged.

        Args:
            scale: the loss scale that the gradients were multiplied by.
        """
        seen, self._loss, self._due = self._loss, None, False
        loss = self._norms.new_zeros(1) if seen is None else seen.reshape(1).to(self._norms.device)
        # In float64 a square neither overflows nor vanishes.
        sums = torch.cat([loss.double(), self._norms.double().square() * self._shares])
        self._norms.zero_()
        ranks = _ranks()
        if ranks > 1:
            dist.all_reduce(sums)
        total_loss, *squares = sums.tolist()
        factor = 1.0 if scale is None else 1.0 / scale
        modules = dict.fromkeys(self.names, 0.0)
        for owner, square in zip(self._owner, squares, strict=True):
            modules[self.names[owner]] += square
        norms = {name: factor * math.sqrt(square) for name, square in modules.items()}
        parts = max(self._micro_batches, 1) * (
            1 if self._told_items and self._items_of_all_ranks else ranks
        )
        self._micro_batches, self._told_items = 0, False
        return None if seen is None else total_loss / parts, factor * math.sqrt(sum(squares)), norms

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The trainable parameters, module after module. One that several modules share belongs to
        the first."""
        parameters: dict[nn.Parameter, None] = {}
        for name, module in model.named_modules():
            own = [
                parameter
                for parameter in module.parameters(recurse=False)
                if parameter.requires_grad and parameter not in parameters
            ]
            if own:
                self._owner += [len(self.names)] * len(own)
                self.names.append(name)
                parameters.update(dict.fromkeys(own))
        return list(parameters)

    def _has_gradient(self, parameter: Tensor) -> None:
        if not self._due:
            self._due = True
            # FSDP2 and DDP end a backward by callbacks like this one, queued before it or after:
            # two in a row come last.
            _after_backward(lambda: _after_backward(self._measure))

    @torch.no_grad()
    def _measure(self) -> None:
        """The norms of the gradients so far. Over an accumulated step they grow: the last ones are
        the step's."""
        self._due = False
        alike: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        for number, parameter in enumerate(self._parameters):
            if (gradient := _local(parameter.grad)) is not None:
                numbers, gradients = alike.setdefault((gradient.device, gradient.dtype), ([], []))
                numbers.append(number)
                gradients.append(gradient)
        norms = [self._norms.new_zeros(())] * len(self._parameters)
        for (_, dtype), (numbers, gradients) in alike.items():
            found = torch._foreach_norm(
                gradients, 2, dtype=torch.promote_types(dtype, torch.float32)
            )
            for number, norm in zip(numbers, found, strict=True):
                norms[number] = norm.to(self._norms)
        self._norms.copy_(torch.stack(norms))

    def _add_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Evaluation is no step. Checkpointing computes the blocks again, never the model that holds
        # them.
        if not (model.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            return
        loss = loss.detach().float().mean()
        self._loss = loss if self._loss is None else self._loss + loss
        if kwargs.get("num_items_in_batch") is None:
            self._micro_batches += 1
        else:
            self._told_items = True


def _after_backward(function: Callable[[], None]) -> None:
    """Call `function` at the end of the backward that is running."""
    Variable._execution_engine.queue_callback(function)


def _local(gradient: Any) -> Tensor | None:
    """A gradient's values on this rank."""
    if gradient is None:
        return None
    gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _share(parameter: Any) -> float:
    """What a rank adds to the squared norm, of the squared norm of what it holds: one divided by
    the ranks that hold the same."""
    shards = 1
    if (mesh := getattr(parameter, "device_mesh", None)) is not None:
        shards = math.prod(
            mesh.size(number)
            for number, placement in enumerate(parameter.placements)
            if placement.is_shard()
        )
    return shards / _ranks()
