"""The picture of benchmarks.frame's rows: what a frame costs over the conversations held at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.config import FRAME_MS

COLOURS = ("#1d4ed8", "#0f766e", "#c2410c", "#7e22ce")


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Frame time over slots, a line for each context fill, the step's roofline dotted, the budget where it is in sight.

    rows: FrameRow.as_dict of one device and dtype. Without matplotlib it says so and writes nothing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib here, no plot; the JSON has all figures")
        return
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for index, context in enumerate(sorted({row["context_frames"] for row in rows})):
        chosen = sorted((row for row in rows if row["context_frames"] == context), key=lambda row: row["slots"])
        slots, colour = [row["slots"] for row in chosen], COLOURS[index % len(COLOURS)]
        axis.plot(slots, [row["frame_ms"] for row in chosen], "o-", color=colour, label=f"{context} frames held")
        axis.plot(slots, [row["step_ms"] for row in chosen], "--", color=colour, linewidth=1)
        axis.plot(slots, [row["roofline_ms"] for row in chosen], ":", color=colour)
    if max(row["frame_ms"] for row in rows) > FRAME_MS / 3:  # else it would press all lines to the ground
        axis.axhline(FRAME_MS, color="#444444", linestyle="--", linewidth=1)
        axis.text(rows[0]["slots"], FRAME_MS, " the budget: 80 ms", va="bottom", fontsize=9)
    axis.set_xticks(sorted({row["slots"] for row in rows}))
    axis.set_xlabel("conversations at once")
    axis.set_ylabel("encode + step + decode, ms")
    axis.set_title(
        f"One frame on {rows[0]['device']}, {rows[0]['dtype']}; dashed: the step alone, dotted: its roofline",
        loc="left",
    )
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path)
