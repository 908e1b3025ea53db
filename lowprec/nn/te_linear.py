"""Linear layers of Transformer Engine under our recipes: `backend: te`.

A `TELinear` is an nn.Linear whose forward is that of a te.Linear under the twin of its recipe
(`te_recipes.py`). The te.Linear is no submodule and owns nothing: it computes with the parameters
of the nn.Linear, so names, state dict and optimizer do not change. Tokens are padded with zeros to
the multiple that its GEMMs take. torch.compile leaves these layers out of its graphs.

    fprop   y_MN  = x_MK   . w_NK^T            [M, K] . [N, K]^T -> [M, N]
    dgrad   dx_MK = g_MN   . (w^T)_KN^T        [M, N] . [K, N]^T -> [M, K]
    wgrad   dw_NK = g^T_NM . (x^T)_KM^T        [N, M] . [K, M]^T -> [N, K]

A `DelayedTELinear` also holds the scales and amax histories of delayed scaling.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowprec.errors import UserError
from lowprec.nn.calls import note_call
from lowprec.nn.dtypes import check_dtypes
from lowprec.nn.known import is_plain
from lowprec.nn.linear import LowPrecisionLinear
from lowprec.nn.te_recipes import te_recipe, twin_of, why_not_shape
from lowprec.recipe import Recipe


class TELinear(nn.Linear):
    """An nn.Linear that is computed by a te.Linear. `from_linear` makes one in place."""

    recipe: Recipe
    """Recipe of the layer, one of ours."""
    twin: Any
    """Twin of the recipe, an object of transformer_engine.common.recipe."""
    multiple: int
    """Number whose multiples the twin takes as features and tokens."""
    sharded: bool
    """Flag: FSDP2 shards the weight."""
    _inner: Any
    """The te.Linear, made in the first forward; None before it. It is set in the module's __dict__,
    so that it is no submodule."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> "TELinear":
        """Turn `linear` into a TELinear, in place, and return it.

        The module and its parameters stay the same objects. The state-dict keys do not change,
        except that delayed scaling adds its state (`DelayedTELinear`).

        Args:
            linear: an nn.Linear, or a layer that is converted already.
        Raises:
            UserError: the recipe has no twin, Transformer Engine is not installed, or its GEMMs
                don't take this shape.
        """
        if (reason := why_not_shape(linear, recipe)) is not None:
            raise UserError(reason)
        made = te_recipe(recipe)
        twin = twin_of(recipe)
        assert twin is not None
        if isinstance(linear, LowPrecisionLinear | TELinear):
            linear.to_linear()
        assert type(linear) is nn.Linear
        linear.__class__ = DelayedTELinear if twin.name == "DelayedScaling" else TELinear
        assert isinstance(linear, TELinear)
        linear.recipe = recipe
        linear.twin = made
        linear.multiple = twin.multiple
        linear.sharded = not is_plain(linear.weight)
        linear._forget()
        return linear

    def to_linear(self) -> nn.Linear:
        """Undo `from_linear`, in place."""
        for name in ("recipe", "twin", "multiple", "sharded", "_inner", "_loaded"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Return x . w^T + bias, [..., K] -> [..., N].

        The result has the dtype of autocast where that is on, else that of the input, which must be
        the weight's.
        """
        # x is cast as nn.Linear would cast it. The weight is quantised from its master copy.
        autocast = torch.is_autocast_enabled(input.device.type)
        x = input.to(check_dtypes(input, self.weight, autocast, super().forward, self.recipe))
        x_MK = x.reshape(-1, self.in_features)
        tokens = x_MK.shape[0]
        # There is at least one multiple, because Transformer Engine takes no empty matrix.
        rows = max(-(-tokens // self.multiple), 1) * self.multiple
        if rows != tokens:
            x_MK = nn.functional.pad(x_MK, (0, 0, 0, rows - tokens))
        y_MN = self._run(x_MK)
        if rows != tokens:
            y_MN = y_MN[:tokens]
        return y_MN.view(*x.shape[:-1], self.out_features)

    @torch._disable_dynamo
    def _run(self, x_MK: Tensor) -> Tensor:
        """Run the te.Linear under the twin."""
        import transformer_engine.pytorch as te

        note_call(self)
        with te.autocast(enabled=True, recipe=self.twin):
            return self._call(self._bound(te), x_MK)  # [M, K] . [N, K]^T -> [M, N]

    def _call(self, inner: Any, x_MK: Tensor) -> Tensor:
        """Run the te.Linear `inner`. A subclass may set its state first."""
        return inner(x_MK)

    def _bound(self, te: ModuleType) -> Any:
        """Return the te.Linear with this module's parameters.

        The parameters are set anew in each pass, because FSDP replaces them, and so does moving the
        module.

        Args:
            te: transformer_engine.pytorch.
        """
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
        # Transformer Engine's own test for FSDP2 looks at the te.Linear, which FSDP2 does not wrap.
        # With this flag it does not keep the codes of the gathered weight until the backward, but
        # makes them again.
        inner.__dict__["_is_fsdp2"] = self.sharded
        return inner

    def _forget(self) -> None:
        """Drop the te.Linear. The next forward makes a new one."""
        self.__dict__["_inner"] = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TELinear":
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inner": None}

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 sets the sharded weight this way.
        if name == "weight" and not is_plain(value):
            self.sharded = True
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}, backend=te"


class _ScalingState(Protocol):
    """Transformer Engine's delayed scaling of several tensors of a layer."""

    scale: Tensor
    """Factors by which tensors are multiplied to quantise them, fp32 [tensors]."""
    amax_history: Tensor
    """Amaxes, fp32 [history, tensors]. Row 0 collects those since the last update."""


class _Direction(NamedTuple):
    """One direction of a pass in a te.Linear's `fp8_meta`."""

    key: str
    """Key of its `_ScalingState`."""
    tensors: int
    """Number of tensors in it."""
    largest: float
    """Largest value of their element format."""


_DIRECTIONS = (
    _Direction(key="scaling_fwd", tensors=3, largest=448.0),
    _Direction(key="scaling_bwd", tensors=2, largest=57344.0),
)
"""Forward: x, w and y in e4m3. Backward: g and dx in e5m2. y and dx are never quantised."""


class DelayedTELinear(TELinear):
    """A TELinear under delayed scaling, whose scales and amax histories are part of the state dict.

    The extra state is one fp32 matrix [1 + history, 5] with a column for each of x, w, y, g and dx:
    the scales in row 0, and below them the amaxes, beginning with those since the last update.

    Transformer Engine updates the scales of all modules whenever its outermost autocast ends. Here
    every layer has an autocast of its own, so each layer's end would push a zero into the histories
    of all others. The layers are therefore excluded from these updates. Each layer updates its own
    scales before a forward pass with gradients, and no sooner: the backward of a sharded weight
    quantises it again and must find the scale of the forward. Amaxes that passes without gradients
    see are dropped. Ranks do not exchange amaxes here; `share_histories` does that.
    """

    _loaded: Tensor | None
    """Extra state that waits for a te.Linear to hold it; None if one holds it, or if there is none
    yet."""

    def get_extra_state(self) -> Tensor:
        """Return the scales and amaxes, fp32 [1 + history, 5] on the CPU."""
        if self._loaded is not None:
            return self._loaded.clone()
        parts = [torch.cat((state.scale[None], state.amax_history)) for state in self._states()]
        return torch.cat(parts, 1).cpu() if parts else self._fresh_state()

    def set_extra_state(self, state: Any) -> None:
        """Load a result of `get_extra_state`. It takes effect in the next forward.

        Raises:
            UserError: the state is no matrix of that shape. It is data, never a pickle, as the
                extra state of Transformer Engine's own layers is.
        """
        expected = self._fresh_state().shape
        if not isinstance(state, Tensor) or state.shape != expected:
            raise UserError(
                f"the extra state of a layer with delayed scaling is a matrix {list(expected)}"
            )
        self.__dict__["_loaded"] = state.detach().float().cpu().clone()

    def _fresh_state(self) -> Tensor:
        """Return the extra state of a new layer: scales of 1, no amaxes."""
        columns = sum(direction.tensors for direction in _DIRECTIONS)
        state = torch.zeros(1 + self.twin.amax_history_len, columns)
        state[0] = 1
        return state

    def histories(self) -> list[Tensor]:
        """Return Transformer Engine's amax histories; none before the first forward."""
        return [state.amax_history for state in self._states()]

    def _states(self) -> list[_ScalingState]:
        """Return the states of `_DIRECTIONS`, forward and backward; none before the first
        forward."""
        meta = {} if self._inner is None else self._inner.fp8_meta
        return [meta[direction.key] for direction in _DIRECTIONS if direction.key in meta]

    def _call(self, inner: Any, x_MK: Tensor) -> Tensor:
        """Run the te.Linear after an update of the scales, or without one if gradients are off."""
        if not self._states():
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            # With this entry Transformer Engine takes the module for one that it updates already,
            # and so does not add it to its updates.
            inner.fp8_meta[FP8GlobalStateManager.get_buffer_info()] = []
            with torch.inference_mode(False):
                inner.init_fp8_metadata(num_gemms=1)
        forward, backward = self._states()
        if self._loaded is not None:
            parts = self._loaded.split([direction.tensors for direction in _DIRECTIONS], 1)
            for state, part in zip((forward, backward), parts, strict=True):
                state.scale.copy_(part[0])
                state.amax_history.copy_(part[1:])
            self.__dict__["_loaded"] = None
        if torch.is_grad_enabled():
            _update(forward, _DIRECTIONS[0].largest)
            _update(backward, _DIRECTIONS[1].largest)
            return inner(x_MK)
        before = forward.amax_history[0].clone()
        y_MN = inner(x_MK)
        forward.amax_history[0].copy_(before)
        return y_MN

    def _forget(self) -> None:
        """Drop the te.Linear, and keep its state for the next one."""
        if self.__dict__.get("_inner") is not None:
            self.__dict__["_loaded"] = self.get_extra_state()
        else:
            self.__dict__.setdefault("_loaded", None)
        super()._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loaded": self.get_extra_state()}


@torch.no_grad()
def _update(state: _ScalingState, largest: float) -> None:
    """Compute new scales from the amaxes, in place: scale = largest / max(history).

    A tensor whose amaxes are all zero keeps its scale.
    The amaxes of row 0, the newest, then join the history, the oldest leave it, and row 0 is zero.
    An amax that is not finite counts as zero: it would hold the scale constant for as long as the
    history contains it.
    """
    history = state.amax_history
    scale = state.scale
    history[0].nan_to_num_(nan=0.0, posinf=0.0)
    amax = history.amax(0)
    limit = torch.finfo(torch.float32).max
    scale.copy_(torch.where(amax > 0, (largest / amax).clamp(max=limit), scale))
    history.copy_(history.roll(-1, 0))
    history[0].zero_()
