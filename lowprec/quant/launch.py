"""Launching Gluon kernels whose operands are tensor maps, at little cost for the host.

Triton inspects every argument at every launch and makes every tensor map anew: 300 us for a kernel
with five of them, longer than many of the kernels run. Here both are done once:

* for a variant, which is what the caller says it is: `key` must tell apart everything that Triton
  compiles for (types, constants, alignment); integers are not specialised (`do_not_specialize`);
* for a place: the same addresses, shapes and strides have the same maps, and the allocator hands
  out the same addresses step after step.

Importing this fails where Triton has no Gluon.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.float8_e5m2: gl.float8e5,
}


_thread = threading.local()


class Map:
    """A matrix as a kernel's tensor map: tiles of `block`. Rows and start on 16 bytes."""

    __slots__ = ("base", "block", "padding", "round_f32_to_tf32", "shape", "strides", "swizzled")

    def __init__(self, base: Tensor, block: tuple[int, int], swizzled: bool = True) -> None:
        self.base, self.block, self.swizzled = base, block, swizzled
        self.shape, self.strides = base.shape, base.stride()
        self.padding, self.round_f32_to_tf32 = "zero", False  # what Triton's launcher reads besides

    def descriptor(self) -> TensorDescriptor:
        layout = _layout(self.block, self.base.dtype, self.swizzled)
        return TensorDescriptor(
            self.base, list(self.shape), list(self.strides), list(self.block), layout
        )


@cache
def _layout(block: tuple[int, int], dtype: torch.dtype, swizzled: bool) -> Any:
    if swizzled:
        return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=2)


class Launcher:
    """One kernel, its compiled variants, and the argument lists of places seen before."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.compiled: dict[Any, Any] = {}
        self.prepared: dict[Any, Callable[[int], None]] = {}

    def __call__(
        self,
        device: int,
        key: tuple[Any, ...],
        place: tuple[int, ...],
        programs: int,
        arguments: Callable[[], tuple[Any, ...]],
    ) -> None:
        """Launch `programs` programs on the current stream of a device.

        Args:
            key: the variant.
            place: every address, extent and stride that the arguments depend on.
            arguments: makes all of the kernel's arguments in their order: Maps, tensors, integers
                and constants.
        """
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self(device, key, place, programs, arguments)
            return
        prepared = self.prepared.get((device, key, place))
        if prepared is not None:
            prepared(torch._C._cuda_getCurrentRawStream(device))
            return
        if not getattr(_thread, "has_context", False):
            # Maps are made by the driver, in the context of this thread; the autograd engine's
            # threads have none at first.
            torch.cuda.mem_get_info()
            _thread.has_context = True
        args = arguments()
        compiled = self.compiled.get((device, key))
        if compiled is None:
            described = (arg.descriptor() if isinstance(arg, Map) else arg for arg in args)
            self.compiled[device, key] = self.kernel[(programs,)](*described, **self.options)
            return
        compiled[(programs, 1, 1)](*args)
        if len(self.prepared) >= _PLACES:
            self.prepared.clear()
        if (direct := _direct(compiled, programs, args)) is not None:
            self.prepared[device, key, place] = direct


_PLACES = 1 << 14
"""Argument lists that a kernel remembers, some hundred bytes each."""


def _direct(compiled: Any, programs: int, args: tuple[Any, ...]) -> Callable[[int], None] | None:
    """Launches a compiled kernel with these arguments on a stream, past Triton's own preparation.
    It holds addresses, not tensors.

    None where this Triton's launcher is not one that is known here; then every launch is prepared
    by Triton.
    """
    run = compiled.run
    inner = getattr(run, "launch", None)
    names = getattr(getattr(inner, "__code__", None), "co_freevars", ())
    if (
        "launcher" not in names
        or "tensordesc_meta" not in names
        or getattr(run, "global_scratch_size", 1)
        or run.profile_scratch_size
    ):
        return None
    assert inner is not None
    assert inner.__closure__ is not None
    cells: dict[str, Any] = dict(
        zip(names, (cell.cell_contents for cell in inner.__closure__), strict=True)
    )
    raw, metas = cells["launcher"], iter(cells["tensordesc_meta"])
    expand = inner.__globals__["make_tensordesc_arg"]
    final: list[Any] = []
    for arg in args:
        if isinstance(arg, Map):
            final += expand(arg, next(metas))
        else:
            final.append(arg.data_ptr() if isinstance(arg, Tensor) else arg)
    function, metadata = compiled.function, compiled.packed_metadata
    flags = run.launch_cooperative_grid, run.launch_pdl
    if hasattr(
        run, "kernel_signature"
    ):  # Triton 3.7: arguments go as one tuple, after their description
        tail = (
            metadata,
            None,
            None,
            None,
            None,
            None,
            run.arg_annotations,
            run.kernel_signature,
            final,
        )
    else:  # Triton 3.6
        tail = (None, None, metadata, None, None, None, *final)
    return lambda stream: raw(programs, 1, 1, stream, function, *flags, *tail)


@cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
