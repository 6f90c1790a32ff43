"""Many calls at once: who dials when, and what came of each. One process's worth; loadtest/generators.py has several.

for each call   wait for its place in the ramp → dial → ready → speak and listen until everybody hangs up
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from loadtest.chat_client import Lost, Refused, converse, speak
from loadtest.chat_wire import ChatOptions, Kind, Message, WireError
from loadtest.opus_pages import NotOpus, samples_in
from loadtest.speech import FRAME_S, EndlessSpeech, Samples
from loadtest.timings import OutOfOrder, Timings

NOT_READY = "not ready"  # in place of a code: the run was over before the agent was there
NO_CODE = "none"  # nobody gave a code: no server, or a socket that just broke

# Encoded before anybody dials; what a longer run needs is encoded on the way, at 1 ms a frame and recording.
_PREPARED_S = 60.0


@dataclass(frozen=True)
class LoadPlan:
    """`sessions` calls, dialled evenly over `ramp_s`; all hang up `seconds` after the last was dialled.

    Call i takes voice, role and recording i modulo how many there are, and seed `seed` + i. `speech`: each [n] float32
    at 24 kHz, said over and over. An empty voice is the server's default.
    """

    server: str
    sessions: int
    seconds: float
    speech: tuple[Samples, ...]
    ramp_s: float = 0.0
    voices: tuple[str, ...] = ("",)
    roles: tuple[str, ...] = ("",)
    seed: int = 0
    key: str | None = field(default=None, repr=False)

    @property
    def over_s(self) -> float:
        """When all hang up, in seconds after the first was dialled."""
        return self.ramp_s + self.seconds

    def dialled_s(self, call: int) -> float:
        """When call `call` is dialled, in seconds after the first."""
        return self.ramp_s * call / self.sessions

    def options(self, call: int) -> ChatOptions:
        return ChatOptions(
            voice=self.voices[call % len(self.voices)],
            role=self.roles[call % len(self.roles)],
            seed=self.seed + call,
            key=self.key,
        )


@dataclass(frozen=True)
class CallRecord:
    """What came of one call. `code` is the close code or HTTP status of a call that was refused or lost."""

    call: int
    timings: Timings
    outcome: Literal["held", "refused", "lost"]
    code: str = ""
    sentence: str = ""


class Count(IntEnum):
    """Places in the list of running totals that a progress line reads."""

    UP = 0  # calls that are ready and not over
    OVER = 1
    FAILED = 2  # of those that are over
    FRAMES = 3  # heard, of all calls


def counts() -> list[int]:
    return [0] * len(Count)


class Speeches:
    """The recordings of a plan, encoded once for all calls of this process."""

    def __init__(self, plan: LoadPlan) -> None:
        self._speech = [EndlessSpeech(pcm) for pcm in plan.speech]
        for speech in self._speech[: plan.sessions]:
            speech.prepare(int(min(plan.over_s, _PREPARED_S) / FRAME_S) + 1)

    def of(self, call: int) -> Iterator[bytes]:
        return self._speech[call % len(self._speech)].chunks()


async def hold_calls(
    plan: LoadPlan,
    calls: Sequence[int],
    speeches: Speeches,
    *,
    start_s: float,
    totals: MutableSequence[int],
    clock: Callable[[], float] = time.monotonic,
) -> list[CallRecord]:
    """Holds these calls of the plan, whose first is dialled at `start_s` of `clock`. A call that fails is a record."""
    return list(await asyncio.gather(*(_hold(plan, call, speeches, start_s, totals, clock) for call in calls)))


async def _hold(
    plan: LoadPlan,
    call: int,
    speeches: Speeches,
    start_s: float,
    totals: MutableSequence[int],
    clock: Callable[[], float],
) -> CallRecord:
    await asyncio.sleep(max(0.0, start_s + plan.dialled_s(call) - clock()))
    timings = Timings(opened_s=clock())
    over_s = start_s + plan.over_s

    def take(message: Message) -> bool:
        if message.kind is Kind.HANDSHAKE:
            totals[Count.UP] += 1
        elif message.kind is Kind.AUDIO:
            before = len(timings.heard_s)
            timings.on_heard(clock(), samples_in(message.payload))
            totals[Count.FRAMES] += len(timings.heard_s) - before
        return False

    record = await _outcome(plan, call, speeches.of(call), timings, take, over_s, clock)
    timings.on_end(clock())
    totals[Count.UP] -= timings.ready_s is not None
    totals[Count.OVER] += 1
    totals[Count.FAILED] += record.outcome != "held"
    return record


async def _outcome(
    plan: LoadPlan,
    call: int,
    spoken: Iterator[bytes],
    timings: Timings,
    take: Callable[[Message], bool],
    over_s: float,
    clock: Callable[[], float],
) -> CallRecord:
    try:
        async with asyncio.timeout(over_s - clock()):
            # Silence is measured here, not punished: a call that hears nothing goes on to the end.
            await converse(
                plan.server,
                plan.options(call),
                timings,
                take,
                lambda send: speak(send, spoken, timings, clock),
                ready_timeout_s=plan.over_s,
                silence_timeout_s=plan.over_s,
                clock=clock,
            )
    except TimeoutError:
        if timings.ready_s is not None:
            return CallRecord(call, timings, "held")
        return CallRecord(call, timings, "refused", NOT_READY, "the run was over before the agent was ready")
    except (Refused, Lost) as failure:
        outcome: Literal["refused", "lost"] = "refused" if isinstance(failure, Refused) else "lost"
        return CallRecord(call, timings, outcome, str(failure.close_code or NO_CODE), str(failure))
    except (WireError, NotOpus, OutOfOrder) as failure:
        # What this is, is no personaplex server, or one with a fault that must not pass for a slow one.
        return CallRecord(call, timings, "lost" if timings.ready_s else "refused", "protocol", str(failure))
    raise AssertionError("converse ended although nobody told it to")
