"""What a load test says: figures of all calls together, and whether its own generator was on time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.load import CallRecord
from loadtest.timings import percentile

# A generator that is later than this once in a hundred frames blurs what it measures: a quarter of the 80 ms beat.
LATE_MS = 20.0


@dataclass(frozen=True)
class Spread:
    """Percentiles (nearest rank) in milliseconds; None where nothing was measured."""

    p50: float
    p95: float
    p99: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        return Spread(percentile(values, 0.5), percentile(values, 0.95), percentile(values, 0.99), max(values))

    def as_json(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 1) for name in ("p50", "p95", "p99", "max")}


@dataclass(frozen=True)
class LoadReport:
    """Gaps include the silence in which a call ended, if a player would have run dry in it."""

    sessions: int
    frames: int
    frame_gap_ms: Spread | None
    reply_ms: Spread | None  # from a user frame's leaving to the agent frame of the same number
    ready_ms: Spread | None
    first_audio_ms: Spread | None
    generator_lag_ms: Spread | None
    underruns: int
    refusals: dict[str, int]  # close code or HTTP status → calls
    closes: dict[str, int]  # by the server, before the caller hung up
    sentences: tuple[str, ...]  # what was said with them, each once

    @staticmethod
    def of(records: Sequence[CallRecord]) -> LoadReport:
        timings = [record.timings for record in records]
        gaps = [gap for each in timings for gap in each.frame_gaps_ms]
        gaps += [each.open_gap_ms for each in timings if each.open_gap_ms is not None]
        return LoadReport(
            sessions=len(records),
            frames=sum(len(each.heard_s) for each in timings),
            frame_gap_ms=Spread.of(gaps),
            reply_ms=Spread.of([lag for each in timings for lag in each.reply_lags_ms]),
            ready_ms=Spread.of([each.time_to_ready_s * 1e3 for each in timings if each.time_to_ready_s is not None]),
            first_audio_ms=Spread.of(
                [each.time_to_first_audio_s * 1e3 for each in timings if each.time_to_first_audio_s is not None]
            ),
            generator_lag_ms=Spread.of([lag for each in timings for lag in each.generator_lags_ms]),
            underruns=sum(each.underruns for each in timings),
            refusals=_by_code(records, "refused"),
            closes=_by_code(records, "lost"),
            sentences=tuple(dict.fromkeys(record.sentence for record in records if record.sentence)),
        )

    @property
    def was_late(self) -> bool:
        """The figures say more about the generator than about the server."""
        return self.generator_lag_ms is not None and self.generator_lag_ms.p99 > LATE_MS

    @property
    def valid(self) -> bool:
        """Something was measured, by a generator that was on time."""
        return self.generator_lag_ms is not None and not self.was_late

    @property
    def all_held(self) -> bool:
        return not self.refusals and not self.closes

    def as_json(self) -> dict[str, Any]:
        """`ready_ms` and `first_audio_ms` are medians, `generator_lag_ms` is the p99; `spread` has all of each."""

        def one(spread: Spread | None, name: str) -> float | None:
            return None if spread is None else round(getattr(spread, name), 1)

        def whole(spread: Spread | None) -> dict[str, float] | None:
            return None if spread is None else spread.as_json()

        return {
            "sessions": self.sessions,
            "frame_gap_ms": whole(self.frame_gap_ms),
            "ready_ms": one(self.ready_ms, "p50"),
            "first_audio_ms": one(self.first_audio_ms, "p50"),
            "underruns": self.underruns,
            "refusals": self.refusals,
            "closes": self.closes,
            "generator_lag_ms": one(self.generator_lag_ms, "p99"),
            "valid": self.valid,
            "frames": self.frames,
            "spread": {
                "ready_ms": whole(self.ready_ms),
                "first_audio_ms": whole(self.first_audio_ms),
                "reply_ms": whole(self.reply_ms),
                "generator_lag_ms": whole(self.generator_lag_ms),
            },
            "sentences": list(self.sentences),
        }


def _by_code(records: Sequence[CallRecord], outcome: str) -> dict[str, int]:
    return dict(sorted(Counter(record.code for record in records if record.outcome == outcome).items()))
