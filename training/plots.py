"""Draws a run's log: `python -m training.plots codec`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from training.folders import Log, state_folder

_PANELS = {
    "hearing": (("columns", "val_columns"), ("speech", "val_speech"), ("grad",)),
    "codec": (("mel", "val_mel"), ("columns", "val_columns"), ("loud", "val_loud"), ("grad",)),
    "lm": (
        ("text", "val_text"),
        ("words", "val_words"),
        ("semantic", "val_semantic"),
        ("near", "val_near"),
        ("far", "val_far"),
    ),
}


def smoothed(values: list[float], span: int = 25) -> list[float]:
    """A running mean over the last `span` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - span)]) / min(i + 1, span) for i in range(len(values))]


def draw(kind: str, log: Path, target: Path) -> None:
    """Writes a PNG of a run's figures over its steps. Raises FileNotFoundError if there is no log."""
    rows = Log(log).read()
    if not rows:
        raise FileNotFoundError(f"{log} has no figures yet")
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, len(_PANELS[kind]), figsize=(4 * len(_PANELS[kind]), 3), layout="constrained")
    for axis, names in zip(axes, _PANELS[kind], strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            values = [value for _, value in points]
            axis.plot([step for step, _ in points], values if name.startswith("val") else smoothed(values), label=name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(_PANELS))
    arguments = parser.parse_args()
    folder = state_folder() / arguments.kind
    draw(arguments.kind, folder / "log.jsonl", folder / "log.png")
    print(folder / "log.png")


if __name__ == "__main__":
    main()
