"""AdamW with the weights in fp32 or bf16, and the moments in fp32, bf16, 8 or 4 bits.

bf16 weights have 8 significant bits: an update below 1/512 of a weight is lost when it is rounded
to nearest. Stochastic rounding keeps it on average (arXiv 2010.06192), so there is no fp32 copy of
the weights. 8-bit moments are those of arXiv 2110.02861 (blocks of 256 values), 4-bit moments those
of arXiv 2309.01507 (blocks of 128). All of it is torchao's (`torchao.optim`). What is added:
moments in fp32 or bf16 whatever the weights are, and noise that depends on the step alone.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowprec.config.schema import StrictConfig
from lowprec.errors import UserError
from lowprec.integrations.compile import kernels_by_shape
from lowprec.training.optim.moments import CODES, SCALE, can_be_quantised, put_together, take_apart

_BF16_BETA2 = 1 - 2.0**-8
"""From here on a bf16 second moment doesn't decay: (1 - beta2) of it can be less than half a unit
in its last place."""

_OTHER_SHARDS = "optimizer: quantised moments of this checkpoint were cut into other shards; go on with as many processes as it was saved with"

_STEPS = "rounded_steps"
"""Entry of the parameter groups, saved with them: the optimizer's steps so far."""


class OptimizerConfig(StrictConfig):
    """Formats of what AdamW keeps."""

    weights: Literal["fp32", "bf16"] = "fp32"
    """bf16: no fp32 weights; updates are rounded stochastically."""
    moments: Literal["fp32", "bf16", "8bit", "4bit"] = "fp32"
    """8bit and 4bit: of parameters of 4096 values or more, whole blocks each; the others keep
    fp32."""


def prepare_weights(model: nn.Module, config: OptimizerConfig) -> None:
    """Cast the floating-point parameters, not the buffers, to bf16 in place, if `config` says so.
    Before any optimizer holds them."""
    if config.weights == "bf16":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)


def build(
    config: OptimizerConfig,
    parameters: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) in the formats of `config`; torch.optim.AdamW if both are fp32.

    Of the others' parameter groups, `lr` is a tensor: change it with `fill_`, as torch's schedulers
    do. The first step compiles, which takes some seconds for each shape.

    Args:
        parameters: or parameter groups, as for torch.optim.AdamW; trainable ones are of dtype
            `config.weights`.
    Raises:
        UserError: torchao is not installed, weights of another dtype, or bf16 moments with a beta2
            at which the second can't decay.
    """
    if config.moments == "bf16" and betas[1] >= _BF16_BETA2:
        raise UserError(
            f"optimizer: bf16 moments can't decay with beta2 = {betas[1]:g}; lower it to 0.99 or "
            "less, or take moments fp32 or 8bit"
        )
    if config == OptimizerConfig():
        optimizer: Any = torch.optim.AdamW(
            parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
    else:
        made = _optimizer_class(config.moments)
        optimizer = made(
            parameters,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bf16_stochastic_round=True,
        )
    _check_dtypes(optimizer, config)
    return optimizer


def is_low_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `build` made it, and for other formats than fp32."""
    return any(_STEPS in group for group in optimizer.param_groups)


def keeps_bf16_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `build` made it for bf16 weights."""
    groups = [group for group in optimizer.param_groups if _STEPS in group]
    return any(
        parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]
    )


def _check_dtypes(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    wanted = torch.bfloat16 if config.weights == "bf16" else torch.float32
    for parameter in (
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ):
        if parameter.requires_grad and parameter.dtype != wanted:
            remedy = (
                "call prepare_weights first; Accelerate's FSDP2 keeps them bf16 only with mixed "
                "precision off"
                if config.weights == "bf16"
                else "load the model in float32, or say weights: bf16"
            )
            found = f"a parameter of shape {list(parameter.shape)} is {str(parameter.dtype).removeprefix('torch.')}"
            raise UserError(f"optimizer.weights: {config.weights}, but {found}; {remedy}")


@functools.cache
def _optimizer_class(moments: str) -> Any:
    try:
        torchao = importlib.import_module("torchao.optim")
    except ImportError:
        raise UserError(
            "optimizer: bf16 weights, and moments other than fp32, need torchao: pip install "
            "'torchao>=0.18'"
        ) from None
    base = {"8bit": torchao.AdamW8bit, "4bit": torchao.AdamW4bit}.get(moments, torchao._AdamW)
    unquantised = torch.bfloat16 if moments == "bf16" else torch.float32

    class LowPrecisionAdamW(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for group in self.param_groups:
                group[_STEPS] = 0

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            # torchao gives moments the dtype of their weight, quantised ones too, and fails where
            # those are sharded and bf16. It quantises what is large enough of each rank's shard;
            # state dicts need the same kind on all ranks.
            like = torch.empty_like(p, dtype=unquantised)
            if moments not in ("8bit", "4bit") or not can_be_quantised(p, self.block_size):
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
            return like.to(p.device)  # the mesh's before, though weights are offloaded

        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                group[_STEPS] += 1
            # DDP's ranks must round alike, and so must a resumed run.
            with (
                _noise_of_step(self.param_groups[0][_STEPS], self.param_groups),
                kernels_by_shape(),
            ):
                super().step()
            return loss

        def state_dict(self) -> dict[str, Any]:
            whole = super().state_dict()
            return {
                **whole,
                "state": {number: take_apart(state) for number, state in whole["state"].items()},
            }

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            groups, states = state_dict["param_groups"], state_dict["state"]
            if any(_STEPS not in group for group in groups):
                raise UserError(
                    "optimizer: this state is another optimizer's; go on with the one that it was "
                    "saved with"
                )
            # Only the groups: torch casts every state to the weight's dtype; these are kept as they
            # were saved.
            super().load_state_dict({"state": {}, "param_groups": groups})
            saved = (number for group in groups for number in group["params"])
            held = (parameter for group in self.param_groups for parameter in group["params"])
            for number, parameter in zip(saved, held, strict=True):
                if states.get(number):
                    self.state[parameter] = self._loaded(states[number], parameter)

        def _loaded(self, state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
            """A parameter's state of a state dict, on its device."""
            loaded: dict[str, Any] = {}
            for name, value in state.items():
                moment = name.removesuffix(CODES)
                if name.endswith(SCALE):
                    continue
                if moment != name:
                    if not can_be_quantised(parameter, self.block_size):
                        raise UserError(_OTHER_SHARDS)
                    try:
                        loaded[moment] = put_together(
                            moment, state, self._new_buffer(parameter, signed=moment == "exp_avg")
                        )
                    except ValueError as error:
                        raise UserError(f"{_OTHER_SHARDS} ({error})") from None
                else:
                    loaded[name] = value if name == "step" else value.to(parameter.device)
            return loaded

    return LowPrecisionAdamW


@contextlib.contextmanager
def _noise_of_step(step: int, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Random numbers that only the step decides, in torch's global generators, which have their
    state back at the end.

    DDP's ranks must round alike, or their weights would part, though other random numbers of theirs
    (dropout) differ. And a resumed run rounds as the first one would have.
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
