"""What became of the calls: a struck run held against an undisturbed one, frame by frame. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loadtest.chaos.caller import CallLog
from loadtest.chaos.journals import Seen
from loadtest.timings import percentile

AFTERMATH_S = 8.0

Tokens = tuple[int, ...]  # the text token and the agent's eight codes


@dataclass(frozen=True)
class Reference:
    """A call as it goes when nobody disturbs it: what its journal holds, what is heard, what is written."""

    tokens: Mapping[int, Tokens]
    digests: Mapping[int, str]
    text: str

    @staticmethod
    def of(log: CallLog, seen: Seen) -> Reference:
        digests = {heard.frame: heard.digest for heard in log.heard if heard.digest is not None}
        return Reference(dict(seen.tokens), digests, log.text)

    def as_json(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens.items()), "digests": list(self.digests.items()), "text": self.text}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Reference:
        tokens = {int(frame): tuple(map(int, row)) for frame, row in value["tokens"]}
        return Reference(tokens, {int(frame): str(each) for frame, each in value["digests"]}, str(value["text"]))


@dataclass(frozen=True)
class CallVerdict:
    """One call. Frames are counted by their numbers, in the journal and at the ear, and the worse of both is said.

    lost: frames of the model that the caller was never sent, or that were not in the journal at the end.
    unseen: frames that no look at the journal caught, while it was out of reach, and whose sound is not that of the
    undisturbed run either: nothing can be said of their tokens.
    doubled: frames sent twice, sent beyond the last, or written anew in the journal with other tokens.
    differing: the first frame whose tokens are not those of the undisturbed run; None: all are equal.
    """

    call: int
    kept: bool
    lost: int
    unseen: int
    doubled: int
    differing: int | None
    trimmed: int  # frames whose sound was left out to catch up; their tokens and text are there
    sound_differs: int  # frames that sound otherwise than undisturbed
    text_equal: bool
    longest_gap_s: float
    gap_at_s: float  # when that gap ended, in seconds after the call was ready
    homes: int  # (epoch, replica) that it had
    cuts: tuple[str, ...]  # how connections were lost and not had again, and how often
    why: str  # it was not kept, or its journal could not be read

    @property
    def tokens_equal(self) -> bool:
        return self.differing is None and not self.unseen


def judge_call(log: CallLog, seen: Seen, reference: Reference, frames: int) -> CallVerdict:
    """`frames`: how many the caller said, and so how many the model has to answer."""
    numbers = [heard.frame for heard in log.heard]
    heard = {number for number in numbers if 0 <= number < frames}
    alike = {each.frame for each in log.heard if each.digest == reference.digests.get(each.frame, "")}
    unseen = [frame for frame in range(frames) if frame not in seen.tokens and frame not in alike]
    shifted = sum(1 for each in log.heard if _is_another(each.frame, each.digest, reference))
    gaps = log.gaps_s
    longest = max(range(len(gaps)), key=gaps.__getitem__, default=None)
    sounded = [each for each in log.heard if each.digest is not None]
    why = log.failure or ("" if seen.looks else f"its journal was never seen: {seen.trouble or 'no look'}")
    return CallVerdict(
        call=log.call,
        kept=log.failure is None and len(heard) == frames,
        lost=max(frames - len(heard), frames - min(seen.next_frame, frames)),
        unseen=len(unseen),
        doubled=len(numbers) - len(set(numbers)) + sum(number >= frames for number in numbers) + shifted
        + len(seen.changed),
        differing=_first_difference(seen.tokens, reference.tokens, frames),
        trimmed=sum(each.digest is None for each in log.heard),
        sound_differs=sum(each.digest != reference.digests.get(each.frame) for each in sounded),
        text_equal=log.text == reference.text,
        longest_gap_s=0.0 if longest is None else gaps[longest],
        gap_at_s=0.0 if longest is None else sounded[longest + 1].at_s - (log.ready_s or 0.0),
        homes=len(seen.homes),
        cuts=tuple(f"{count} × {how}" for how, count in Counter(how for _, how in log.cuts).items()),
        why=why,
    )  # fmt: skip


def _is_another(frame: int, digest: str | None, reference: Reference) -> bool:
    """Whether what was sent as `frame` is, sample by sample, a frame that was due before it."""
    if digest is None or reference.digests.get(frame) == digest:
        return False
    return any(reference.digests.get(frame - back) == digest for back in range(1, 26))


def _first_difference(tokens: Mapping[int, Tokens], expected: Mapping[int, Tokens], frames: int) -> int | None:
    return next((frame for frame in sorted(tokens) if frame < frames and tokens[frame] != expected.get(frame)), None)


@dataclass(frozen=True)
class Strike:
    """What was done, when, and what was heard of it: the longest gap that ended within some seconds after it, and how
    late the callers' own clock was meanwhile at most: a gap beside a large lag says more about this machine."""

    at_s: float  # after everybody was ready
    what: str
    gap_s: float = 0.0
    lag_ms: float = 0.0

    def as_json(self) -> dict[str, Any]:
        heard = {"gap_s": round(self.gap_s, 3), "lag_ms": round(self.lag_ms)}
        return {"at_s": round(self.at_s, 1), "what": self.what, **heard}

    def __str__(self) -> str:
        return f"{self.at_s:.1f} s: {self.what}; gap {self.gap_s:.2f} s, own lag {self.lag_ms:.0f} ms"


def heard_after(at_s: float, logs: Sequence[CallLog]) -> tuple[float, float]:
    """(longest gap in s, longest lag of our own in ms) that ended in the `AFTERMATH_S` from `at_s` of our clock on."""
    gaps, lags = [0.0], [0.0]
    for log in logs:
        sounded = [heard.at_s for heard in log.heard if heard.digest is not None]
        gaps += [after - before for before, after in pairwise(sounded) if at_s <= after <= at_s + AFTERMATH_S]
        said = zip(log.spoken_s, log.lags_ms, strict=True)
        lags += [lag for spoken_s, lag in said if at_s <= spoken_s <= at_s + AFTERMATH_S]
    return max(gaps), max(lags)


@dataclass(frozen=True)
class Verdict:
    """All calls of a run of one scenario."""

    scenario: str
    calls: Sequence[CallVerdict]
    gap_limit_s: float
    strikes: Sequence[Strike]
    missed: str = ""  # why not all strikes could be made
    witness_lag_ms: float = 0.0  # p99 of how late the callers' own clock was
    undisturbed_gap_s: float = 0.0  # the longest in the run that nobody disturbed
    expected_strikes: int = 3

    @property
    def kept(self) -> int:
        return sum(call.kept for call in self.calls)

    @property
    def lost(self) -> int:
        return sum(call.lost for call in self.calls)

    @property
    def doubled(self) -> int:
        return sum(call.doubled for call in self.calls)

    @property
    def unseen(self) -> int:
        return sum(call.unseen for call in self.calls)

    @property
    def tokens_equal(self) -> int:
        return sum(call.tokens_equal for call in self.calls)

    @property
    def longest_gap_s(self) -> float:
        return max((call.longest_gap_s for call in self.calls), default=0.0)

    @property
    def faults(self) -> list[str]:
        """What did not hold; empty if all did."""
        number = len(self.calls)
        found = [
            (self.kept < number, f"{number - self.kept} of {number} calls were not kept"),
            (self.lost > 0, f"{self.lost} model frames were lost"),
            (self.doubled > 0, f"{self.doubled} model frames were doubled"),
            (self.tokens_equal < number, f"the tokens of {number - self.tokens_equal} calls differ"),
            (
                self.longest_gap_s > self.gap_limit_s,
                f"a gap of {self.longest_gap_s:.2f} s was heard; {self.gap_limit_s:g} s are allowed",
            ),
            (
                not all(call.text_equal for call in self.calls),
                f"the text of {sum(not call.text_equal for call in self.calls)} calls differs",
            ),
            (self.unseen > 0, f"the tokens of {self.unseen} frames were not seen"),
            (bool(self.missed), self.missed),
            (len(self.strikes) < self.expected_strikes and not self.missed, f"only {len(self.strikes)} strikes"),
        ]
        return [what for wrong, what in found if wrong]

    @property
    def held(self) -> bool:
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "held": self.held,
            "sessions": len(self.calls),
            "kept": self.kept,
            "lost": self.lost,
            "doubled": self.doubled,
            "tokens_equal": self.tokens_equal,
            "longest_gap_s": round(self.longest_gap_s, 3),
            "gap_limit_s": self.gap_limit_s,
            "undisturbed_gap_s": round(self.undisturbed_gap_s, 3),
            "trimmed": sum(call.trimmed for call in self.calls),
            "sound_differs": sum(call.sound_differs for call in self.calls),
            "witness_lag_ms": round(self.witness_lag_ms, 1),
            "strikes": [
                {
                    "at_s": round(each.at_s, 1),
                    "what": each.what,
                    "gap_s": round(each.gap_s, 3),
                    "lag_ms": round(each.lag_ms),
                }
                for each in self.strikes
            ],
            "faults": self.faults,
            "calls": [
                {
                    "call": call.call,
                    "kept": call.kept,
                    "lost": call.lost,
                    "unseen": call.unseen,
                    "doubled": call.doubled,
                    "first_difference": call.differing,
                    "longest_gap_s": round(call.longest_gap_s, 3),
                    "gap_at_s": round(call.gap_at_s, 1),
                    "trimmed": call.trimmed,
                    "sound_differs": call.sound_differs,
                    "homes": call.homes,
                    "cuts": list(call.cuts),
                    "why": call.why,
                }
                for call in self.calls
            ],
        }


def witness_lag_ms(logs: Sequence[CallLog]) -> float:
    """p99 over all callers of how late their own clock was."""
    lags = [lag for log in logs for lag in log.lags_ms]
    return percentile(lags, 0.99) if lags else 0.0
