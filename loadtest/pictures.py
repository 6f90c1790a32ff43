"""Who spoke when: a picture of conversations, the user above the line and the agent below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.speech import FRAME_S, RATE, Samples, in_frames

USER, AGENT, BOTH, INK, PAPER = "#2a6f97", "#d1662f", "#8a4f7d", "#22272e", "#ffffff"

SPEECH_DBFS = -42.0  # a frame louder than this is somebody speaking; room noise lies around -70
HANG_FRAMES = 3  # 240 ms: a pause shorter than this is part of the sentence
ENVELOPE_S = 0.02


@dataclass(frozen=True)
class Lane:
    """One conversation. `user` and `agent` are [n] float32 at 24 kHz."""

    title: str
    note: str
    user: Samples
    agent: Samples


def speaking(pcm: Samples) -> npt.NDArray[np.bool_]:
    """[n] samples → [frames] bool: whether somebody speaks in each 80 ms, short pauses bridged."""
    frames = in_frames(pcm)
    level = 20 * np.log10(np.sqrt(np.mean(frames**2, axis=1)) + 1e-9)
    loud = level > SPEECH_DBFS
    bridged: npt.NDArray[np.bool_] = loud.copy()
    voiced = np.flatnonzero(loud)
    for before, after in pairwise(voiced):
        if after - before <= HANG_FRAMES + 1:
            bridged[before:after] = True
    return bridged


def spans(active: npt.NDArray[np.bool_]) -> list[tuple[float, float]]:
    """[frames] bool → (start_s, length_s) of each run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    return [(start * FRAME_S, (stop - start) * FRAME_S) for start, stop in edges.reshape(-1, 2)]


def who_spoke_when(path: Path, lanes: Sequence[Lane], heading: str) -> None:
    """Writes a PNG with a row per conversation. Raises ValueError if there is none."""
    if not lanes:
        raise ValueError("a picture of no conversations would be empty")
    seconds = max(len(lane.user) for lane in lanes) / RATE
    figure = Figure(figsize=(13, 0.9 + 1.75 * len(lanes)), dpi=130, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lanes), 1, sharex=True, squeeze=False)[:, 0]
    for axis, lane in zip(axes, lanes, strict=True):
        _draw(axis, lane, seconds)
    axes[-1].set_xlabel("seconds", color=INK, fontsize=9)
    top = 1 - 0.42 / figure.get_figheight()
    baseline = top + 0.12 / figure.get_figheight()
    figure.text(0.02, baseline, heading, fontsize=13, color=INK, weight="bold")
    for name, colour, x in (("user", USER, 0.82), ("both at once", BOTH, 0.93), ("agent", AGENT, 0.99)):
        figure.text(x, baseline, name, color=colour, fontsize=10, weight="bold", ha="right")
    figure.tight_layout(rect=(0.005, 0, 1, top), h_pad=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(axis: Axes, lane: Lane, seconds: float) -> None:
    for pcm, colour, sign in ((lane.user, USER, 1), (lane.agent, AGENT, -1)):
        times, envelope = _envelope(pcm)
        axis.fill_between(times, 0, sign * envelope, color=colour, alpha=0.85, linewidth=0)
    user, agent = speaking(lane.user), speaking(lane.agent)
    both = user[: len(agent)] & agent[: len(user)]
    for active, colour, y in ((user, USER, 1.08), (agent, AGENT, -1.22)):
        axis.broken_barh(spans(active), (y, 0.14), facecolors=colour, linewidth=0)
    axis.broken_barh(spans(both), (-0.03, 0.06), facecolors=BOTH, linewidth=0)
    axis.axhline(0, color=INK, linewidth=0.5, alpha=0.35)
    axis.set_title(lane.title, loc="left", fontsize=10, color=INK, weight="bold", pad=3)
    axis.set_title(lane.note, loc="right", fontsize=8.5, color=INK, alpha=0.75, pad=4)
    axis.set_xlim(0, seconds)
    axis.set_ylim(-1.3, 1.3)
    axis.set_yticks([])
    axis.tick_params(colors=INK, labelsize=8, length=2)
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_alpha(0.3)


def _envelope(pcm: Samples) -> tuple[Samples, Samples]:
    """Peaks of every 20 ms on a square-root scale, so that quiet speech is seen: ([k] seconds, [k] in 0 … 1)."""
    step = int(RATE * ENVELOPE_S)
    peaks = np.abs(np.pad(pcm, (0, -len(pcm) % step)).reshape(-1, step)).max(axis=1)
    times = (np.arange(len(peaks), dtype=np.float32) + 0.5) * ENVELOPE_S
    return times, np.sqrt(np.clip(peaks, 0, 1)).astype(np.float32)
