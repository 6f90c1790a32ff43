"""What became of one call: a struck one held against an undisturbed one, frame by frame. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.chaos.caller import CallLog
from loadtest.chaos.gaps import Gap, gaps, story
from loadtest.chaos.journals import Seen
from loadtest.chaos.pulse import Stall

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
    gap_story: str  # what it was made of
    gap_at_least_s: float  # of all gaps, the longest that this process did not make itself
    gap_at_most_s: float  # the longest there may have been, where this process was late to note its beginning
    homes: int  # (epoch, replica) that it had
    cuts: tuple[str, ...]  # how connections were lost and not had again, and how often
    why: str  # it was not kept, or its journal could not be read

    @property
    def tokens_equal(self) -> bool:
        return self.differing is None and not self.unseen

    def as_json(self) -> dict[str, Any]:
        return {
            "call": self.call,
            "kept": self.kept,
            "lost": self.lost,
            "unseen": self.unseen,
            "doubled": self.doubled,
            "first_difference": self.differing,
            "longest_gap_s": round(self.longest_gap_s, 3),
            "gap_at_s": round(self.gap_at_s, 1),
            "gap_story": self.gap_story,
            "trimmed": self.trimmed,
            "sound_differs": self.sound_differs,
            "homes": self.homes,
            "cuts": list(self.cuts),
            "why": self.why,
        }


def judge_call(
    log: CallLog, seen: Seen, reference: Reference, frames: int, stalls: Sequence[Stall] = ()
) -> CallVerdict:
    """`frames`: how many the caller said, and so how many the model has to answer. `stalls`: of the witness itself."""
    numbers = [heard.frame for heard in log.heard]
    heard = {number for number in numbers if 0 <= number < frames}
    alike = {each.frame for each in log.heard if each.digest == reference.digests.get(each.frame, "")}
    unseen = [frame for frame in range(frames) if frame not in seen.tokens and frame not in alike]
    shifted = sum(1 for each in log.heard if _is_another(each.frame, each.digest, reference))
    silences = gaps(log, stalls) or [Gap(log.ready_s or 0.0, log.ready_s or 0.0)]
    longest = max(silences, key=lambda gap: gap.seconds)
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
        longest_gap_s=longest.seconds,
        gap_at_s=longest.until_s - (log.ready_s or 0.0),
        gap_story=story(longest, log),
        gap_at_least_s=max(gap.at_least_s for gap in silences),
        gap_at_most_s=max(gap.at_most_s for gap in silences),
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
