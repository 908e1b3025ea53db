"""The ways to compute a linear layer under a recipe, by the name that `precision.backend` gives.

A LayerBackend says which layers and recipes it takes, and turns a linear layer into one of its own
classes. Backends of `lowprec.gemm` multiply the operands that our layers quantise; all of them
share one class of layers, `GemmLayers`. `LAYER_BACKENDS` holds those that are modules of another
library. To add one, write its class and its entry there.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import nn

from lowprec.errors import UserError
from lowprec.gemm import Support, select
from lowprec.nn import LowPrecisionLinear, experts
from lowprec.nn.gemms import gemm_size
from lowprec.nn.linear import original_class
from lowprec.nn.te_linear import DelayedTELinear, TELinear
from lowprec.nn.te_recipes import te_reason, why_not_shape, why_not_te
from lowprec.recipe import Recipe


class ConvertedLinear(Protocol):
    """A linear layer that a LayerBackend has converted."""

    def to_linear(self) -> nn.Module:
        """Turn the layer back into what it was, in place."""
        ...


class LayerBackend(ABC):
    """One way to compute linear layers under a recipe."""

    modules: ClassVar[tuple[type[ConvertedLinear], ...]]
    """Classes of the layers that it makes."""
    changes_precision: ClassVar[bool] = True
    """Flag: its layers take another recipe in a later phase of a run, and in evaluation."""
    fuses: ClassVar[bool] = True
    """Flag: its layers may read a fused SwiGLU (`swiglu_fusion`)."""

    @abstractmethod
    def why_not_linear(self, linear: nn.Module, recipe: Recipe) -> str | None:
        """Return why it can't convert a linear layer to `recipe`; None if it can."""

    @abstractmethod
    def why_not_stack(self, module: nn.Module, recipe: Recipe) -> str | None:
        """Return why it can't convert a module's stack of experts to `recipe`; None if it can."""

    @abstractmethod
    def supports(
        self, recipe: Recipe, gemm: str, device_type: str, shape: tuple[int, int]
    ) -> tuple[str, Support]:
        """Return the name of the backend that multiplies one GEMM of a layer, and its answer.

        Args:
            shape: outputs N and inputs K of the layer.
        Raises:
            UserError: it can't run the recipe on such a device.
        """

    @abstractmethod
    def convert(
        self,
        linear: nn.Module,
        recipe: Recipe,
        device_type: str,
        *,
        layer: int,
        keeps: tuple[Recipe, ...],
        evaluation: Recipe | None,
    ) -> None:
        """Turn a linear layer, or one that it has converted, into its layer for `recipe`, in
        place.

        Args:
            layer: place of the layer among the model's weights.
            keeps: recipes whose state the layer holds too.
            evaluation: the recipe of evaluation, if that is another one.
        """


class GemmLayers(LayerBackend):
    """Our own layers, whose products run on backends of `lowprec.gemm`: on the one of this name, or
    by "auto" each on the fastest that supports it."""

    modules = (LowPrecisionLinear,)

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def why_not_linear(self, linear: nn.Module, recipe: Recipe) -> str | None:
        return None

    def why_not_stack(self, module: nn.Module, recipe: Recipe) -> str | None:
        return experts.why_not_stack(module, recipe)

    def supports(
        self, recipe: Recipe, gemm: str, device_type: str, shape: tuple[int, int]
    ) -> tuple[str, Support]:
        chosen, support = select(
            *recipe.operands(gemm),
            device_type,
            self.backend,
            recipe.gemm(gemm).sums,
            gemm_size(gemm, *shape),
        )
        return chosen.name, support

    def convert(
        self,
        linear: nn.Module,
        recipe: Recipe,
        device_type: str,
        *,
        layer: int,
        keeps: tuple[Recipe, ...],
        evaluation: Recipe | None,
    ) -> None:
        LowPrecisionLinear.from_linear(
            linear,
            recipe,
            self.backend,
            device_type,
            seed=torch.initial_seed(),
            layer=layer,
            keeps=keeps,
            evaluation=evaluation,
        )


class TransformerEngineLayers(LayerBackend):
    """Linear layers of Transformer Engine (`nn/te_linear.py`)."""

    modules = (TELinear, DelayedTELinear)
    changes_precision = False
    fuses = False

    def why_not_linear(self, linear: nn.Module, recipe: Recipe) -> str | None:
        if not isinstance(linear, self.modules) and original_class(linear) is not nn.Linear:
            return f"backend te takes nn.Linear only, not {original_class(linear).__name__}"
        assert isinstance(linear, nn.Linear)
        return why_not_shape(linear, recipe)

    def why_not_stack(self, module: nn.Module, recipe: Recipe) -> str | None:
        return "backend te runs linear layers only"

    def supports(
        self, recipe: Recipe, gemm: str, device_type: str, shape: tuple[int, int]
    ) -> tuple[str, Support]:
        if (reason := why_not_te(recipe, device_type)) is not None:
            raise UserError(
                f"precision.backend: 'te' can't run recipe {recipe.name} on {device_type}: {reason}"
            )
        return "te", Support(ok=True, native=True, reason=te_reason(recipe))

    def convert(
        self,
        linear: nn.Module,
        recipe: Recipe,
        device_type: str,
        *,
        layer: int,
        keeps: tuple[Recipe, ...],
        evaluation: Recipe | None,
    ) -> None:
        assert isinstance(linear, nn.Linear)
        TELinear.from_linear(linear, recipe)


LAYER_BACKENDS: dict[str, LayerBackend] = {"te": TransformerEngineLayers()}
"""The layer backends that are modules of another library, by name."""

CONVERTED: tuple[type[ConvertedLinear], ...] = (
    *GemmLayers.modules,
    *(module for backend in LAYER_BACKENDS.values() for module in backend.modules),
)
"""Classes of converted linear layers."""


def layer_backend(name: str) -> LayerBackend:
    """Return the layer backend that `precision.backend: name` means: "auto", the name of a GEMM
    backend, or one of `LAYER_BACKENDS`."""
    return LAYER_BACKENDS[name] if name in LAYER_BACKENDS else GemmLayers(name)
