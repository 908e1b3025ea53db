"""The native FP8 path on a CPU: the layers' code is the same; the reference does the kernels' work, in the kernels' own layouts."""

import pytest
import torch
from torch import Tensor

from lowprec.gemm import BACKENDS, Support, hopper, scaled_mm
from lowprec.gemm.hopper import kind
from lowprec.nn import codes, linear
from lowprec.quant import OperandSpec, quantize, triton_quantize, two_way


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let converted layers take the native path on this CPU until the test ends."""
    for module in (linear, two_way):
        monkeypatch.setattr(module, "takes", lambda t: t.is_floating_point() and t.numel() > 0)
    monkeypatch.setattr(linear, "KEEPS_CODES", ("cpu", "cuda"))
    monkeypatch.setattr(triton_quantize, "_quantize_tiles", _quantize_tiles)
    monkeypatch.setattr(hopper, "_scaled_gemm", _product)
    monkeypatch.setattr(scaled_mm, "_multiply", _product)
    for name in ("hopper", "scaled_mm"):
        monkeypatch.setattr(type(BACKENDS[name]), "supports", _supports)
    codes.forget_weights()


def _supports(self, a: OperandSpec | None, b: OperandSpec | None, device_type: str, sums=None) -> Support:
    ok = kind(a) == "1x128" and kind(b) in ("1x128", "128x128")
    return Support(ok=ok, native=ok, reason="as if it were a Hopper GPU" if ok else "no block scales")


def _quantize_tiles(x: Tensor, y: Tensor | None, rows: str, cols: str, scale: str, e5m2: bool) -> list[Tensor]:
    if y is not None:
        x = torch.nn.functional.silu(x) * y
    results = triton_quantize._empty_results(x, rows, cols, e5m2)
    for i, (which, t) in enumerate(((rows, x), (cols, x.t()))):
        if which:
            q = quantize(t, OperandSpec.parse(f"{'e5m2' if e5m2 else 'e4m3'}[{which} {scale}]"))
            codes_, scales = results[2 * i], results[2 * i + 1]
            codes_.view(torch.uint8).zero_()[:, : t.shape[1]] = q.data.contiguous().view(torch.uint8)
            plain = q.scale.t() if which == "1x128" else q.scale
            scales.fill_(1.0)[: plain.shape[0], : plain.shape[1]] = plain
    return results


def _product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, b_kind: bool | str, _: object, dtype: torch.dtype) -> Tensor:
    by_rows = b_kind in (True, "1x128")
    return (_plain(a, scale_a, 1) @ _plain(b, scale_b, 1 if by_rows else 128).t()).to(dtype)


def _plain(data: Tensor, scale: Tensor, rows: int) -> Tensor:
    R, K = data.shape
    return data.float() * scale.repeat_interleave(rows, 0)[:R].repeat_interleave(128, 1)[:, :K]
