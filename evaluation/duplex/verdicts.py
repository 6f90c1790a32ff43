"""What the judges say of one conversation, as a file; and, with item and recording, the dialogue that is scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.duplex.dialogue import Dialogue, Span, Unspoken, UserTurn, Word
from evaluation.duplex.items import Item, Line, read_item
from evaluation.duplex.recording import Recording, read_recording
from evaluation.duplex.user import Spoken, speech_spans

JUDGED = "judged.json"
REFERENCES = "references"
ABOUT_REFERENCES = "about.json"


@dataclass(frozen=True)
class Verdict:
    """Heard on the agent's channel. Times in seconds on the caller's clock."""

    judges: Mapping[str, str]  # part → who judged it, by name and version
    speech: tuple[Span, ...]
    words: tuple[Word, ...]
    unaligned: int  # words whose times are a guess from their neighbours'
    similarities: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Verdict:
        """Raises KeyError or TypeError if it is none."""
        return Verdict(
            judges=dict(raw["judges"]),
            speech=tuple(Span(*span) for span in raw["speech"]),
            words=tuple(Word(*word) for word in raw["words"]),
            unaligned=int(raw["unaligned"]),
            similarities=dict(raw["similarities"]),
        )


def read_verdict(folder: Path) -> Verdict:
    """Raises FileNotFoundError if the conversation has not been judged."""
    return Verdict.from_json(json.loads((folder / JUDGED).read_text(encoding="utf-8")))


def read_dialogue(folder: Path) -> Dialogue:
    """The scored dialogue of an item's folder. Raises ItemError, and FileNotFoundError for what is not there yet."""
    recording = read_recording(folder)
    no_voice = _why_no_voice(folder.parent.parent / REFERENCES, str(recording.metadata.get("lm_model_file", "")))
    return assemble(read_item(folder), recording, read_verdict(folder), no_voice)


def assemble(item: Item, recording: Recording, verdict: Verdict, no_voice: str = "") -> Dialogue:
    """Puts what was played, what came back and what was heard of it together."""
    lines = [(item.lines[entry.line], entry) for entry in recording.spoken]
    return Dialogue(
        turns=tuple(_turn(line, entry) for line, entry in lines if entry.outcome == "said"),
        speech=verdict.speech,
        words=verdict.words,
        text="".join(piece for _, piece in recording.text),
        unspoken=tuple(
            Unspoken(line.kind, line.text, entry.outcome, entry.at_s)
            for line, entry in lines
            if entry.outcome != "said"
        ),
        stalls=tuple(Span(*stall) for stall in recording.stalls),
        seconds=recording.seconds,
        voice=item.voice,
        similarities=verdict.similarities,
        no_voice=no_voice,
    )


def _turn(line: Line, entry: Spoken) -> UserTurn:
    return UserTurn(
        kind=line.kind,
        spans=tuple(Span(start_s, end_s) for start_s, end_s in speech_spans(line, entry.at_s)),
        text=line.text,
        answer=line.answer,
        asks=line.asks,
        expected=line.expected,
        unjudged=line.unjudged,
        script=line.script,
    )


def _why_no_voice(references: Path, model: str) -> str:
    """References are recordings of one model's voices; another model's voice of that name is somebody else."""
    about = references / ABOUT_REFERENCES
    if not about.is_file():
        return "there are no references of the voices"
    prefix = str(json.loads(about.read_text(encoding="utf-8"))["models"])
    if model.startswith(prefix):
        return ""
    return f"the references are voices of {prefix}…, not of {model or 'this model'}"
