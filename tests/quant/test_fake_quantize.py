"""fake_quantize takes a large matrix piece by piece on a CPU. The pieces are whole rows of blocks, and change no bit."""

import importlib

import pytest
import torch
from torch import Tensor

from lowprec.quant import OperandSpec, fake_quantize, quantize
from lowprec.testing import gaussian

fake = importlib.import_module("lowprec.quant.fake")  # the package's attribute of this name is the function
PIECE = 1 << 12
KEY = torch.tensor([3, 0])
IN_PIECES = ["e4m3[1x32 fp32]", "e4m3[16x16 fp32]", "e5m2[24x8 e8m0]", "int4[32x1 fp32]", "int8[1xall fp32 asymmetric]"]
# A scale of the whole matrix, of whole columns, or draws that depend on an element's row: pieces would have others.
WHOLE = ["e4m3[tensor fp32]", "e4m3[allx1 fp32]", "e2m1[1x16 e4m3]", "e2m1[1x16 e4m3 4/6]", "e4m3[1x32 e8m0 stochastic]"]


def by_columns(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Make pieces small, and list the shapes of the matrices that are quantised at once."""
    shapes: list[tuple[int, ...]] = []
    whole = fake._whole
    monkeypatch.setattr(fake, "PIECE", PIECE)
    monkeypatch.setattr(fake, "_whole", lambda x, *args, **options: shapes.append(tuple(x.shape)) or whole(x, *args, **options))
    return shapes


@pytest.mark.parametrize("layout", [torch.clone, by_columns], ids=["rows", "columns"])
@pytest.mark.parametrize("text", [*IN_PIECES, *WHOLE])
def test_pieces_change_no_bit(text, layout, pieces):
    """PIECE / 60 columns is 68 rows, and / 90 is 45: multiples of no block. The last piece is shorter, and ends within a block."""
    spec = OperandSpec.parse(text)
    for shape in ((201, 60), (90, 205)):
        x = layout(gaussian(*shape, 0) * torch.logspace(-3, 3, shape[0])[:, None])
        pieces.clear()
        got = fake_quantize(x, spec, key=KEY)
        assert torch.equal(got, quantize(x, spec, key=KEY).dequantize())
        assert (got.stride(0) < got.stride(1)) == (x.stride(0) < x.stride(1))
        if text in WHOLE:
            assert pieces == [shape]
        elif "all" not in text:
            assert len(pieces) > 1


def test_blocks_larger_than_two_pieces_are_taken_whole(pieces):
    x, spec = gaussian(260, 64, 1), OperandSpec.parse("e4m3[130x64 fp32]")
    assert torch.equal(fake_quantize(x, spec), quantize(x, spec).dequantize())
    assert pieces == [(260, 64)]


def test_a_dtype_is_the_last_rounding(pieces):
    x, spec = gaussian(100, 64, 2), OperandSpec.parse("e4m3[1x32 fp32]")
    assert torch.equal(fake_quantize(x, spec, dtype=torch.bfloat16), quantize(x, spec).dequantize().bfloat16())
