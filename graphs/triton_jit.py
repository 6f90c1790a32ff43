"""What every Triton kernel of ours is compiled with. Needs the package triton, which CPU installations lack."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import triton
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Numbers that differ from step to step or from bucket to bucket. Triton would compile a count of one, or a multiple of
# sixteen, by itself, and nobody promises that such a variant sums in the same order.
_NOT_SPECIALISED = ["rows", "codebook", "stream"]


def kernel(function: _Function) -> Any:
    """Compiled at first use for each set of constexpr arguments."""
    return triton.jit(function, do_not_specialize=_NOT_SPECIALISED)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when this module's users load)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def exact_dots(tensor: Tensor) -> bool:
    """Whether products have to be IEEE fp32: only where the model itself is fp32 (parity runs)."""
    return tensor.element_size() == 4
