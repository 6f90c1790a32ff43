"""Which shapes give a row the same bits, whatever company it is computed in: `python -m benchmarks.row_bits`.

The engine's padding rules (graphs.attention: ROW_PAD, KEY_BLOCK) rest on what this prints; run it where you serve.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F

LINEAR_SHAPES = ((960, 320), (320, 880), (2048, 128), (1024, 256))  # outputs × inputs, demo model and demo codec
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 64, 68, 96)
SUM_LENGTHS = (64, 128, 192, 256, 320, 384, 448, 512)


def linear_row_counts(dtype: torch.dtype, device: str) -> list[int]:
    """Row counts for which F.linear gives the first rows other bits than a batch of four does."""
    differing: set[int] = set()
    for outputs, inputs in LINEAR_SHAPES:
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        rows = torch.randn(max(ROW_COUNTS), inputs, device=device).to(dtype)
        four = F.linear(rows[:4], weight)
        for count in ROW_COUNTS:
            shared = min(count, 4)
            if not torch.equal(F.linear(rows[:count].contiguous(), weight)[:shared], four[:shared]):
                differing.add(count)
    return sorted(differing)


def sum_lengths(dtype: torch.dtype, device: str) -> list[int]:
    """Lengths of a weighted sum over keys whose bits change when zero weights up to that length are appended."""
    values = torch.randn(5, max(SUM_LENGTHS), 64, device=device).to(dtype)
    weights = torch.rand(5, 4, max(SUM_LENGTHS), device=device).to(dtype)
    differing: set[int] = set()
    for shorter, longer in itertools.pairwise(SUM_LENGTHS):
        padded = weights.clone()
        padded[..., shorter:] = 0
        short = padded[..., :shorter].contiguous() @ values[:, :shorter]
        if not torch.equal(padded[..., :longer].contiguous() @ values[:, :longer], short):
            differing.add(longer)
    return sorted(differing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__} on {arguments.device}, {arguments.threads} thread(s)")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rows = linear_row_counts(dtype, arguments.device)
        print(f"{name}: a row of F.linear differs from the same row in a batch of four at row counts {rows or 'none'}")
        lengths = sum_lengths(dtype, arguments.device)
        print(f"{name}: a sum over keys changes its bits when padded with zero weights to {lengths or 'none'}")


if __name__ == "__main__":
    main()
