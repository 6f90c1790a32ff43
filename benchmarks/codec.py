"""How long the codec takes: `python -m benchmarks.codec --slots 1 4 16 --threads 1 --shape demo`.

Random weights, since the time doesn't depend on them. Needs torch and numpy alone, so it runs on a bare GPU
machine too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from graphs.codec import DecoderLane, EncoderLane
from models import demo_checkpoint
from models.config import FRAME_SAMPLES, MimiConfig
from models.mimi import Mimi

SHAPES = {"demo": demo_checkpoint.MIMI, "published": MimiConfig()}


def random_codec(config: MimiConfig) -> Mimi:
    torch.manual_seed(0)
    codec = Mimi(config)
    for codebook in codec.quantizer.codebooks():
        torch.nn.init.normal_(codebook.embedding_sum)
    return codec.eval()


def measured_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Wall time of each call; lanes return host arrays, so a device has finished by then."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--group", type=int, default=None, help="slots computed together (default: the lane's)")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    codec = random_codec(SHAPES[args.shape])
    random = np.random.default_rng(0)
    print(f"{args.shape} codec on {args.device}, {args.threads} thread(s), median (p95) ms of one 80 ms frame")
    print(f"{'slots':>5}  {'encode':>16}  {'decode':>16}  {'both':>8}")
    for slots in args.slots:
        encoder = EncoderLane(codec, slots, args.group, args.device)
        decoder = DecoderLane(codec, slots, args.group, args.device)
        everybody = list(range(slots))
        pcm = random.integers(-3000, 3000, (slots, FRAME_SAMPLES), dtype=np.int16)
        codes = random.integers(0, codec.config.quantizer.bins, (slots, codec.config.num_codebooks), dtype=np.int16)
        columns = [
            measured_ms(partial(encoder.run, everybody, pcm), args.repeats),
            measured_ms(partial(decoder.run, everybody, codes), args.repeats),
        ]
        medians = [statistics.median(times) for times in columns]
        cells = [
            f"{median:7.2f} ({np.percentile(times, 95):6.2f})" for median, times in zip(medians, columns, strict=True)
        ]
        print(f"{slots:>5}  {cells[0]:>16}  {cells[1]:>16}  {sum(medians):>8.2f}")


if __name__ == "__main__":
    main()
