"""Moments missed, so that a model learns what to do behind them; and users who break in.

In scripts an agent answers within half a second and yields within a fifth of one. A model that missed that moment is
where no script has ever been, and stays there: silent after a question that it did not answer at once, or talking on
under somebody who broke in. So some answers come late here, and some agents yield late. That they wait is not learnt
(`waits`); that the answer begins, or the voice ends, is: whoever finds itself there knows what is due.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from models.config import FRAME_SAMPLES
from training.kokoro import RATE
from training.script import YIELD_S, Script, Turn
from training.timeline import Placed, Timeline

LATE_ANSWERS, LATE_YIELDS, BREAK_INS = 0.4, 0.25, 0.5  # shares of the turns that could
HEARD_OUT = 0.4  # of users' murmurs stay: they sound as interruptions begin, and an agent that waits to know is late
_YIELD_S = (0.3, 0.9)
_LONG_ENOUGH = 8  # words of an answer that a user breaks into instead of hearing it out
_WAIT_S, _TALK_S = 0.45, 0.28  # longer than any script has an agent wait, or talk on
_REACTION = 2  # frames in which nobody can have heard it yet


def missed(script: Script, rng: np.random.Generator) -> Script:
    """The same script with some answers and yields late, some users breaking in, and every user's turn answered."""
    turns: list[Turn] = []
    for turn, after in itertools.zip_longest(script.turns, script.turns[1:]):
        if _unanswered(turn, after):
            continue
        before = next((other for other in reversed(turns) if other.kind != "backchannel"), None)
        draw, late_s, at = float(rng.random()), _late_s(rng), float(rng.uniform(0.2, 0.85))
        if turn.kind == "backchannel" and turn.speaker == "user" and draw >= HEARD_OUT:
            continue
        if turn.kind == "interruption" and draw < LATE_YIELDS:
            turn = replace(turn, yield_s=float(rng.uniform(*_YIELD_S)))
        elif turn.kind == "turn" and turn.speaker == "agent" and before is not None:
            if _asks(before) and draw < LATE_ANSWERS:
                turn = replace(turn, gap_s=late_s)
        elif turn.kind == "turn" and turn.speaker == "user" and turns and turns[-1] is before:
            long = before.speaker == "agent" and len(before.parts[0].split()) >= _LONG_ENOUGH
            if long and draw < BREAK_INS:
                late = rng.random() < LATE_YIELDS
                yield_s = float(rng.uniform(*(_YIELD_S if late else YIELD_S)))
                turn = replace(turn, kind="interruption", at=at, yield_s=yield_s)
        turns.append(turn)
    return replace(script, turns=tuple(turns))


def _asks(before: Turn | Placed) -> bool:
    """Whether the agent, whose turn is next, answers it."""
    return before.speaker == "user" and before.kind != "aside"


def _unanswered(turn: Turn, after: Turn | None) -> bool:
    """Whether a user goes on without an answer: whoever learns that such turns exist takes others for one."""
    return (turn.speaker, turn.kind) == ("user", "turn") and (after is None or after.speaker == "user")


def _late_s(rng: np.random.Generator) -> float:
    """Half of them just missed: what it does in the next half second is what its user notices."""
    late_s = rng.uniform(0.8, 4.0) if rng.random() < 0.5 else 0.5 + rng.exponential(0.35)
    return round(min(float(late_s), 4.0), 2)


def waits(timeline: Timeline, laid: Mapping[Placed, tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of frames (from, to) in which the agent misses a moment, and which are not to be learnt.

    laid: the frames (first, behind the last) of what the agent says. An answer is learnt from the frame before its
    first one on, where its first word is announced; a silence from its own first frame on.
    """
    found = []
    for item, (first, stop) in laid.items():
        if item.kind != "turn":
            continue
        earlier = [other for other in timeline.placed if other.kind != "backchannel" and other.stop <= item.start]
        before = max(earlier, key=lambda other: other.stop, default=None)
        if before is not None and _asks(before) and item.start - before.stop > _WAIT_S * RATE:
            found.append((-(-before.stop // FRAME_SAMPLES) + _REACTION, first - 1))
        if item.cut:
            breaks = [other.start for other in timeline.placed if other.kind == "interruption"]
            # None where its last word had ended by itself, and the next one never began.
            broke_in = next((start for start in breaks if item.start <= start < item.stop), item.stop)
            if item.stop - broke_in > _TALK_S * RATE:
                found.append((broke_in // FRAME_SAMPLES + _REACTION, stop))
    return [(first, stop) for first, stop in found if first < stop]
