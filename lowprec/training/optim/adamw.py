"""AdamW with the weights in fp32 or bf16, and the moments in fp32, bf16, 8 or 4 bits.

bf16 weights have 8 significant bits: an update below 1/512 of a weight is lost when it is rounded
to nearest. Stochastic rounding keeps it on average (arXiv 2010.06192), so no fp32 copy of the
weights is needed. 8-bit moments follow arXiv 2110.02861 (blocks of 256 values), 4-bit moments
arXiv 2309.01507 (blocks of 128 values). The optimizers are torchao's (`torchao.optim`). This module
adds two things: the format of fp32 and bf16 moments does not depend on the weights, and the random
numbers of stochastic rounding depend on the step alone.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowprec.config.schema import StrictConfig
from lowprec.errors import UserError
from lowprec.integrations.compile import kernels_by_shape
from lowprec.training.optim.moments import CODES, SCALE, can_be_quantised, put_together, take_apart

_BF16_BETA2 = 1 - 2.0**-8
"""Lowest beta2 at which a bf16 second moment may not decay: (1 - beta2) of it can be less than half
a unit in its last place."""

_OTHER_SHARDS = (
    "optimizer: quantised moments of this checkpoint were cut into other shards; resume with as "
    "many processes as it was saved with"
)

_STEPS = "rounded_steps"
"""Key in the parameter groups of the number of steps so far. It is saved with them."""

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
"""Parameters, or parameter groups, in the form that torch.optim.AdamW takes."""


class OptimizerConfig(StrictConfig):
    """Formats of the weights and moments of AdamW."""

    weights: Literal["fp32", "bf16"] = "fp32"
    """Format of the weights. bf16: there is no fp32 copy, and updates are rounded
    stochastically."""
    moments: Literal["fp32", "bf16", "8bit", "4bit"] = "fp32"
    """Format of both moments. 8bit and 4bit apply to parameters of 4096 values or more that consist
    of whole blocks; the moments of other parameters stay in fp32."""


def prepare_weights(model: nn.Module, config: OptimizerConfig) -> None:
    """Cast the floating-point parameters of `model` to bf16 in place if `config.weights` is bf16.

    Buffers keep their dtype. Call this before an optimizer is made of the parameters.
    """
    if config.weights == "bf16":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)


def build(
    config: OptimizerConfig,
    parameters: Parameters,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """Return AdamW (arXiv 1711.05101) in the formats of `config`.

    If both formats are fp32, the result is torch.optim.AdamW. In any other format, `lr` of a
    parameter group is a tensor: change it with `fill_`, as torch's schedulers do. The first step
    compiles, which takes some seconds for each shape.

    Args:
        parameters: Parameters or parameter groups. The trainable ones have dtype `config.weights`.
    Raises:
        UserError: torchao is not installed, a weight has another dtype, or moments are bf16 and
            beta2 is so high that the second moment can't decay.
    """
    if config.moments == "bf16" and betas[1] >= _BF16_BETA2:
        raise UserError(
            f"optimizer: bf16 moments can't decay with beta2 = {betas[1]:g}; lower it to 0.99 or "
            "less, or take moments fp32 or 8bit"
        )
    settings: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
    }
    if config == OptimizerConfig():
        optimizer = torch.optim.AdamW(parameters, **settings)
    else:
        optimizer_class = _optimizer_class(config.moments)
        optimizer = optimizer_class(parameters, **settings, bf16_stochastic_round=True)
    _check_dtypes(optimizer, config)
    return optimizer


def is_low_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if `build` made the optimizer with a format other than fp32."""
    return any(_STEPS in group for group in optimizer.param_groups)


def keeps_bf16_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if `build` made the optimizer for bf16 weights."""
    groups = [group for group in optimizer.param_groups if _STEPS in group]
    return any(
        parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]
    )


def _check_dtypes(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Raise UserError if a trainable parameter does not have the dtype of `config.weights`."""
    if config.weights == "bf16":
        expected = torch.bfloat16
        remedy = (
            "call prepare_weights first; Accelerate's FSDP2 keeps them bf16 only with mixed "
            "precision off"
        )
    else:
        expected = torch.float32
        remedy = "load the model in float32, or say weights: bf16"
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.dtype != expected:
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise UserError(
                    f"optimizer.weights: {config.weights}, but a parameter of shape "
                    f"{list(parameter.shape)} is {dtype}; {remedy}"
                )


@functools.cache
def _optimizer_class(moments: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of AdamW whose moments have the format `moments`.

    It derives from a class of torchao, which is imported here because it is optional.
    """
    try:
        torchao = importlib.import_module("torchao.optim")
    except ImportError:
        raise UserError(
            "optimizer: bf16 weights, and moments other than fp32, need torchao: pip install "
            "'torchao>=0.18'"
        ) from None
    base = {"8bit": torchao.AdamW8bit, "4bit": torchao.AdamW4bit}.get(moments, torchao._AdamW)
    return type("LowPrecisionAdamW", (_StepwiseAdamW, base), {"moments": moments})


class _StepwiseAdamW(torch.optim.Optimizer):
    """The methods that replace those of torchao's AdamW, in a class that derives from both.

    State dicts hold plain tensors, and rounding depends on the number of the step alone.
    """

    moments: str
    """Format of the moments, as in `OptimizerConfig`."""
    block_size: int
    """Number of values in a block of quantised moments."""
    _subclass_zeros: Callable[..., Tensor]
    """torchao's function that makes a quantised moment of zeros."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group[_STEPS] = 0

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """Return a moment of zeros for the parameter `p`, quantised if its size allows it.

        torchao gives moments, also quantised ones, the dtype of their weight, and fails if a
        weight is sharded and bf16. It also decides by the size of each rank's shard, but state
        dicts need the same kind of moment on all ranks.
        """
        dtype = torch.bfloat16 if self.moments == "bf16" else torch.float32
        like = torch.empty_like(p, dtype=dtype)
        if self.moments not in ("8bit", "4bit") or not can_be_quantised(p, self.block_size):
            return torch.zeros_like(like)
        if not isinstance(like, DTensor):
            return self._subclass_zeros(like, signed, self.block_size)
        local = self._subclass_zeros(like.to_local(), signed, self.block_size)
        like = DTensor.from_local(
            local,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )
        # from_local put it on the mesh's device. An offloaded weight is in host memory.
        return like.to(p.device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. Its random numbers depend on the number of the step alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group[_STEPS] += 1
        # kernels_by_shape and the noise of the step: all DDP ranks, and a resumed run, must
        # round alike.
        with (
            _noise_of_step(self.param_groups[0][_STEPS], self.param_groups),
            kernels_by_shape(),
        ):
            super().step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain tensors, each quantised moment as codes and scale."""
        whole = super().state_dict()
        return {
            **whole,
            "state": {number: take_apart(state) for number, state in whole["state"].items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            UserError: the state is another optimizer's, or of other shards.
        """
        groups = state_dict["param_groups"]
        states = state_dict["state"]
        if any(_STEPS not in group for group in groups):
            raise UserError(
                "optimizer: this state is another optimizer's; resume with the one that it was "
                "saved with"
            )
        # torch loads the groups only. It would cast every state to the weight's dtype, but the
        # states must keep the dtype that they were saved in.
        super().load_state_dict({"state": {}, "param_groups": groups})
        saved = (number for group in groups for number in group["params"])
        held = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(saved, held, strict=True):
            if states.get(number):
                self.state[parameter] = self._loaded(states[number], parameter)

    def _loaded(self, state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's entry of a state dict as its state, on its device."""
        loaded: dict[str, Any] = {}
        for name, value in state.items():
            if name.endswith(SCALE):  # It is loaded with its codes.
                continue
            if name.endswith(CODES):
                moment = name.removesuffix(CODES)
                loaded[moment] = self._loaded_moment(moment, state, parameter)
            else:
                loaded[name] = value if name == "step" else value.to(parameter.device)
        return loaded

    def _loaded_moment(self, moment: str, state: dict[str, Any], parameter: Tensor) -> Tensor:
        """Return the quantised moment of a parameter from its codes and scale."""
        if not can_be_quantised(parameter, self.block_size):
            raise UserError(_OTHER_SHARDS)
        fresh = self._new_buffer(parameter, signed=moment == "exp_avg")
        try:
            return put_together(moment, state, fresh)
        except ValueError as error:
            raise UserError(f"{_OTHER_SHARDS} ({error})") from None


@contextlib.contextmanager
def _noise_of_step(step: int, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Seed torch's global generators with the number of the step, and restore their state at the
    end.

    All DDP ranks must round alike, or their weights would differ, although their other random
    numbers (dropout) differ. A resumed run rounds as the first run would have rounded.
    """
    indices = {
        parameter.device.index
        for group in groups
        for parameter in group["params"]
        if parameter.device.type == "cuda"
    }
    generators = [
        torch.default_generator,
        *(torch.cuda.default_generators[index] for index in sorted(indices)),
    ]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(step)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
