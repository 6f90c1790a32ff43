"""What a conversation has for its client: frames in order, bounded by time, not by luck."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from actors.messages import FrameOut

ON_TIME_FRAMES = 1  # 80 ms; two would be more than the 120 ms a client buffers
# Answers that come without the lag having shrunk: then nothing is being caught up any more, however late it is. Frames
# caught up at a fifth above real time still shrink it every six.
PATIENCE_FRAMES = 12
SILENT = np.zeros(0, dtype=np.int16)  # the pcm of a frame whose audio was dropped


class OutputQueue:
    """Holds what the client has not taken yet. A reader who falls behind loses the oldest audio, never text.

    `stale_frames` of audio are kept (2 s by default); being `limit_frames` behind (10 s) is the end.
    """

    def __init__(self, stale_frames: int, limit_frames: int, first_frame: int = 0) -> None:
        self._stale_frames = stale_frames
        self._limit_frames = limit_frames
        self._audible: deque[FrameOut] = deque()
        self._texts: deque[FrameOut] = deque()  # older than all that is audible, their audio gone
        self._newest = self._taken = first_frame - 1
        self.dropped_frames = 0

    def __len__(self) -> int:
        return len(self._texts) + len(self._audible)

    @property
    def behind(self) -> int:
        """80 ms frames between what came last and what the client took last."""
        return self._newest - self._taken

    @property
    def overrun(self) -> bool:
        """Whether the client is too far behind to go on."""
        return self.behind > self._limit_frames

    def put(self, frame: FrameOut) -> None:
        """Add the next frame; drops the audio of the oldest when there is more than may be stale."""
        self._newest = frame.key.frame
        self._audible.append(frame)
        if len(self._audible) > self._stale_frames:
            oldest = self._audible.popleft()
            self.dropped_frames += len(oldest.pcm) > 0
            if oldest.text:
                self._texts.append(replace(oldest, pcm=SILENT))

    def take(self) -> FrameOut | None:
        """The oldest frame; its pcm is empty when its audio was dropped."""
        queue = self._texts or self._audible
        if not queue:
            return None
        frame = queue.popleft()
        self._taken = frame.key.frame
        return frame


class CatchUp:
    """Which audio is too old to be heard after a recovery: frames come in a burst then, and played one after the
    other they would leave the conversation as late as the recovery was long, for good.

    A frame is as late as the user's frames that have come since. It is stale until it is no later than is usual for
    this client (some send ahead) or than `ON_TIME_FRAMES`. A replica that just keeps up must not silence the
    conversation, so it also ends when the lag has not shrunk for `PATIENCE_FRAMES` answers.
    """

    def __init__(self) -> None:
        self._usual: deque[int] = deque([0], maxlen=25)
        self._least: int | None = None  # the smallest lag since it began; None: nothing to catch up
        self._patience = 0

    @property
    def catching_up(self) -> bool:
        return self._least is not None

    def begin(self, unanswered: int) -> None:
        """The conversation goes on, with so many frames to answer at once."""
        self._least = unanswered if unanswered > 0 else None
        self._patience = PATIENCE_FRAMES

    def stale(self, behind: int) -> bool:
        """Whether an answer is too old to be heard; `behind` are the user's frames that came after its own."""
        if self._least is None:
            self._usual.append(behind)
            return False
        if behind < self._least:
            self._least, self._patience = behind, PATIENCE_FRAMES
        else:
            self._patience -= 1
        if not self._patience or behind <= max(ON_TIME_FRAMES, sorted(self._usual)[len(self._usual) // 2]):
            self._least = None
            return False
        return True
