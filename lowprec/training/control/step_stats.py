"""Measurements of an optimizer step: the loss and the gradient norms, with one wait for the device.

When a step has ended, its gradients may be gone: the Trainer clips and zeroes them before it calls
any callback. So the norms are taken at the end of each backward, for all gradients at once. (One
kernel for each of some hundred parameters would cost the host a quarter of a small model's step.)
This is outside of compiled graphs, after FSDP2 has reduced and scattered the gradients or DDP has
averaged them, and before any clipping. The gradients are still multiplied by the loss scale. With
an optimizer that steps inside of the backward and frees each gradient at once, there is nothing to
measure.
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

    Make it when the model has its final parameters: on their devices, and sharded if they will be.
    It watches the parameters that require gradients at that time.

    Args:
        model: the model that the training loop calls, or that DDP wraps.
        items_of_all_ranks: whether `num_items_in_batch`, if the model gets it, counts the items of
            all ranks. The losses of the ranks then add up.
    """

    def __init__(self, model: nn.Module, items_of_all_ranks: bool = False) -> None:
        self.names: list[str] = []
        """The modules that have trainable parameters of their own, in model order."""
        self._owner: list[int] = []
        """For each parameter, the index of its module in `names`."""
        self._handles: list[Any] = []
        self._due = False
        """Flag: the norms will be measured when the running backward ends."""
        parameters = self._parameters = self._own_parameters(model)
        device = parameters[0].device if parameters else torch.device("cpu")
        self._norms = torch.zeros(len(parameters), device=device)
        # The shares are on the device from the start: to copy them in every step would wait.
        self._shares = torch.tensor(
            [_share(parameter) for parameter in parameters], dtype=torch.float64, device=device
        )
        self._loss: Tensor | None = None
        self._micro_batches = 0
        """Number of losses in this step that are means."""
        self._items_of_all_ranks = items_of_all_ranks
        self._got_items = False
        """Flag: the model got `num_items_in_batch` in this step."""
        # FSDP2 calls these hooks of a sharded parameter when its gradient is complete.
        self._handles += [
            parameter.register_post_accumulate_grad_hook(self._has_gradient)
            for parameter in parameters
        ]
        self._handles.append(model.register_forward_hook(self._add_loss, with_kwargs=True))

    def read(self, scale: float | None = None) -> tuple[float | None, float, dict[str, float]]:
        """Return the measurements since the last call: (loss, norm of all gradients, norm of each
        module's own gradients by its name).

        The loss is None if the model returned none. It is the mean over the micro-batches, or their
        sum if the model got `num_items_in_batch`: each loss is a share then. Over the ranks it is
        the mean, or the sum if that number counts the items of all ranks. A parameter without a
        gradient counts as 0. For parameters that every rank holds as a whole, the norm is the root
        of the mean square over the ranks; DDP has averaged their gradients.

        Args:
            scale: the loss scale that the gradients were multiplied by.
        """
        seen = self._loss
        self._loss = None
        self._due = False
        loss = self._norms.new_zeros(1) if seen is None else seen.reshape(1).to(self._norms.device)
        # In float64 the square of an fp32 number neither overflows nor vanishes.
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
        adds_up = self._got_items and self._items_of_all_ranks
        parts = max(self._micro_batches, 1) * (1 if adds_up else ranks)
        self._micro_batches = 0
        self._got_items = False
        mean_loss = None if seen is None else total_loss / parts
        return mean_loss, factor * math.sqrt(sum(squares)), norms

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the trainable parameters, module after module. A parameter that several modules
        share belongs to the first of them."""
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
            # FSDP2 and DDP finish the gradients in callbacks like this one, which may be queued
            # before it or after it. A callback that a callback queues comes after all of them.
            _after_backward(lambda: _after_backward(self._measure))

    @torch.no_grad()
    def _measure(self) -> None:
        """Measure the norms of the gradients so far. In a step with accumulation, each backward
        adds to the gradients, and the last measurement counts."""
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
        # Evaluation does not count. (Activation checkpointing calls blocks twice, but never the
        # whole model.)
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
            self._got_items = True


def _after_backward(function: Callable[[], None]) -> None:
    """Call `function` at the end of the backward that is running."""
    Variable._execution_engine.queue_callback(function)


def _local(gradient: Any) -> Tensor | None:
    """Return the values of a gradient on this rank; None if there is no gradient."""
    if gradient is None:
        return None
    gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _share(parameter: Any) -> float:
    """Return the share of this rank's squared norm in the sum over the ranks: one divided by the
    number of ranks that hold the same values."""
    shards = 1
    if (mesh := getattr(parameter, "device_mesh", None)) is not None:
        shards = math.prod(
            mesh.size(number)
            for number, placement in enumerate(parameter.placements)
            if placement.is_shard()
        )
    return shards / _ranks()
