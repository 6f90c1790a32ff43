"""What is known of a held conversation beside its sound, as a file in the item's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.duplex.user import Spoken

RECORDING = "recording.json"
CONVERSATION = "conversation.flac"  # user left, agent right, both on the caller's clock


@dataclass(frozen=True)
class Recording:
    """What is known of a held conversation beside its sound. Times in seconds on the caller's clock."""

    spoken: tuple[Spoken, ...]
    text: tuple[tuple[float, str], ...]  # pieces of the agent's own text stream, and when they were heard
    seconds: float
    lag_s: float  # from a user frame's beginning to hearing the agent's frame of that number; median
    stalls: tuple[tuple[float, float], ...] = ()  # from and to: the lag was another one, nothing there can be timed
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Recording:
        """Raises KeyError or TypeError if it is none."""
        return Recording(
            spoken=tuple(Spoken(**entry) for entry in raw["spoken"]),
            text=tuple((float(start_s), str(text)) for start_s, text in raw["text"]),
            seconds=float(raw["seconds"]),
            lag_s=float(raw["lag_s"]),
            stalls=tuple((float(start_s), float(end_s)) for start_s, end_s in raw["stalls"]),
            metadata=dict(raw["metadata"]),
        )


def read_recording(folder: Path) -> Recording:
    """Raises FileNotFoundError if the conversation has not been held."""
    return Recording.from_json(json.loads((folder / RECORDING).read_text(encoding="utf-8")))
