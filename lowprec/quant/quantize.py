"""quantize: the reference that every fused kernel must match.

    scale = scale_from_amax(max |block|)
    code  = round_to_format(x * (1 / scale))          symmetric
    code  = clamp(round(x * (1 / scale)) + zero)      asymmetric integers

in fp32, each operation correctly rounded. The reciprocal is taken once per block and multiplied by
each element, as DeepGEMM does: it is what a kernel can afford, and for power-of-two scales it is
exact. x * (1 / s) can reach max * (1 + 2^-24); the clamp takes it back.
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
        x_RK: fp32, bf16 or fp16 [R, K], any strides; R and K need not be multiples of the block
            (the rest is padded with zeros, which changes no scale but `quest`'s).
        spec: the representation.
        generator: what stochastic rounding draws its key from.
        key: the key itself (int64 [2]): the same key gives the same draws on every device (see
            `formats.random`).
        history: for delayed scaling, the last amaxes, fp32 [n], oldest first, zeros for none;
            brought up to date in place. Without it, or while it is empty, the current amax serves.
        decoded: keep the codes in fp32 instead of their storage dtype, for a consumer that would
            decode them at once.
        saturation: also return where the element's range was left (see `QTensor.saturated`).
    Returns:
        A QTensor of shape [R, K]; its memory layout follows x's strides, so that the transpose of a
        matrix needs no copy.
    Raises:
        ValueError: x is not a floating-point matrix; or the rounding is stochastic and there is
            neither a generator nor a key.
    """
    if x_RK.ndim != 2 or not x_RK.is_floating_point():
        raise ValueError(
            f"quantize takes a floating-point matrix [R, K], got {x_RK.dtype} {list(x_RK.shape)}"
        )
    if spec.stochastic and key is None:
        if generator is None:
            raise ValueError(f"{spec}: stochastic rounding needs a generator or a key")
        key = key_from_generator(generator, x_RK.device)
    fmt, scaling = spec.element, spec.scaling
    transposed = is_transposed(x_RK)
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

    # A block's arithmetic knows no axis order, and strided passes are many times slower: work in
    # the order that lies in memory.
    x, block = x_RK.to(torch.float32), block_extents(x_RK.shape, scaling.block)
    if transposed:
        x, block, noise = x.t(), swapped(block), None if noise is None else noise.t()
    blocks = to_blocks(x, block)
    noise = None if noise is None else to_blocks(noise, block)
    scaled = (
        _scale_asymmetrically(blocks, spec, noise)
        if not scaling.symmetric
        else _scale_blocks(blocks, fmt, scaling, history)
    )
    saturated = None
    if saturation:
        quest = (
            scaling.scale_format == "e8m0" and scaling.rule == "quest"
        )  # which masks what reaches the largest value
        saturated = from_blocks(
            scaled.x.abs() >= fmt.max if quest else exceeds_range(scaled.x, fmt), x.shape
        )
    values = from_blocks(
        round_to_format(scaled.x, fmt, spec.rounding, noise=noise, inplace=True), x.shape
    )
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


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """Blocks ready to be rounded."""

    x: Tensor
    """x / scale (+ zero point), fp32, a tensor of its own."""
    scale: Tensor
    zero_point: Tensor | None = None
    tensor_scale: Tensor | None = None


def _scale_asymmetrically(blocks: Tensor, spec: OperandSpec, noise: Tensor | None) -> _Scaled:
    scale, zero_point = asymmetric_scale(blocks.amin((1, 3)), blocks.amax((1, 3)), spec.element)
    rounded = round_to_integers(_times(blocks, reciprocal(scale)), spec.rounding, noise=noise)
    return _Scaled(x=rounded.add_(zero_point[:, None, :, None]), scale=scale, zero_point=zero_point)


def _scale_blocks(
    blocks: Tensor, fmt: ElementFormat, scaling: BlockScaling, history: Tensor | None
) -> _Scaled:
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
    if scaling.prescale != 1.0:
        tensor_scale = torch.tensor(1 / scaling.prescale, dtype=torch.float32, device=blocks.device)
        factor = factor * scaling.prescale
    return _Scaled(x=_times(blocks, factor), scale=scale, tensor_scale=tensor_scale)


def _two_level(blocks: Tensor, amax: Tensor, fmt: ElementFormat, scaling: BlockScaling) -> _Scaled:
    s_enc, s_dec = nvfp4.tensor_scales(
        amax.amax() if amax.numel() else amax.new_zeros(()), fmt, scaling
    )
    scale = nvfp4.block_scale(amax, s_enc, fmt)
    scaled = _times(blocks, nvfp4.encoding_scale(scale, s_dec))
    if scaling.four_over_six:
        scale_4 = nvfp4.block_scale(amax, s_enc, fmt, stretch=1.5)
        scaled_4 = _times(blocks, nvfp4.encoding_scale(scale_4, s_dec))
        # In units of about 1 / s_enc: the squares of tiny or huge numbers would leave fp32's range.
        power = (s_enc.view(torch.int32) & 0x7F800000).view(torch.float32)
        four, six = (
            _squared_error(blocks, x, s, s_dec, power, fmt)
            for x, s in ((scaled_4, scale_4), (scaled, scale))
        )
        smaller = four < six
        scale = torch.where(smaller, scale_4, scale)
        scaled = torch.where(smaller[:, None, :, None], scaled_4, scaled)
    return _Scaled(x=scaled, scale=scale, tensor_scale=s_dec)


def _squared_error(
    blocks: Tensor, scaled: Tensor, scale: Tensor, s_dec: Tensor, power: Tensor, fmt: ElementFormat
) -> Tensor:
    return (
        (_times(round_to_format(scaled, fmt), scale).mul_(s_dec) - blocks)
        .mul_(power)
        .square_()
        .sum((1, 3))
    )


def _amax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax((1, 3))


def _standard_deviation(blocks: Tensor) -> Tensor:
    """About the block's mean, over its n elements; NaN if one is not finite."""
    wide = blocks.double()  # in fp32 the squares of large numbers would overflow
    return (wide - wide.mean((1, 3), keepdim=True)).square_().mean((1, 3)).sqrt().float()


def _times(blocks: Tensor, factor: Tensor) -> Tensor:
    return blocks * factor[:, None, :, None]
