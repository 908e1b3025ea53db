"""Layers whose weight is read by the code around them are known before the first step, where the source shows it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.conversion.convert import make_plan
from lowprec.conversion.weight_readers import read_names


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gate = (nn.Linear(8, 8) for _ in range(3))
        nn.init.zeros_(self.down.weight)  # the code of __init__ does not count


class Direct(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.linear(x, self.up.weight, self.up.bias) * self.gate(x))


class ByMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix(x)) * self.gate(x)

    @torch.no_grad()
    def mix(self, x: Tensor) -> Tensor:
        return x @ self.up.weight.float().t()


class Inherited(ByMethod):
    pass


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) if x.is_cuda else F.linear(x, self.up.weight)
        return self.down(y) * self.gate(x)


class Properties(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x.to(self.up.weight.dtype))
        return x


class Passed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up.weight) + _call(self.up, x)


class Super(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Unreached(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)

    def norm(self) -> Tensor:
        return self.up.weight.norm()


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@pytest.mark.parametrize("kind", [Direct, ByMethod, Inherited])
def test_a_layer_whose_weight_alone_is_used_is_found(kind: type[Base]):
    assert read_names(kind) == ("up",)
    rows = {layer.name: layer for layer in make_plan(nn.ModuleList([kind()]), "mxfp8").layers}
    assert rows["0.up"].reason == f"{kind.__name__} multiplies by its weight without calling it"
    assert [name for name, row in rows.items() if row.converted] == ["0.down", "0.gate"]


@pytest.mark.parametrize("kind", [Branch, Properties, Passed, Super, Unreached])
def test_a_layer_that_may_be_called_is_not(kind: type[Base]):
    assert read_names(kind) == ()


def test_code_without_a_source_is_no_error():
    namespace = {"Base": Base, "F": F}
    exec("class Made(Base):\n    def forward(self, x):\n        return F.linear(x, self.up.weight)", namespace)
    assert read_names(namespace["Made"]) == ()  # pyright: ignore[reportArgumentType]
