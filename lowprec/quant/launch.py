"""Launches of Gluon kernels whose operands are tensor maps, at little cost for the host.

At every launch, Triton inspects every argument and makes every tensor map anew. This takes 300 us
for a kernel with five maps, longer than many of the kernels run. Here it is done once:

* for each variant of a kernel. The caller names the variant by `key`, which must contain everything
  that Triton compiles for (types, constants, alignment). Integers are not specialised
  (`do_not_specialize`), so they need not be in it;
* for each place. The same addresses, shapes and strides have the same maps, and the allocator hands
  out the same addresses step after step.

Importing this module fails where Triton has no Gluon.
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
    """A matrix as a kernel's tensor map, read or written in tiles of `block`.

    The matrix starts at a multiple of 16 bytes, and so does each of its rows.
    """

    __slots__ = ("base", "block", "padding", "round_f32_to_tf32", "shape", "strides", "swizzled")

    def __init__(self, base: Tensor, block: tuple[int, int], swizzled: bool = True) -> None:
        self.base = base
        self.block = block
        self.swizzled = swizzled
        self.shape = base.shape
        self.strides = base.stride()
        # Triton's launcher reads these two as well.
        self.padding = "zero"
        self.round_f32_to_tf32 = False

    def descriptor(self) -> TensorDescriptor:
        """Return the map as Triton's own launch takes it."""
        layout = _layout(self.block, self.base.dtype, self.swizzled)
        return TensorDescriptor(
            self.base, list(self.shape), list(self.strides), list(self.block), layout
        )


@cache
def _layout(block: tuple[int, int], dtype: torch.dtype, swizzled: bool) -> Any:
    """Return the layout of a tile in shared memory."""
    if swizzled:
        return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=2)


class Launcher:
    """A kernel, its compiled variants, and the launches prepared for places seen before."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        """`options` are Triton's options of a launch, such as num_warps."""
        self.kernel = kernel
        self.options = options
        self.compiled: dict[tuple[int, tuple[Any, ...]], Any] = {}
        self.prepared: dict[
            tuple[int, tuple[Any, ...], tuple[int, ...]], Callable[[int], None]
        ] = {}

    def __call__(
        self,
        device: int,
        key: tuple[Any, ...],
        place: tuple[int, ...],
        programs: int,
        arguments: Callable[[], tuple[Any, ...]],
    ) -> None:
        """Launch the kernel on the current stream of a device.

        Args:
            device: index of the CUDA device.
            key: the variant: everything that Triton compiles for.
            place: every address, extent and stride that the arguments depend on.
            programs: number of programs.
            arguments: makes all arguments of the kernel in their order: Maps, tensors, integers and
                constants. It is called only for a place that is not prepared.
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
            # The driver makes maps in the CUDA context of this thread. The autograd engine's
            # threads have no context at first; this call gives them one.
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
        if (direct := _direct_launch(compiled, programs, args)) is not None:
            self.prepared[device, key, place] = direct


_PLACES = 1 << 14
"""Largest number of prepared launches that a kernel keeps, some hundred bytes each."""


def _direct_launch(
    compiled: Any, programs: int, args: tuple[Any, ...]
) -> Callable[[int], None] | None:
    """Return a function that launches a compiled kernel with these arguments on a given stream.

    It bypasses Triton's own preparation of a launch, and holds addresses, not tensors. Return None
    if this Triton's launcher is not one of those known here (3.6, 3.7); then Triton prepares every
    launch.
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
    raw = cells["launcher"]
    metas = iter(cells["tensordesc_meta"])
    expand = inner.__globals__["make_tensordesc_arg"]
    final: list[Any] = []
    for arg in args:
        if isinstance(arg, Map):
            final += expand(arg, next(metas))
        else:
            final.append(arg.data_ptr() if isinstance(arg, Tensor) else arg)
    function = compiled.function
    metadata = compiled.packed_metadata
    flags = (run.launch_cooperative_grid, run.launch_pdl)
    if hasattr(run, "kernel_signature"):
        # Triton 3.7 takes the arguments as one list, after their description.
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
    else:
        # Triton 3.6 takes them one by one.
        tail = (None, None, metadata, None, None, None, *final)
    return lambda stream: raw(programs, 1, 1, stream, function, *flags, *tail)


@cache
def processors(device: int) -> int:
    """Return the number of streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
