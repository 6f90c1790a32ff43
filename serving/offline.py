"""One recording answered as fast as the replica goes: no socket, no clock, the same stages and frames. No Ray here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from actors.errors import ConversationBroken, from_code
from actors.messages import Down, DownSink, Failed, FrameIn, FrameOut, Need, OpenRequest, Ready
from graphs.stages import FrameKey, SessionSpec

EPOCH = 1
TENANT = INGRESS = "offline"

# Enough that each of the three stages always has a frame to work on, and below what a replica takes in flight.
FRAMES_IN_FLIGHT = 8


class OfflineReplica(Protocol):
    """What is needed of actors.replica.Replica."""

    async def open(self, request: OpenRequest, sink: DownSink) -> None: ...

    def offer(self, frame: FrameIn) -> None: ...

    async def close(self, session: str, epoch: int, reason: str) -> None: ...


@dataclass(frozen=True)
class Heard:
    """What the agent did while the recording ran, frame by frame."""

    pcm: npt.NDArray[np.int16]  # [frames * 1920]
    tokens: npt.NDArray[np.int16]  # [frames, 9]: the text token, the agent's eight codes
    pieces: tuple[str, ...]  # what each frame adds to the agent's words, "" for most


async def answer_frames(
    replica: OfflineReplica,
    frames: npt.NDArray[np.int16],
    spec: SessionSpec,
    on_frame: Callable[[int], None] | None = None,
) -> Heard:
    """Plays `frames` [n, 1920] int16 to the agent of `spec`. `on_frame` is told how many were answered.

    Raises ServingError: the agent could not be opened, or was lost.
    """
    session = uuid4().hex
    inbox: asyncio.Queue[Down] = asyncio.Queue()
    heard: list[FrameOut] = []

    def sink(message: Down) -> None:
        inbox.put_nowait(message)

    await replica.open(OpenRequest(session, EPOCH, TENANT, INGRESS, spec), sink)
    try:
        offered, ready = 0, False
        while len(heard) < len(frames):
            while ready and offered < min(len(heard) + FRAMES_IN_FLIGHT, len(frames)):
                replica.offer(FrameIn(FrameKey(session, EPOCH, offered), frames[offered]))
                offered += 1
            match await inbox.get():
                case Ready():
                    ready = True
                case FrameOut() as frame:
                    heard.append(frame)
                    if on_frame is not None:
                        on_frame(len(heard))
                case Failed(code=code, message=message):
                    raise from_code(code, message)
                case Need(need_frame=due):  # offered in order and within the bound, none is ever missing
                    raise ConversationBroken(f"The replica waits for frame {due}, which it was given.")
    finally:
        await replica.close(session, EPOCH, "the recording is over")
    return Heard(
        pcm=np.concatenate([frame.pcm for frame in heard]),
        tokens=np.stack([np.concatenate(([frame.text_token], frame.codes)) for frame in heard]).astype(np.int16),
        pieces=tuple(frame.text for frame in heard),
    )
