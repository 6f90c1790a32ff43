"""A load test as a picture: the frame gaps of every second, and how many calls were up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from loadtest.load import CallRecord
from loadtest.pictures import AGENT, BOTH, INK, PAPER, USER
from loadtest.timings import percentile

BEAT_MS = 80.0
DRY_MS = 200.0  # the beat and the 120 ms that a player has in hand


def gaps_by_second(records: Sequence[CallRecord]) -> dict[int, list[float]]:
    """Frame gaps in ms by the second, from the first dialling on, in which they ended."""
    start_s = min(record.timings.opened_s for record in records)
    gaps: dict[int, list[float]] = defaultdict(list)
    for timings in (record.timings for record in records):
        for before_s, now_s in pairwise(timings.heard_s):
            gaps[int(now_s - start_s)].append((now_s - before_s) * 1e3)
        if timings.open_gap_ms is not None and timings.ended_s is not None:
            gaps[int(timings.ended_s - start_s)].append(timings.open_gap_ms)
    return dict(sorted(gaps.items()))


def calls_up(records: Sequence[CallRecord]) -> list[tuple[float, int]]:
    """(seconds from the first dialling on, calls that are ready and not over), at every change."""
    start_s = min(record.timings.opened_s for record in records)
    changes = [(0.0, 0)]
    for timings in (record.timings for record in records):
        if timings.ready_s is not None and timings.ended_s is not None:
            changes += [(timings.ready_s - start_s, 1), (timings.ended_s - start_s, -1)]
    up, steps = 0, []
    for at_s, change in sorted(changes):
        up += change
        steps.append((at_s, up))
    return steps


def gaps_over_time(path: Path, records: Sequence[CallRecord], heading: str) -> None:
    """Writes a PNG. Raises ValueError if there are no calls, OSError if the file cannot be written."""
    if not records:
        raise ValueError("a picture of no calls would be empty")
    figure = Figure(figsize=(13, 5.5), dpi=130, facecolor=PAPER)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    gaps = gaps_by_second(records)
    for label, share, colour in (("p50", 0.5, USER), ("p99", 0.99, BOTH), ("worst", 1.0, AGENT)):
        values = [percentile(each, share) for each in gaps.values()]
        above.plot([second + 0.5 for second in gaps], values, color=colour, label=label, linewidth=1.2)
    for level, name in ((BEAT_MS, "the beat"), (DRY_MS, "a 120 ms buffer is dry")):
        above.axhline(level, color=INK, linewidth=0.6, linestyle=":")
        above.annotate(name, (1, level), xycoords=("axes fraction", "data"), fontsize=8, color=INK, ha="right")
    above.set_yscale("log")
    above.yaxis.set_major_locator(FixedLocator([20, 40, 80, 200, 500, 1000, 2000, 5000]))
    above.yaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    above.yaxis.set_minor_locator(NullLocator())
    above.set_ylabel("frame gap, ms", color=INK, fontsize=9)
    above.legend(frameon=False, fontsize=8)
    above.set_title(heading, loc="left", fontsize=11, color=INK, weight="bold")
    steps = calls_up(records)
    below.step([at_s for at_s, _ in steps], [up for _, up in steps], where="post", color=INK, linewidth=1.0)
    below.set_ylabel("calls up", color=INK, fontsize=9)
    below.set_xlabel("seconds", color=INK, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
