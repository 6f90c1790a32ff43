"""Products of rows with one weight, as the CPU's mixed step calls them: our compiled one, oneDNN's as torch ships it.

Which one is used is decided once for each weight when an engine starts (graphs.self_test), never by how many rows a
step has: a row's bits must not depend on its company.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.compiled import as_array, matmul, pack

Array = npt.NDArray[Any]


class Product(Protocol):
    """y = x · weightᵀ for one weight [outputs, inputs].

    words: the numpy dtype of x and y: float32, or int16 for the upper halves of floats, which is bf16.
    width: columns of x, which may be more than the weight's inputs; those beyond must be zero.
    """

    @property
    def words(self) -> type[np.float32] | type[np.int16]: ...

    @property
    def width(self) -> int: ...

    def __call__(self, x: Array) -> Array:
        """x [rows, width] → [rows, outputs]; rows in fours."""
        ...


class CompiledProduct:
    """graphs.compiled.matmul."""

    words = np.float32

    def __init__(self, weight: Tensor, *, small: bool = False) -> None:
        """small: in int8 with a scale for each output."""
        self.outputs, inputs = weight.shape
        self._weight = pack(weight, small=small)
        self.width = inputs + inputs % 2  # inputs are taken in pairs

    def __call__(self, x: Array) -> Array:
        y = np.empty((len(x), self.outputs), dtype=np.float32)
        matmul(x, self._weight, y)
        return y


class OneDnnProduct:
    """torch's own oneDNN with the weight laid out beforehand, as its compiler for CPUs calls it; bf16 in and out.

    On processors that multiply bf16 (AVX-512 BF16, AMX) it overtakes the compiled one from some eight rows on; a call
    costs 10 µs whatever its size.
    """

    words = np.int16

    def __init__(self, weight: Tensor) -> None:
        self.width = weight.shape[1]
        operators = torch.ops.mkldnn
        self._weight = operators._reorder_linear_weight(weight.detach().bfloat16().contiguous())
        self._run = operators._linear_pointwise.default

    def __call__(self, x: Array) -> Array:
        return words_of(self._run(bf16_of(x), self._weight, None, "none", [], ""))


def make_product(kind: str, weight: Tensor) -> Product:
    """kind: `ours`; `int8`, the same with weights in int8; `onednn`; `vllm`, the same library by a shorter way;
    `vllm-int8`, int8 weights and activations.

    Raises ValueError for another, ImportError if its library is missing.
    """
    if kind in ("ours", "int8"):
        return CompiledProduct(weight, small=kind == "int8")
    if kind == "onednn":
        return OneDnnProduct(weight)
    if kind in ("vllm", "vllm-int8"):
        from graphs.vllm_cpu import VllmInt8Product, VllmProduct

        return VllmInt8Product(weight) if kind == "vllm-int8" else VllmProduct(weight)
    raise ValueError(f"on a CPU there are no products called {kind!r}, only ours, int8, onednn, vllm and vllm-int8")


def onednn_available() -> bool:
    """Whether this torch has the operators that OneDnnProduct calls; they are its compiler's, promised to nobody."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's own omission
    return bool(available) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def bf16_of(words: Array) -> Tensor:
    """The same memory for torch: [rows, n] int16 → bf16."""
    return torch.from_numpy(words).view(torch.bfloat16)


def words_of(tensor: Tensor) -> Array:
    """The same memory for the compiled functions: bf16 → int16."""
    return as_array(tensor)
