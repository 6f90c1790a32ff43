"""What the CPU's kernels are made of, compiled by numba: 16-bit numbers, exp, matrix products, norms.

Weights are stored in panels of 32 outputs, in fp32 or in bf16 (as the upper 16 bits of a float); activations and sums
are fp32. A product takes rows by eights, whose sums stay in registers while a panel streams by (see
graphs.compiled_vectors). Sums are in the order of the inputs: no reassociation, hence a row has the same bits beside
any others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import float32, int32, njit, types
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys
from numba.extending import intrinsic, overload
from torch import Tensor

from graphs.compiled_vectors import (
    NARROW,
    SCALE_BYTES,
    WIDE,
    tile_1x16,
    tile_1x32,
    tile_4x32,
    tile_8x16,
    tile_8x32,
)
from models.checkpoint_int8 import quantise_rows

RMS_EPS = np.float32(1e-8)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Options = bool | set[str]


# A compiled function contains those that it calls, but numba asks about its own file alone whether what it keeps on
# disk is still true. These are the files whose functions may be in others.
_SHARED = sorted(Path(__file__).parent.glob("compiled*.py"))
_STAMP = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in _SHARED)


class KernelCache(FunctionCache):
    """numba's cache of one function on disk, without its preparations to compile where nothing needs compiling."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call] # numba
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _STAMP)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Machine code for these types, or None. Before it looks, numba imports all that it could compile, scipy's
        BLAS included, and registers it: a quarter of a stage's start. Machine code wants its allocator alone."""
        rtsys.initialize(context)
        with self._guard_against_spurious_io_errors():
            # Where it is None the compiler makes those preparations itself.
            return self._load_overload(signature, context)  # type: ignore[no-untyped-call] # numba


def _compile(function: _Function, fastmath: _Options) -> _Function:
    dispatcher: Any = njit(fastmath=fastmath, error_model="numpy", nogil=True)(function)
    dispatcher._cache = KernelCache(function)
    return cast(_Function, dispatcher)


def compiled(function: _Function) -> _Function:
    """Compiled at first use, then kept on disk. Sums may be vectorised, in an order that compilation fixes."""
    return _compile(function, fastmath=True)


def compiled_in_order(function: _Function) -> _Function:
    """The same, with every sum in the order in which it is written."""
    return _compile(function, fastmath={"contract"})


def _float_of_word(typing_context: Any, word: Any) -> Any:
    return float32(int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


def _word_of_float(typing_context: Any, value: Any) -> Any:
    return int32(float32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.IntType(32))


as_float: Callable[[Any], Any] = cast(Any, intrinsic(_float_of_word))  # the float32 that has these bits
as_word: Callable[[Any], Any] = cast(Any, intrinsic(_word_of_float))  # the bits of a float32


def scale_room(weight: Any) -> Any:
    """How many inputs' room a panel's scales take in it."""
    raise NotImplementedError("only called from compiled code")


@overload(scale_room)
def _scale_room_typed(weight: Any) -> Any:
    def of_bytes(weight: Any) -> Any:
        return SCALE_BYTES

    def nothing(weight: Any) -> Any:
        return 0

    return of_bytes if weight.dtype == types.int8 else nothing


def widen(stored: Any) -> Any:
    """A stored number as float32: bf16 comes as the upper 16 bits of one."""
    raise NotImplementedError("only called from compiled code")


def narrow(value: Any, ring: Any) -> Any:
    """A float32 as the array `ring` stores it, rounded to nearest even."""
    raise NotImplementedError("only called from compiled code")


# numba wants an implementation's signature equal to the overload's, annotations included; hence the named functions.
@overload(widen)
def _widen_typed(stored: Any) -> Any:
    def as_it_is(stored: Any) -> Any:
        return stored

    def upper_bits(stored: Any) -> Any:
        return as_float(np.int32(stored) << np.int32(16))

    return as_it_is if isinstance(stored, types.Float) else upper_bits


@overload(narrow)
def _narrow_typed(value: Any, ring: Any) -> Any:
    def as_it_is(value: Any, ring: Any) -> Any:
        return value

    def rounded(value: Any, ring: Any) -> Any:
        word = as_word(value)
        return np.int16((word + np.int32(0x7FFF) + ((word >> np.int32(16)) & np.int32(1))) >> np.int32(16))

    return as_it_is if isinstance(ring.dtype, types.Float) else rounded


@compiled
def exp(x: Any) -> Any:
    """exp by a polynomial of degree six (relative error 2e-7), so that the loop around it is vectorised."""
    scaled = min(max(x, np.float32(-87.0)), np.float32(87.0)) * np.float32(1.4426950408889634)
    whole = np.floor(scaled + np.float32(0.5))
    part = scaled - whole
    y = np.float32(1.535336188319500e-4)
    y = y * part + np.float32(1.339887440266574e-3)
    y = y * part + np.float32(9.618437357674640e-3)
    y = y * part + np.float32(5.550332471162809e-2)
    y = y * part + np.float32(2.402264791363012e-1)
    y = y * part + np.float32(6.931472028550421e-1)
    y = y * part + np.float32(1.0)
    return y * as_float((np.int32(whole) + np.int32(127)) << np.int32(23))


@compiled
def inputs_of(weight: Any) -> Any:
    """How many columns of x a packed weight takes; one more than it had where that was odd."""
    return weight.shape[1] * 2 - scale_room(weight)


@compiled_in_order
def matmul(x: Any, weight: Any, y: Any) -> None:
    """y [rows, outputs] = x [rows, inputs] · weight, panels of `pack`; x has as many columns as these have inputs.

    A row's sums go through the inputs in order, fused, for any number of rows.
    """
    products(x, 0, x.shape[1], x.shape[0], inputs_of(weight), weight, y, 0, y.shape[1], y.shape[1])


@compiled_in_order
def products(
    x: Any, x_at: int, x_hop: int, rows: int, inputs: int, weight: Any, y: Any, y_at: int, y_hop: int, outputs: int
) -> None:
    """The same where rows of x and y lie at x_at + i * x_hop and y_at + i * y_hop in their memory, in elements.

    Rows of x may overlap: a convolution's windows do.
    """
    pairs, width = inputs // 2, weight.size // (weight.shape[0] * weight.shape[1] * 2)
    whole, part = y.reshape(y.size), np.empty(8 * 32, np.float32)
    for panel in range(weight.shape[0]):
        column, w_at = panel * width, panel * (inputs + scale_room(weight)) * width
        fits = column + width <= outputs  # else the panel's last columns are padding
        row = 0
        while row < rows:
            count = 8 if rows - row >= 8 else 4 if rows - row >= 4 and width == 32 else 1
            source, place = x_at + row * x_hop, y_at + row * y_hop + column
            target, at, hop = (whole, place, y_hop) if fits else (part, 0, width)
            if width == 32:
                if count == 8:
                    tile_8x32(x, source, x_hop, weight, w_at, pairs, target, at, hop)
                elif count == 4:
                    tile_4x32(x, source, x_hop, weight, w_at, pairs, target, at, hop)
                else:
                    tile_1x32(x, source, x_hop, weight, w_at, pairs, target, at, hop)
            elif count == 8:
                tile_8x16(x, source, x_hop, weight, w_at, pairs, target, at, hop)
            else:
                tile_1x16(x, source, x_hop, weight, w_at, pairs, target, at, hop)
            if not fits:
                for i in range(count):
                    for j in range(outputs - column):
                        whole[place + i * y_hop + j] = part[i * width + j]
            row += count


@compiled
def rms_norm(x: Any, alpha: Any, out: Any) -> None:
    """out [rows, dim] = x · rsqrt(mean(x²) + 1e-8) · alpha [dim], as out stores numbers."""
    for row in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(x.shape[1]):
            total += x[row, i] * x[row, i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[1]) + RMS_EPS)
        for i in range(x.shape[1]):
            out[row, i] = narrow(x[row, i] * scale * alpha[i], out)


@compiled
def add(x: Any, branch: Any) -> None:
    """x [rows, dim] += branch."""
    for row in range(x.shape[0]):
        line, other = x[row], branch[row]
        for i in range(line.shape[0]):
            line[i] += other[i]


@compiled
def copy(target: Any, source: Any) -> None:
    """target [numbers] = source. (numba takes seconds to compile the assignment of a slice.)"""
    for i in range(target.shape[0]):
        target[i] = source[i]


@compiled
def gate(packed: Any, out: Any) -> None:
    """out [rows, hidden …] = silu(packed[:, :hidden]) · packed[:, hidden:]; columns of out beyond stay as they are."""
    hidden = packed.shape[1] // 2
    for row in range(packed.shape[0]):
        left, right, target = packed[row, :hidden], packed[row, hidden:], out[row]
        for i in range(hidden):
            target[i] = left[i] / (np.float32(1.0) + exp(-left[i])) * right[i]


def pack(weight: Tensor, *, small: bool = False) -> npt.NDArray[Any]:
    """A linear layer's weight [outputs, inputs] as `matmul` reads it: panels of 32 outputs (16 if there are no more).

    fp32 [panels, pairs of inputs, 2, width], bf16 [panels, pairs of inputs, width, 2]; filled up with zeros. small:
    int8 [panels, 2 + pairs of inputs, 2, width], whose first two pairs are an fp32 scale for each output. Raises
    ValueError for small weights that are not finite.
    """
    outputs, inputs = weight.shape
    width = NARROW if outputs <= NARROW else WIDE
    padded = weight.new_zeros(-(-outputs // width) * width, inputs + inputs % 2)
    padded[:outputs, :inputs] = weight.detach()
    if small:
        coarse, scale = quantise_rows(padded)
        panels = coarse.view(-1, width, padded.shape[1] // 2, 2).permute(0, 2, 3, 1)
        scales = scale.view(-1, width).view(torch.int8).view(len(panels), SCALE_BYTES // 2, 2, width)
        packed: npt.NDArray[Any] = torch.cat((scales, panels), dim=1).contiguous().numpy()
        return packed
    panels = padded.view(-1, width, padded.shape[1] // 2, 2)
    order = (0, 2, 1, 3) if weight.dtype == torch.bfloat16 else (0, 2, 3, 1)
    return as_array(panels.permute(*order).contiguous())


def as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """The same memory for numba, which knows no bf16: its bits, as 16-bit integers.

    Raises ValueError for dtypes other than bf16 and fp32.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    elif tensor.dtype != torch.float32:
        raise ValueError(f"the compiled step stores bf16 or fp32, not {tensor.dtype}")
    array: npt.NDArray[Any] = tensor.numpy()
    return array
