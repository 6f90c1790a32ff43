"""When a conversation is anchored: re-prefilled from its prompt and its most recent frames, at a planned frame.

With sliding windows a cache depends on frames that have long slid out, and the persona slides out with the prompt. At
an anchor the engine goes on from a fresh ring instead: prompt, then the last `keep` frames, positions from 0 again.
Every anchor is planned so that the ring is just full when the next one comes: no key ever slides out, and no position
exceeds the window.

The anchor's frame decides tokens, so it may depend on nothing but the conversation itself: on its prompt's length and
on its seed, which spreads the anchors of calls that began together.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import FRAMES_PER_S

MIN_PERIOD = 8  # frames; a prompt that leaves less room than two of these is not anchored, its window slides
_GOLDEN = 0x9E3779B97F4A7C15  # spreads seeds that are consecutive numbers


@dataclass(frozen=True)
class AnchorPolicy:
    """every: frames from one anchor to the next, or three fifths of the room beside the prompt if that is less: what an
    anchor keeps of the conversation is the rest.

    lead: frames before an anchor at which its ring begins to be filled. Longer leads take fewer rows from each step,
    but hold a spare ring for longer.
    """

    every: int = 1500
    lead: int = 64

    @staticmethod
    def of_seconds(every_s: float) -> AnchorPolicy | None:
        """None, which is no anchors, for 0 or less."""
        return AnchorPolicy(max(MIN_PERIOD, round(every_s * FRAMES_PER_S))) if every_s > 0 else None

    def plan(self, window: int, prompt_frames: int, seed: int) -> AnchorPlan | None:
        """None where the prompt leaves no room for anchors."""
        room = window - prompt_frames
        period = min(self.every, room * 3 // 5)
        if period < MIN_PERIOD:
            return None
        sooner = (((seed * _GOLDEN) % 2**64) * (period // 2)) >> 64
        return AnchorPlan(first=room - sooner, period=period, keep=room - period, lead=min(self.lead, period // 2))

    @property
    def id(self) -> str:
        """Part of an engine's numerics_id: anchors decide tokens."""
        return f"a{self.every}"


@dataclass(frozen=True)
class AnchorPlan:
    """Frames of one conversation, counted from 0 after the prompt. Anchor k is at frame first + k · period: that frame
    is the first to be read over prompt and frames anchor - keep … anchor - 1 alone."""

    first: int
    period: int
    keep: int
    lead: int

    def next(self, first_row: int) -> int:
        """The anchor that follows, for a ring that begins with frame `first_row` after its prompt (0: none yet)."""
        if first_row <= 0:
            return self.first
        done = (first_row + self.keep - self.first) // self.period
        return self.first + (done + 1) * self.period

    def first_row(self, anchor: int) -> int:
        """The frame that follows the prompt after `anchor`."""
        return anchor - self.keep
