"""quantize: the reference that every fused kernel must match.

    scale = scale_from_amax(max |block|)
    code  = round_to_format(x * (1 / scale))          symmetric
    code  = clamp(round(x * (1 / scale)) + zero)      asymmetric integers

All of it is in fp32, and each operation is correctly rounded. The reciprocal is computed once per
block and multiplied by each element, as in DeepGEMM: a kernel can afford no more, and for
power-of-two scales it is exact. x * (1 / scale) can reach max * (1 + 2^-24); rounding clamps it to
max.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.formats import nvfp4
from lowprec.formats.element import ElementFormat
from lowprec.formats.random import key_from_generator, uniform
from lowprec.formats.rounding import exceeds_range, round_to_format, round_to_integers
from lowprec.formats.scaling import (
    BlockScaling,
    asymmetric_scale,
    power_of_two_scale,
    reciprocal,
    scale_from_amax,
)
from lowprec.quant.delayed import delayed_amax
from lowprec.quant.qtensor import (
    QTensor,
    block_extents,
    from_blocks,
    is_transposed,
    swapped,
    to_blocks,
)
from lowprec.quant.spec import OperandSpec


def quantize(
    x_RK: Tensor,
    spec: OperandSpec,
    *,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    history: Tensor | None = None,
    decoded: bool = False,
    saturation: bool = False,
) -> QTensor:
    """Quantise a matrix along its last axis.

    Args:
        x_RK: fp32, bf16 or fp16 [R, K], any strides. R and K need not be multiples of the block:
            the last blocks are padded with zeros, which changes the scale of `quest` only.
        spec: the representation.
        generator: generator from which stochastic rounding draws its key.
        key: key of stochastic rounding, int64 [2], in place of a generator. The same key gives the
            same draws on every device (see `formats.random`).
        history: amax history of delayed scaling, fp32 [n], oldest first, zeros for empty places;
            updated in place. Without a history, or while it is empty, the current amax is used.
        decoded: keep the codes in fp32 instead of their storage dtype, for a consumer that would
            decode them at once.
        saturation: also return where values left the element's range (see `QTensor.saturated`).
    Returns:
        A QTensor of shape [R, K]. Its memory layout follows x's strides, so quantising the
        transpose of a matrix needs no copy.
    Raises:
        ValueError: x is not a floating-point matrix; or the rounding is stochastic and neither a
            generator nor a key is given.
    """
    if x_RK.ndim != 2 or not x_RK.is_floating_point():
        raise ValueError(
            f"quantize takes a floating-point matrix [R, K], got {x_RK.dtype} {list(x_RK.shape)}"
        )
    if spec.stochastic and key is None:
        if generator is None:
            raise ValueError(f"{spec}: stochastic rounding needs a generator or a key")
        key = key_from_generator(generator, x_RK.device)
    fmt = spec.element
    scaling = spec.scaling
    transposed = is_transposed(x_RK)
    if is_one_operator(x_RK, spec):
        return _by_operator(x_RK, spec, key, history, transposed, decoded, saturation)
    noise = (
        uniform(key, (x_RK.shape[0], x_RK.shape[1]), transposed=transposed)
        if spec.stochastic and key is not None
        else None
    )
    if scaling is None:
        plain = spec.rounding == "nearest" and not decoded
        data = (
            x_RK.to(fmt.storage)
            if plain
            else round_to_format(x_RK.to(torch.float32), fmt, spec.rounding, noise=noise)
        )
        return QTensor(
            data=data if decoded else data.to(fmt.storage),
            scale_data=None,
            spec=spec,
            shape=x_RK.shape,
        )

    # Quantising a block does not depend on the order of its axes, and strided passes are many times
    # slower: work in the order that lies in memory.
    x = x_RK.to(torch.float32)
    block = block_extents(x_RK.shape, scaling.block)
    if transposed:
        x = x.t()
        block = swapped(block)
        noise = None if noise is None else noise.t()
    blocks = to_blocks(x, block)
    noise = None if noise is None else to_blocks(noise, block)
    scaled = (
        _scale_asymmetrically(blocks, spec, noise)
        if not scaling.symmetric
        else _scale_blocks(blocks, fmt, scaling, history)
    )
    saturated = None
    if saturation:
        # Under the rule `quest`, elements that reach the largest value are masked as well.
        quest = scaling.scale_format == "e8m0" and scaling.rule == "quest"
        left = scaled.x.abs() >= fmt.max if quest else exceeds_range(scaled.x, fmt)
        saturated = from_blocks(left, x.shape)
    rounded = round_to_format(scaled.x, fmt, spec.rounding, noise=noise, inplace=True)
    values = from_blocks(rounded, x.shape)
    parts = {
        "data": values,
        "scale_data": scaled.scale,
        "zero_point": scaled.zero_point,
        "saturated": saturated,
    }
    if transposed:
        parts = {name: None if part is None else part.t() for name, part in parts.items()}
    q = QTensor(**parts, tensor_scale=scaled.tensor_scale, spec=spec, shape=x_RK.shape)
    return q if decoded else q.stored()


def is_one_operator(x: Tensor, spec: OperandSpec) -> bool:
    """Return True in compiled code, where the reference is one operator (`operators`).

    On a GPU, casts without scales are traced: a compiler fuses them with what is around them.
    """
    is_cast = spec.scaling is None and spec.rounding == "nearest"
    return torch.compiler.is_compiling() and (x.device.type == "cpu" or not is_cast)


def part_names(spec: OperandSpec, saturation: bool) -> list[str]:
    """Return the names of the tensors that a QTensor of this spec has."""
    scaling = spec.scaling
    if scaling is None:
        return ["data"]
    names = ["data", "scale_data"]
    if not scaling.symmetric:
        names.append("zero_point")
    if scaling.scale_format == "e4m3" or scaling.prescale_ratio != (1, 1):
        names.append("tensor_scale")
    if saturation:
        names.append("saturated")
    return names


def _by_operator(
    x_RK: Tensor,
    spec: OperandSpec,
    key: Tensor | None,
    history: Tensor | None,
    transposed: bool,
    decoded: bool,
    saturation: bool,
) -> QTensor:
    """Return `quantize(...)` by the operator `lowprec::quantize`, for compiled code."""
    x = x_RK.t() if transposed else x_RK
    flags = (spec.notation, transposed, decoded, saturation)
    amax = None
    if history is not None and spec.scaling is not None and spec.scaling.history and x.numel():
        amax = delayed_amax(history, x.to(torch.float32).abs().amax())
    key = key if spec.stochastic else None
    tensors = torch.ops.lowprec.quantize(x, key, amax, *flags)
    parts = dict(zip(part_names(spec, saturation), tensors, strict=True))
    if transposed:
        parts = {name: part.t() if part.ndim == 2 else part for name, part in parts.items()}
    return QTensor(
        data=parts["data"],
        scale_data=parts.get("scale_data"),
        zero_point=parts.get("zero_point"),
        tensor_scale=parts.get("tensor_scale"),
        saturated=parts.get("saturated"),
        spec=spec,
        shape=x_RK.shape,
    )


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """Blocks divided by their scales, ready to be rounded to the element format."""

    x: Tensor
    """x / scale (+ zero point), fp32 [R / r, r, K / c, c], in memory of its own."""
    scale: Tensor
    """Block scales, fp32 [R / r, K / c]."""
    zero_point: Tensor | None = None
    """Zero points of an asymmetric scaling, in the shape of `scale`."""
    tensor_scale: Tensor | None = None
    """Scale of the whole matrix, an fp32 scalar (NVFP4, and 1 / prescale)."""


def _scale_asymmetrically(blocks: Tensor, spec: OperandSpec, noise: Tensor | None) -> _Scaled:
    """Scale blocks [R / r, r, K / c, c] to integers and add their zero points."""
    scale, zero_point = asymmetric_scale(blocks.amin((1, 3)), blocks.amax((1, 3)), spec.element)
    rounded = round_to_integers(_times(blocks, reciprocal(scale)), spec.rounding, noise=noise)
    return _Scaled(x=rounded.add_(zero_point[:, None, :, None]), scale=scale, zero_point=zero_point)


def _scale_blocks(
    blocks: Tensor, fmt: ElementFormat, scaling: BlockScaling, history: Tensor | None
) -> _Scaled:
    """Scale blocks [R / r, r, K / c, c] without a zero point, as `scaling` says."""
    if scaling.scale_format == "e8m0" and scaling.rule == "quest":
        scale = power_of_two_scale(_standard_deviation(blocks), fmt, "quest")
    else:
        amax = _amax(blocks)
        if scaling.scale_format == "e4m3":
            return _two_level(blocks, amax, fmt, scaling)
        if scaling.history and history is not None and amax.numel():
            amax = delayed_amax(history, amax)
        scale = scale_from_amax(amax, fmt, scaling)
    tensor_scale = None
    factor = reciprocal(scale)
    if scaling.prescale_ratio != (1, 1):
        above, below = scaling.prescale_ratio
        tensor_scale = torch.tensor(below / above, dtype=torch.float32, device=blocks.device)
        factor = factor * (above / below)
    return _Scaled(x=_times(blocks, factor), scale=scale, tensor_scale=tensor_scale)


def _two_level(blocks: Tensor, amax: Tensor, fmt: ElementFormat, scaling: BlockScaling) -> _Scaled:
    """Scale blocks by NVFP4's two levels of scales (see `nvfp4`); `amax` is that of each block."""
    amax_t = amax.amax() if amax.numel() else amax.new_zeros(())
    s_enc, s_dec = nvfp4.tensor_scales(amax_t, fmt, scaling)
    if not scaling.four_over_six:
        scale = nvfp4.block_scale(amax, s_enc, fmt, scaling)
        scaled = _times(blocks, nvfp4.encoding_scale(scale, s_dec))
        return _Scaled(x=scaled, scale=scale, tensor_scale=s_dec)
    scale, scale_4 = nvfp4.two_block_scales(amax, s_enc, fmt, scaling)
    scaled, scaled_4 = (_times(blocks, nvfp4.encoding_scale(s, s_dec)) for s in (scale, scale_4))
    # The power of two below s_enc: the squares of tiny or huge errors would leave fp32's range.
    power = (s_enc.view(torch.int32) & 0x7F800000).view(torch.float32)
    original = blocks * power
    four, six = (
        _error(original, candidate, s, amax_t * power, fmt, scaling)
        for candidate, s in ((scaled_4, scale_4), (scaled, scale))
    )
    smaller = four < six
    return _Scaled(
        x=torch.where(smaller[:, None, :, None], scaled_4, scaled),
        scale=torch.where(smaller, scale_4, scale),
        tensor_scale=s_dec,
    )


def _error(
    original: Tensor,
    scaled: Tensor,
    scale: Tensor,
    amax_t: Tensor,
    fmt: ElementFormat,
    scaling: BlockScaling,
) -> Tensor:
    """Return the error of each block by which four over six chooses; see `nvfp4`."""
    codes = _times(round_to_format(scaled, fmt), scale)
    value = nvfp4.dequantized_by_amax(codes, amax_t, nvfp4.bound(fmt, scaling))
    error = value.sub_(original)
    error = error.abs_() if scaling.four_over_six_error == "mae" else error.square_()
    return error.sum((1, 3))


def _amax(blocks: Tensor) -> Tensor:
    """Return the largest magnitude of each block, [R / r, K / c]."""
    return blocks.abs().amax((1, 3))


def _standard_deviation(blocks: Tensor) -> Tensor:
    """Return each block's standard deviation about its mean, over its n elements.

    It is NaN for a block with an element that is not finite.
    """
    wide = blocks.double()  # In fp32 the squares of large numbers would overflow.
    return (wide - wide.mean((1, 3), keepdim=True)).square_().mean((1, 3)).sqrt().float()


def _times(blocks: Tensor, factor: Tensor) -> Tensor:
    """Multiply each block [R / r, r, K / c, c] by its own factor, [R / r, K / c]."""
    return blocks * factor[:, None, :, None]
