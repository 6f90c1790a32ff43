"""How long the codec takes: `python -m benchmarks.codec --slots 1 4 16 --threads 1 --shape demo`.

Random weights, since the time doesn't depend on them. Needs torch and numpy alone, so it runs on a bare GPU
machine too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.setting import options, random_mimi, setting
from graphs.codec import RUNNERS, DecoderLane, EncoderLane
from models.config import FRAME_SAMPLES


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
    parser = options("codec", __doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--runner", choices=RUNNERS, default="auto", help="how: see graphs/codec.py")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    chosen = setting(parser, args)
    codec = random_mimi(chosen.mimi, chosen.device)
    random = np.random.default_rng(0)
    print(f"{args.shape} codec on {chosen.device}, {args.threads} thread(s), median (p95) ms of one 80 ms frame")
    print(f"{'slots':>5}  {'encode':>16}  {'decode':>16}  {'both':>8}")
    for slots in args.slots:
        encoder = EncoderLane(codec, slots, runner=args.runner)
        decoder = DecoderLane(codec, slots, runner=args.runner)
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
