"""A stand-in for Transformer Engine that computes in high precision and records its calls."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lowprec.quant import OperandSpec, quantize


class FakeRecipe:
    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)


class Float8BlockScaling(FakeRecipe): ...


class Float8CurrentScaling(FakeRecipe): ...


class DelayedScaling(FakeRecipe): ...


class MXFP8BlockScaling(FakeRecipe): ...


class NVFP4BlockScaling(FakeRecipe): ...


class QParams(NamedTuple):
    power_2_scale: bool


class MMParams(NamedTuple):
    use_split_accumulator: bool


class FakeAutocast:
    recipes: ClassVar[list[Any]] = []

    def __init__(self, *, enabled: bool, recipe: Any) -> None:
        assert enabled
        self.recipe = recipe

    def __enter__(self) -> None:
        self.recipes.append(self.recipe)

    def __exit__(self, *_: object) -> None:
        self.recipes.pop()


class FakeLinear(nn.Module):
    """A layer that computes y = x . w^T under an autocast; with delayed scaling it records amaxes as the real one does."""

    made: ClassVar[list["FakeLinear"]] = []
    calls: ClassVar[list[tuple[Any, tuple[int, ...], torch.dtype, bool]]] = []

    def __init__(self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert device == "meta"
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))
        self.fp8_meta: dict[str, Any] = {}
        self.made.append(self)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        assert FakeAutocast.recipes
        for key, count in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(1024, count))

    def forward(self, x: Tensor) -> Tensor:
        recipe = FakeAutocast.recipes[-1]
        self.calls.append((recipe, tuple(x.shape), x.dtype, torch.is_grad_enabled()))
        y = nn.functional.linear(x, self.weight.to(x.dtype), None if getattr(self, "bias", None) is None else self.bias.to(x.dtype))
        if isinstance(recipe, DelayedScaling):
            self._record("scaling_fwd", 0, x)
            self._record("scaling_fwd", 1, self.weight)
            if y.requires_grad:
                y.register_hook(lambda g: self._record("scaling_bwd", 0, g))
        return y

    def _record(self, key: str, column: int, t: Tensor) -> None:
        row = self.fp8_meta[key].amax_history[0]
        row[column] = torch.maximum(row[column], t.detach().abs().max())


class FakeBlockQuantizer:
    """A quantiser that lays out our codes and scales as Transformer Engine does; the padding is full of NaN."""

    def __init__(self, element: str, *, rowwise: bool, columnwise: bool, force_pow_2_scales: bool, block_scaling_dim: int) -> None:
        assert rowwise
        assert columnwise
        block = {1: "1x128", 2: "128x128"}[block_scaling_dim]
        self.spec = OperandSpec.parse(f"{element}[{block} {'e8m0' if force_pow_2_scales else 'fp32'}]")

    def __call__(self, x: Tensor) -> SimpleNamespace:
        rows, row_scale = self._laid_out(x)
        columns, column_scale = self._laid_out(x.t())
        return SimpleNamespace(
            _rowwise_data=rows, _rowwise_scale_inv=row_scale, _columnwise_data=columns, _columnwise_scale_inv=column_scale
        )

    def _laid_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = quantize(x, self.spec)
        assert q.scale is not None
        plain = q.scale.t() if self.spec.kind == "1x128" else q.scale
        scale = torch.full((plain.shape[0], -(-plain.shape[1] // 4) * 4), torch.nan)
        scale[:, : plain.shape[1]] = plain
        return q.data.contiguous().view(torch.uint8), scale


class FakeTensorQuantizer:
    def __init__(self, element: str, device: torch.device, *, rowwise: bool, columnwise: bool, force_pow_2_scales: bool) -> None:
        assert rowwise
        assert columnwise
        assert not force_pow_2_scales
        self.spec = OperandSpec.parse(f"{element}[tensor fp32]")

    def __call__(self, x: Tensor) -> SimpleNamespace:
        q = quantize(x, self.spec)
        assert q.scale is not None
        return SimpleNamespace(
            _data=q.data.view(torch.uint8), _transpose=q.data.t().contiguous().view(torch.uint8), _scale_inv=q.scale.reshape(1)
        )


def answer(recipe_works: bool, reason: str):
    return lambda return_reason=False: (recipe_works, reason) if return_reason else recipe_works


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Install a stand-in for transformer_engine.pytorch that behaves as on a machine with a Hopper GPU; return the module."""
    names = ("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe")
    names += ("transformer_engine.pytorch", "transformer_engine.pytorch.quantization")
    package, common, recipes, pytorch, quantization = (ModuleType(name) for name in names)
    for recipe in (Float8BlockScaling, Float8CurrentScaling, DelayedScaling, MXFP8BlockScaling, NVFP4BlockScaling, QParams, MMParams):
        setattr(recipes, recipe.__name__, recipe)
    parts: dict[str, Any] = {
        "Linear": FakeLinear,
        "autocast": FakeAutocast,
        "DType": SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2"),
        "Float8BlockQuantizer": FakeBlockQuantizer,
        "Float8CurrentScalingQuantizer": FakeTensorQuantizer,
        "is_fp8_available": answer(True, ""),
        "is_fp8_block_scaling_available": answer(True, ""),
        "is_mxfp8_available": answer(False, "Device compute capability 10.0 or higher required for MXFP8 execution."),
        "is_nvfp4_available": answer(False, "Device compute capability 10.0 or higher required for NVFP4 execution."),
    }
    pytorch.__dict__.update(parts)
    recipes.__dict__.update(Format=SimpleNamespace(E4M3="e4m3 everywhere", HYBRID="e5m2 gradients"))
    quantization.__dict__.update(FP8GlobalStateManager=SimpleNamespace(get_buffer_info=lambda: "place in the updates"))
    package.__dict__.update(common=common, pytorch=pytorch)
    common.__dict__.update(recipe=recipes)
    for name, module in zip(names, (package, common, recipes, pytorch, quantization), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    FakeLinear.made.clear()
    FakeLinear.calls.clear()
    return pytorch
