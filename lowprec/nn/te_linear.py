"""A recipe as a Transformer Engine module: `backend: te`.

`TELinear` is an nn.Linear whose forward is te.Linear's under the recipe of Transformer Engine that
multiplies the same operands, its twin. The te.Linear is no submodule and owns nothing: it computes
with the parameters of the nn.Linear, so names, state dict and optimizer see no difference. Which
recipe is whose twin:

    fp8_blockwise, fp8_blockwise_ue8m0    Float8BlockScaling, with fp32 and with power-of-two scales
    fp8_tensorwise                        Float8CurrentScaling
    fp8_delayed                           DelayedScaling; its scales of the first pass are 1
    mxfp8, nvfp4                          MXFP8BlockScaling, NVFP4BlockScaling; on Blackwell

Every option that a recipe of Transformer Engine would read from the environment is given. Tokens
are filled up with zeros to what its products want. torch.compile leaves these layers out of its
graphs.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import UserError
from lowprec.nn.linear import LowPrecisionLinear
from lowprec.recipe import GEMMS, Recipe, library


@dataclass(frozen=True, kw_only=True)
class _Twin:
    """A recipe of Transformer Engine."""

    name: str
    """Its class in transformer_engine.common.recipe."""
    available: str
    """What of transformer_engine.pytorch tells whether this GPU runs it."""
    format: str | None = None
    """E4M3, or HYBRID: E5M2 gradients."""
    options: Mapping[str, Any] = field(default_factory=dict)
    power_of_two: bool | None = None
    """Whether its scales are powers of two, where it lets one choose."""
    multiple: int = 16
    """What features and tokens are multiples of."""


def _block_twin(*, power_of_two: bool) -> _Twin:
    return _Twin(
        name="Float8BlockScaling",
        available="is_fp8_block_scaling_available",
        format="E4M3",
        options={"use_f32_scales": not power_of_two},
        power_of_two=power_of_two,
    )


_TWINS = {
    "fp8_blockwise": _block_twin(power_of_two=False),
    "fp8_blockwise_ue8m0": _block_twin(power_of_two=True),
    "fp8_tensorwise": _Twin(
        name="Float8CurrentScaling",
        available="is_fp8_available",
        format="HYBRID",
        options={"use_power_2_scales": False},
        power_of_two=False,
    ),
    "fp8_delayed": _Twin(
        name="DelayedScaling",
        available="is_fp8_available",
        format="HYBRID",
        options={
            "margin": 0,
            "amax_history_len": 1024,
            "amax_compute_algo": "max",
            "reduce_amax": False,
        },
    ),
    "mxfp8": _Twin(
        name="MXFP8BlockScaling",
        available="is_mxfp8_available",
        format="E4M3",
        options={"enable_2d_quantization": False},
        multiple=32,
    ),
    "nvfp4": _Twin(
        name="NVFP4BlockScaling",
        available="is_nvfp4_available",
        options={"nvfp4_4over6": "none", "row_scaled_activation": False}
        | dict.fromkeys(
            ("disable_rht", "disable_stochastic_rounding", "disable_2d_quantization"), False
        ),
        multiple=32,
    ),
}
"""By the recipe of the library that multiplies the same operands."""

_NO_TWIN = f"Transformer Engine has no such recipe; it has {', '.join(_TWINS)}"
_INSTALL = "needs Transformer Engine: pip install 'lowprec[te]'"


def te_recipe(recipe: Recipe) -> Any:
    """The recipe object of Transformer Engine that multiplies the operands of `recipe`; UserError
    if there is none, or no library."""
    twin = _twin(recipe)
    if twin is None:
        raise UserError(f"recipe {recipe.name}: {_NO_TWIN}")
    try:
        import transformer_engine.common.recipe as recipes
    except ModuleNotFoundError:
        raise UserError(f"recipe {recipe.name}: backend 'te' {_INSTALL}") from None
    form = {} if twin.format is None else {"fp8_format": getattr(recipes.Format, twin.format)}
    made = getattr(recipes, twin.name)(**form, **twin.options, backward_override=None)
    if (
        twin.power_of_two is not None
    ):  # the option alone is not enough: the class made these of the environment
        for operand in ("fwd_inp", "fwd_weight", "bwd_grad"):
            setattr(made, f"fp8_quant_{operand}", recipes.QParams(power_2_scale=twin.power_of_two))
    if (
        twin.format == "HYBRID"
    ):  # whose fprop would sum in the 14 bits of Hopper's matrix units, which our recipe does not
        made.fp8_gemm_fprop = recipes.MMParams(use_split_accumulator=True)
    return made


def why_not_te(recipe: Recipe, device_type: str) -> str | None:
    """Why Transformer Engine can't run `recipe` on a device of this type, on this machine; None if
    it can."""
    twin = _twin(recipe)
    if twin is None:
        return _NO_TWIN
    if device_type != "cuda":
        return "Transformer Engine needs a CUDA device"
    if (
        "transformer_engine" not in sys.modules
        and importlib.util.find_spec("transformer_engine") is None
    ):
        return _INSTALL
    if not torch.cuda.is_available():
        return "Transformer Engine needs a CUDA device, and this machine has none"
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        return f"Transformer Engine does not load: {error}"
    available, reason = getattr(te, twin.available)(return_reason=True)
    if not available:
        return reason.rstrip(".")
    if (
        twin.name == "Float8BlockScaling"
        and not twin.power_of_two
        and torch.cuda.get_device_capability()[0] >= 10
    ):
        return "Transformer Engine's block scales are powers of two on this GPU, as fp8_blockwise_ue8m0 has them"
    return None


def why_not_shape(linear: nn.Linear, recipe: Recipe) -> str | None:
    """Why Transformer Engine's products don't take the layer's shape; None if they do, or if there
    is no twin."""
    twin = _twin(recipe)
    if twin is None or (
        linear.in_features % twin.multiple == 0 and linear.out_features % twin.multiple == 0
    ):
        return None
    multiple, shape = twin.multiple, f"{linear.out_features} x {linear.in_features}"
    return (
        f"Transformer Engine's {twin.name} takes features in multiples of {multiple}, not {shape}"
    )


def te_reason(recipe: Recipe) -> str:
    """What runs `recipe`, in words: 'Transformer Engine, Float8BlockScaling'."""
    twin = _twin(recipe)
    assert twin is not None
    return f"Transformer Engine, {twin.name}"


def _twin(recipe: Recipe) -> _Twin | None:
    """By the operands, and how they are summed; the name tells nothing."""
    for name, twin in _TWINS.items():
        named = library.get(name)
        if all(named.gemm(gemm) == recipe.gemm(gemm) for gemm in GEMMS):
            return twin
    return None


class TELinear(nn.Linear):
    """An nn.Linear that a te.Linear computes. Made by `from_linear`; its parameters are the
    original's."""

    recipe: Recipe
    twin: Any
    """The recipe of Transformer Engine."""
    multiple: int
    sharded: bool
    _inner: Any
    """The te.Linear, made in the first forward. In the module's __dict__, so that it is no
    submodule."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> "TELinear":
        """Turn `linear`, or a layer that is converted already, into a TELinear, in place, and
        return it.

        The module and its parameters stay the same objects, and so do the state-dict keys, but for
        the state of delayed scaling (`DelayedTELinear`).

        Raises:
            UserError: the recipe has no twin, or its products don't take this shape.
        """
        if (reason := why_not_shape(linear, recipe)) is not None:
            raise UserError(reason)
        made, twin = te_recipe(recipe), _twin(recipe)
        assert twin is not None
        if isinstance(linear, LowPrecisionLinear | TELinear):
            linear.to_linear()
        assert type(linear) is nn.Linear
        linear.__class__ = DelayedTELinear if twin.name == "DelayedScaling" else TELinear
        assert isinstance(linear, TELinear)
        linear.recipe, linear.twin, linear.multiple, linear.sharded = (
            recipe,
            made,
            twin.multiple,
            type(linear.weight).__name__ == "DTensor",
        )
        linear._forget()
        return linear

    def to_linear(self) -> nn.Linear:
        """Undo `from_linear`, in place."""
        for name in ("recipe", "twin", "multiple", "sharded", "_inner", "_loaded"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N] of the input's dtype (of autocast's, where that is on), which must
        be the weight's without autocast."""
        x = input
        if torch.is_autocast_enabled(
            x.device.type
        ):  # as nn.Linear would cast it; the weight is quantised from its master copy
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x_MK = x.reshape(-1, self.in_features)
        tokens = x_MK.shape[0]
        # At least one multiple: Transformer Engine takes no empty matrix.
        rows = max(-(-tokens // self.multiple), 1) * self.multiple
        if rows != tokens:
            x_MK = nn.functional.pad(x_MK, (0, 0, 0, rows - tokens))
        y_MN = self._run(x_MK)
        if rows != tokens:
            y_MN = y_MN[:tokens]
        return y_MN.view(*x.shape[:-1], self.out_features)

    @torch._disable_dynamo
    def _run(self, x_MK: Tensor) -> Tensor:
        import transformer_engine.pytorch as te

        with te.autocast(enabled=True, recipe=self.twin):
            return self._call(self._bound(te), x_MK)

    def _call(self, inner: Any, x_MK: Tensor) -> Tensor:
        return inner(x_MK)

    def _bound(self, te: Any) -> Any:
        """The te.Linear with this module's parameters, which FSDP and moving the module replace."""
        if self._inner is None:
            bias = self.bias is not None
            made = te.Linear(
                self.in_features,
                self.out_features,
                bias=bias,
                params_dtype=self.weight.dtype,
                device="meta",
            )
            self.__dict__["_inner"] = made
        inner: Any = self._inner
        inner._parameters["weight"] = self.weight
        if self.bias is not None:
            inner._parameters["bias"] = self.bias
        # Its own test for FSDP2 looks at the te.Linear, which is not wrapped. It then keeps no
        # codes of the gathered weight until the backward, but makes them again.
        inner.__dict__["_is_fsdp2"] = self.sharded
        return inner

    def _forget(self) -> None:
        """Drop the te.Linear: the next forward makes another one."""
        self.__dict__["_inner"] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TELinear":
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inner": None}

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name == "weight" and type(value).__name__ == "DTensor"
        ):  # so FSDP2 puts the sharded weight in place
            self.sharded = True
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}, backend=te"


class DelayedTELinear(TELinear):
    """A TELinear under delayed scaling, whose scales and amax histories are part of the state dict.

    The extra state is one fp32 matrix [1 + history, 5]: the scales and, below them, the amaxes,
    those since the last update first; for x, w, y, g and dx, of which y and dx are never quantised.

    Transformer Engine updates the scales of all modules whenever its outermost autocast ends. Here
    every layer is in an autocast of its own, so each layer would push a zero into all other
    histories. So the layers stay out of that, and each updates its own before a forward pass with
    gradients: no sooner, since the backward of a sharded weight quantises it again and must find
    the scale of the forward. What passes without gradients see is dropped. No rank asks the others
    here: see `share_histories`.
    """

    _COLUMNS = (("scaling_fwd", 3, 448.0), ("scaling_bwd", 2, 57344.0))
    """Transformer Engine's key, the tensors under it, and the largest value of their format."""

    _loaded: Tensor | None
    """The extra state while there is no te.Linear to hold it."""

    def get_extra_state(self) -> Tensor:
        """The state, on the CPU."""
        if self._loaded is not None:
            return self._loaded.clone()
        parts = [torch.cat((state.scale[None], state.amax_history)) for state in self._states()]
        return torch.cat(parts, 1).cpu() if parts else self._fresh_state()

    def set_extra_state(self, state: Any) -> None:
        """Takes effect in the next forward. ValueError if it is not what `get_extra_state` gave."""
        expected = self._fresh_state().shape
        if not isinstance(state, Tensor) or state.shape != expected:
            raise ValueError(
                f"the extra state of a layer with delayed scaling is a matrix {list(expected)}"
            )
        self.__dict__["_loaded"] = state.detach().float().cpu().clone()

    def _fresh_state(self) -> Tensor:
        state = torch.zeros(
            1 + self.twin.amax_history_len, sum(count for _, count, _ in self._COLUMNS)
        )
        state[0] = 1
        return state

    def histories(self) -> list[Tensor]:
        """Transformer Engine's amax histories; none before the first forward."""
        return [state.amax_history for state in self._states()]

    def _states(self) -> list[Any]:
        """Transformer Engine's states of the forward and the backward tensors; none before the
        first forward."""
        meta = {} if self._inner is None else self._inner.fp8_meta
        return [meta[key] for key, _, _ in self._COLUMNS if key in meta]

    def _call(self, inner: Any, x_MK: Tensor) -> Tensor:
        if not self._states():
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            # By this it takes the module for one that is among those it updates already.
            inner.fp8_meta[FP8GlobalStateManager.get_buffer_info()] = []
            with torch.inference_mode(False):
                inner.init_fp8_metadata(num_gemms=1)
        forward, backward = self._states()
        if self._loaded is not None:
            for state, part in zip(
                (forward, backward),
                self._loaded.split([count for _, count, _ in self._COLUMNS], 1),
                strict=True,
            ):
                state.scale.copy_(part[0])
                state.amax_history.copy_(part[1:])
            self.__dict__["_loaded"] = None
        if torch.is_grad_enabled():
            for state, (_, _, largest) in zip((forward, backward), self._COLUMNS, strict=True):
                _update(state, largest)
            return inner(x_MK)
        seen = forward.amax_history[0].clone()
        y_MN = inner(x_MK)
        forward.amax_history[0].copy_(seen)
        return y_MN

    def _forget(self) -> None:
        self.__dict__["_loaded"] = (
            self.get_extra_state()
            if self.__dict__.get("_inner") is not None
            else self.__dict__.get("_loaded")
        )
        super()._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loaded": self.get_extra_state()}


@torch.no_grad()
def _update(state: Any, largest: float) -> None:
    """New scales from the amaxes that were seen, in place; the newest, of row 0, join the others,
    and row 0 starts again.

    An amax that is not finite counts for nothing: it would keep the scale as it is for as long as
    it is remembered.
    """
    history, scale = state.amax_history, state.scale
    history[0].nan_to_num_(nan=0.0, posinf=0.0)
    amax = history.amax(0)
    limit = torch.finfo(torch.float32).max
    scale.copy_(torch.where(amax > 0, (largest / amax).clamp(max=limit), scale))
    history.copy_(history.roll(-1, 0))
    history[0].zero_()
