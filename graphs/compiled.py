"""What the CPU's kernels are made of, compiled by numba: 16-bit numbers, exp, matrix products, norms.

Weights are stored transposed, [inputs, outputs], in fp32 or in bf16 (as the upper 16 bits of a float); activations and
sums are fp32. A product takes rows by fours and inputs by eights, so that a weight is read, and widened, once for four
rows. Its sums are in the order in which they are written here: no reassociation, hence a row has the same bits at every
place of every four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import float32, int32, njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

INPUTS_AT_ONCE = 8
RMS_EPS = np.float32(1e-8)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Options = bool | set[str]


def _compile(function: _Function, fastmath: _Options) -> _Function:
    return cast(_Function, njit(fastmath=fastmath, error_model="numpy", nogil=True, cache=True)(function))


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


@compiled_in_order
def matmul(x: Any, weight: Any, y: Any) -> None:
    """y [rows, outputs] = x [rows, inputs] · weight [inputs, outputs]; rows in fours, inputs in eights."""
    rows, inputs = x.shape
    outputs = weight.shape[1]
    y[:] = np.float32(0.0)
    for k in range(0, inputs, 8):
        w0, w1, w2, w3 = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
        w4, w5, w6, w7 = weight[k + 4], weight[k + 5], weight[k + 6], weight[k + 7]
        for r in range(0, rows, 4):
            y0, y1, y2, y3 = y[r], y[r + 1], y[r + 2], y[r + 3]
            a, b, c, d = x[r, k : k + 8], x[r + 1, k : k + 8], x[r + 2, k : k + 8], x[r + 3, k : k + 8]
            a0, a1, a2, a3, a4, a5, a6, a7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
            b0, b1, b2, b3, b4, b5, b6, b7 = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]
            c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
            d0, d1, d2, d3, d4, d5, d6, d7 = d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]
            for j in range(outputs):
                p0, p1, p2, p3 = widen(w0[j]), widen(w1[j]), widen(w2[j]), widen(w3[j])
                p4, p5, p6, p7 = widen(w4[j]), widen(w5[j]), widen(w6[j]), widen(w7[j])
                y0[j] += a0 * p0 + a1 * p1 + a2 * p2 + a3 * p3 + a4 * p4 + a5 * p5 + a6 * p6 + a7 * p7
                y1[j] += b0 * p0 + b1 * p1 + b2 * p2 + b3 * p3 + b4 * p4 + b5 * p5 + b6 * p6 + b7 * p7
                y2[j] += c0 * p0 + c1 * p1 + c2 * p2 + c3 * p3 + c4 * p4 + c5 * p5 + c6 * p6 + c7 * p7
                y3[j] += d0 * p0 + d1 * p1 + d2 * p2 + d3 * p3 + d4 * p4 + d5 * p5 + d6 * p6 + d7 * p7


@compiled
def rms_norm(x: Any, alpha: Any, out: Any) -> None:
    """out [rows, dim] = x · rsqrt(mean(x²) + 1e-8) · alpha [dim]."""
    for row in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(x.shape[1]):
            total += x[row, i] * x[row, i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[1]) + RMS_EPS)
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * scale * alpha[i]


@compiled
def gate(packed: Any, out: Any) -> None:
    """out [rows, hidden …] = silu(packed[:, :hidden]) · packed[:, hidden:]; columns of out beyond stay as they are."""
    hidden = packed.shape[1] // 2
    for row in range(packed.shape[0]):
        left, right, target = packed[row, :hidden], packed[row, hidden:], out[row]
        for i in range(hidden):
            target[i] = left[i] / (np.float32(1.0) + exp(-left[i])) * right[i]


def pack(weight: Tensor) -> npt.NDArray[Any]:
    """A linear layer's weight [outputs, inputs] as `matmul` reads it: transposed, inputs filled up to eights."""
    outputs, inputs = weight.shape
    padded = weight.new_zeros(-(-inputs // INPUTS_AT_ONCE) * INPUTS_AT_ONCE, outputs)
    padded[:inputs] = weight.t()
    return as_array(padded)


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
