"""How long a call takes, and how fast this device moves memory: medians, synchronised."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP_CALLS = 3
LEAST_CALLS = 5
MOST_CALLS = 200

# Far above any cache, so that memory is measured and not the cache.
COPY_BYTES_CPU = 256 << 20
COPY_BYTES_CUDA = 2 << 30


def median_ms(call: Callable[[], object], device: torch.device, budget_s: float = 1.5) -> float:
    """Milliseconds of one call: the median of as many as fit into `budget_s`, and of five at least."""
    for _ in range(WARM_UP_CALLS):
        call()
    _synchronise(device)
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < LEAST_CALLS or (time.perf_counter() - begun < budget_s and len(taken) < MOST_CALLS):
        start = time.perf_counter()
        call()
        _synchronise(device)
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy moves, read and written both counted."""
    size = COPY_BYTES_CUDA if device.type == "cuda" else COPY_BYTES_CPU
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device, budget_s=1.0) / 1e3)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
