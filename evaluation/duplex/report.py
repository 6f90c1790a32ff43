"""An evaluation's report: scores every judged conversation, and writes report.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from evaluation.duplex.dialogue import Dialogue
from evaluation.duplex.gates import Result, judge
from evaluation.duplex.items import Item, item_folders, read_item, write_json
from evaluation.duplex.judge import is_judged
from evaluation.duplex.recording import CONVERSATION, Recording, read_recording
from evaluation.duplex.run import FAILURE, RUN
from evaluation.duplex.score import Measure, Score, score
from evaluation.duplex.suites import SUITES, Suite
from evaluation.duplex.user import FRAME_SAMPLES
from evaluation.duplex.verdicts import Verdict, read_dialogue, read_verdict

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
MEASURES: tuple[Measure, ...] = ("turns", "yields", "pauses", "facts", "voice")


@dataclass(frozen=True)
class Judged:
    """One conversation with everything that is known of it."""

    item: Item
    recording: Recording
    verdict: Verdict
    dialogue: Dialogue
    score: Score
    loudness: tuple[float, ...]  # of the agent's channel, 0 to 1, a value each 80 ms

    @property
    def badness(self) -> tuple[float, float]:
        """Worst first: the share of occasions missed, then of words."""
        counted = [event for event in self.score.events if event.outcome != "void"]
        missed = self.score.missed / len(counted) if counted else 0.0
        return (-missed, -self.score.word_errors / max(1, self.score.words_said))


@dataclass(frozen=True)
class Report:
    """What the report tells. `judged` worst first; `not_held` is name and reason of every other item."""

    suite: Suite
    order: Mapping[str, Any]
    server: Mapping[str, Any]
    made: datetime
    results: tuple[Result, ...]
    judged: tuple[Judged, ...]
    not_held: tuple[tuple[str, str], ...]

    @property
    def gates_missed(self) -> list[Result]:
        """Those that have to be passed, and are not."""
        return [result for result in self.results if result.gate.tier == "gate" and not result.passed]

    @property
    def complete(self) -> bool:
        return bool(self.judged) and not self.not_held

    @property
    def gate_count(self) -> int:
        return sum(result.gate.tier == "gate" for result in self.results)

    @property
    def model(self) -> str:
        """As it calls itself, or else where it is."""
        said = self.judged[0].recording.metadata.get("lm_model_file") if self.judged else None
        return str(said or self.server.get("model") or self.server.get("url") or "nobody")

    @property
    def trained(self) -> bool | None:
        said = self.judged[0].recording.metadata.get("trained") if self.judged else self.server.get("trained")
        return None if said is None else bool(said)

    @property
    def notice(self) -> str:
        """What the model's server tells everybody of it."""
        said = self.judged[0].recording.metadata.get("notice") if self.judged else self.server.get("notice")
        return str(said or "")

    @property
    def judges(self) -> Mapping[str, str]:
        """Who judged, by name; several where verdicts came together of judges whose figures are not comparable."""
        parts = sorted({part for entry in self.judged for part in entry.verdict.judges})
        return {
            part: " and ".join(sorted({entry.verdict.judges.get(part, "nobody") for entry in self.judged}))
            for part in parts
        }


def read_report(out: Path, now: datetime | None = None) -> Report:
    """Scores what is judged in a folder. Raises ItemError, and OSError or ValueError for a broken file."""
    run = json.loads((out / RUN).read_text(encoding="utf-8"))
    judged: list[Judged] = []
    not_held: list[tuple[str, str]] = []
    for folder in item_folders(out / "items"):
        if not is_judged(folder):
            not_held.append((folder.name, _why_not(folder)))
            continue
        dialogue = read_dialogue(folder)
        judged.append(
            Judged(
                read_item(folder),
                read_recording(folder),
                read_verdict(folder),
                dialogue,
                score(dialogue),
                loudness(folder / CONVERSATION),
            )
        )
    suite = SUITES[run["order"]["suite"]]
    results = judge([entry.score for entry in judged], suite.gates)
    return Report(
        suite,
        run["order"],
        run["server"] or {},
        now or datetime.now(UTC),
        tuple(results),
        tuple(sorted(judged, key=lambda entry: entry.badness)),
        tuple(not_held),
    )


def loudness(path: Path) -> tuple[float, ...]:
    """How loud the agent is in each frame, from 0 (-60 dB or less) to 1 (full scale)."""
    sound, _ = soundfile.read(path, dtype="float32", always_2d=True)
    agent = sound[: len(sound) // FRAME_SAMPLES * FRAME_SAMPLES, 1].reshape(-1, FRAME_SAMPLES)
    level = 20 * np.log10(np.sqrt(np.mean(np.square(agent), axis=1)) + 1e-6)
    return tuple(np.clip(1 + level / 60, 0, 1).round(2).tolist())


def _why_not(folder: Path) -> str:
    failure = folder / FAILURE
    return str(json.loads(failure.read_text(encoding="utf-8"))["why"]) if failure.exists() else "not held yet"


def write_report(out: Path, report: Report) -> None:
    """report.json and report.html, beside the items whose recordings the page plays."""
    from evaluation.duplex.page import page

    write_json(out / REPORT_JSON, to_json(report))
    (out / REPORT_HTML).write_text(page(report), encoding="utf-8")


def to_json(report: Report) -> dict[str, Any]:
    """Every number of every item."""
    return {
        "suite": report.suite.name,
        "order": dict(report.order),
        "server": dict(report.server),
        "made": report.made.isoformat(timespec="seconds"),
        "judges": dict(report.judges),
        "passed": not report.gates_missed and report.complete,
        "gates": [_gate(result) for result in report.results],
        "items": [_item(entry) for entry in report.judged],
        "not_held": [{"name": name, "why": why} for name, why in report.not_held],
    }


def _gate(result: Result) -> dict[str, Any]:
    return {
        "name": result.gate.name,
        "tier": result.gate.tier,
        "limit": result.gate.limit,
        "at_most": result.gate.measure is None,
        "share": result.share,
        "interval_95": result.interval,
        "n": result.n,
        "void": result.void,
        "median_delay_s": result.median_delay_s,
        "passed": result.passed,
    }


def _item(entry: Judged) -> dict[str, Any]:
    dialogue = entry.dialogue
    return {
        "name": entry.item.name,
        "role": entry.item.role,
        "voice": entry.item.voice,
        "seed": entry.item.seed,
        "seconds": dialogue.seconds,
        "lag_s": entry.recording.lag_s,
        "stalls": entry.recording.stalls,
        "word_errors": entry.score.word_errors,
        "words_said": entry.score.words_said,
        "words_heard": len(dialogue.words),
        "words_with_guessed_times": entry.verdict.unaligned,
        "counts": {measure: tally(entry.score, measure) for measure in MEASURES},
        "events": [asdict(event) for event in entry.score.events],
        "similarities": dict(dialogue.similarities),
        "text": dialogue.text,
        "user": [{"kind": turn.kind, "text": turn.text, "spans": turn.spans} for turn in dialogue.turns],
        "unspoken": [asdict(entry) for entry in dialogue.unspoken],
        "speech": dialogue.speech,
        "words": dialogue.words,
    }


def tally(score_: Score, measure: Measure) -> dict[str, int]:
    """How many occasions of a measure were met, missed and void."""
    outcomes: Sequence[str] = score_.outcomes(measure)
    return {outcome: outcomes.count(outcome) for outcome in ("met", "missed", "void")}
