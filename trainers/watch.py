"""What one optimizer step shows of itself: the loss and the gradient norms, with one wait for the device.

A training loop that clips and zeroes gradients, as the Trainer does before any callback sees the step's end, leaves nothing to look at.
So the norms are taken in the backward, when a parameter's gradient has been added: outside of compiled graphs, after FSDP2 has reduced and
scattered it (it calls these hooks of the sharded parameter), before any clipping, and still times the loss scale.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Watch:
    """Hooks on a model that measure its training steps, until `detach`.

    Attach it when the model has its final parameters: on its devices, and sharded if it will be. Only parameters that require gradients
    then are watched.

    Args:
        model: what the training loop calls, or what DDP wraps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        """The modules that have trainable parameters of their own, in model order."""
        self._owner: list[int] = []
        self._handles: list[Any] = []
        parameters = self._own_parameters(model)
        device = parameters[0].device if parameters else torch.device("cpu")
        self._norms = torch.zeros(len(parameters), device=device)
        # On the device from the start: a copy from the host in every step would wait for it.
        self._shares = torch.tensor([_share(parameter) for parameter in parameters], dtype=torch.float64, device=device)
        self._loss: Tensor | None = None
        self._micro_batches = 0
        for number, parameter in enumerate(parameters):
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._norm_into(number)))
        self._handles.append(model.register_forward_hook(self._add_loss, with_kwargs=True))

    def read(self, scale: float | None = None) -> tuple[float | None, float, dict[str, float]]:
        """The step since the last call: (loss, norm of all gradients, norm of each module's own gradients by its name).

        The loss is None if the model returned none. It is the mean over the micro-batches; their sum where the model was told
        `num_items_in_batch`, of which each loss is a share then. Over the ranks it is the mean. A parameter without a gradient counts as 0.
        Parameters that every rank holds whole have their local gradients measured, before DDP averages them: their norm is the root of the
        mean square over the ranks.

        Args:
            scale: the loss scale that the gradients were multiplied by.
        """
        seen, self._loss = self._loss, None
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
        micro_batches, self._micro_batches = max(self._micro_batches, 1), 0
        return None if seen is None else total_loss / ranks / micro_batches, factor * math.sqrt(sum(squares)), norms

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The trainable parameters, module after module. One that several modules share belongs to the first."""
        parameters: dict[nn.Parameter, None] = {}
        for name, module in model.named_modules():
            own = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad and parameter not in parameters]
            if own:
                self._owner += [len(self.names)] * len(own)
                self.names.append(name)
                parameters.update(dict.fromkeys(own))
        return list(parameters)

    def _norm_into(self, number: int) -> Any:
        def hook(parameter: Tensor) -> None:
            # Over an accumulated step the gradient grows: its last norm is the step's.
            gradient = _local(parameter.grad)
            if gradient is not None:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                self._norms[number].copy_(torch.linalg.vector_norm(gradient, dtype=dtype))

        return hook

    def _add_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Evaluation is no step. Checkpointing computes the blocks again, never the model that holds them.
        if not (model.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            return
        loss = loss.detach().float().mean()
        self._loss = loss if self._loss is None else self._loss + loss
        if kwargs.get("num_items_in_batch") is None:
            self._micro_batches += 1


def _local(gradient: Any) -> Tensor | None:
    """A gradient's values on this rank."""
    if gradient is None:
        return None
    gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _share(parameter: Any) -> float:
    """What a rank adds to the squared norm, of the squared norm of what it holds: one divided by the ranks that hold the same."""
    shards = 1
    if (mesh := getattr(parameter, "device_mesh", None)) is not None:
        shards = math.prod(mesh.size(number) for number, placement in enumerate(parameter.placements) if placement.is_shard())
    return shards / _ranks()
