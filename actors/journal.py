"""The journal of one conversation: all that is needed to rebuild its state elsewhere, in memory only.

A conversation's tokens are a function of its spec, its seed and the raw input rows of its steps; its codec's state
is a function of the last frames of PCM and codes. So that is what a journal holds:

    rows       [n, 17] int16  raw input of every step since `first_row`, 425 B/s
    pending    [k, 17] int16  delay columns begun but not yet run (-2: still to be generated). May be empty: then
                              whoever rebuilds runs the last row as a live step, which draws the same tokens again
    controls   forced text, mute, changes of sampling, each with the frame it took effect at
    pcm        [m, 1920] int16  the user's audio, as far back as the codec's receptive field
    user_codes, agent_codes  [m, 8] int16  the same span in codes

The seed is in the spec. Randomness is a function of (seed, frame, codebook), so no generator state is kept.
Nothing here touches a disk, and nothing is pickled: `from_bytes` reads what another process sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from actors.errors import JournalError
from actors.frame_log import FrameLog
from actors.journal_bytes import MAX_SEED, Fields, sealed, unsealed
from actors.messages import FrameOut
from graphs.stages import CodecPast, Codes, Past, Pcm, Sampling, SessionSpec

Rows = npt.NDArray[np.int16]

FRAMES_PER_S = 12.5
PCM_WIDTH, CODES_WIDTH, ROW_WIDTH = 1920, 8, 17
RECEPTIVE_S = 80.0  # layers × context of the published Mimi: 8 × 250 positions at 25 a second
# Audio is kept so much longer: what is under way has been heard, and a rebuild counts from what was answered.
PCM_AHEAD = 32
MAX_ROWS = 1 << 20  # 23 hours without an anchor
MAX_CONTROLS = 100_000
MAX_RECEPTIVE_FRAMES = 10_000  # 800 s, ten times the published codec's


class Control(NamedTuple):
    """A change of how a conversation is computed, in force from `frame` on.

    kind "force_text": `values` are the text tokens to be spoken, one a frame; "mute": one value, 1 or 0;
    "sampling": text temperature, text top-k, audio temperature, audio top-k.
    """

    frame: int
    kind: str
    values: tuple[float, ...]


CONTROL_KINDS = {"force_text", "mute", "sampling"}


class Journal:
    """Grown frame by frame: `heard` before a frame goes into the system, `record` when its answer comes out.

    Both are idempotent by frame number and raise JournalError on a gap: a journal with a hole rebuilds another
    conversation than the one that was held.
    """

    def __init__(self, session: str, spec: SessionSpec, receptive_s: float = RECEPTIVE_S) -> None:
        keep = max(1, round(receptive_s * FRAMES_PER_S))
        self.session = session
        self.spec = spec
        self.prompt_hash = ""
        self.prompt_frames = 0
        self.numerics_id = ""  # of the replica that computed it; only an equal one continues bit for bit
        self.anchor_frame = 0  # the frame before which the engine last re-prefilled; 0: never
        self.is_excerpt = False  # only to be looked at: what a rebuild needs was left out
        self.rows = FrameLog(ROW_WIDTH)
        self.pending: Rows = np.zeros((0, ROW_WIDTH), dtype=np.int16)
        self.controls: list[Control] = []
        self.pcm = FrameLog(PCM_WIDTH, keep + PCM_AHEAD)
        self.user_codes = FrameLog(CODES_WIDTH, keep)
        self.agent_codes = FrameLog(CODES_WIDTH, keep)

    @property
    def heard_frames(self) -> int:
        """Frames of the user so far; the next one has this number."""
        return self.pcm.next

    @property
    def next_frame(self) -> int:
        """The first frame whose answer is not here yet."""
        return self.rows.next

    @property
    def first_row(self) -> int:
        """The frame of the oldest row: a rebuild prefills the prompt, then the rows from here on."""
        return self.rows.start

    def begin(self, prompt_hash: str, prompt_frames: int, numerics_id: str) -> None:
        """Notes what the conversation started from, known once its prompt is built."""
        self.prompt_hash, self.prompt_frames, self.numerics_id = prompt_hash, prompt_frames, numerics_id

    def heard(self, frame: int, pcm: Pcm) -> bool:
        """Notes a frame of the user, pcm [1920] int16. False if it was noted before."""
        return self.pcm.append(frame, pcm)

    def record(self, frame: int, row: Rows, user_codes: Codes, agent_codes: Codes, pending: Rows | None = None) -> bool:
        """Notes a step: row [17], codes [8] each, pending [k, 17]. False if it was noted before."""
        if frame >= self.heard_frames:
            raise JournalError(f"frame {frame} was answered before it was heard")
        if self.rows.next - self.rows.start >= MAX_ROWS:
            raise JournalError(f"a journal holds {MAX_ROWS} rows at most; the engine should have anchored long ago")
        if not self.rows.append(frame, row):
            return False
        self.user_codes.append(frame, user_codes)
        self.agent_codes.append(frame, agent_codes)
        self.pending = np.zeros((0, ROW_WIDTH), dtype=np.int16) if pending is None else pending.copy()
        return True

    def take(self, out: FrameOut) -> bool:
        """Notes an answer as `record` does, and the anchor it came after. False if it was noted before."""
        begun = None if out.next_column is None else out.next_column[None]
        if not self.record(out.key.frame, out.journal_row, out.user_codes, out.codes, begun):
            return False
        if out.first_row > self.first_row:
            self.anchor(out.key.frame, out.first_row)
        return True

    def past(self) -> Past:
        """What an engine needs to go on with `next_frame`. Raises JournalError for an excerpt."""
        self._refuse_excerpt()
        if self.pending.shape[0] > 0:
            return Past(self.rows.array(), self.first_row, self.pending[0])
        codes = self.user_codes.array()
        return Past(self.rows.array(), self.first_row, None, codes[-1] if len(codes) else None)

    def codec_pasts(self) -> tuple[CodecPast, CodecPast]:
        """What an encoder and a decoder need to go on with `next_frame`. Raises JournalError for an excerpt."""
        self._refuse_excerpt()
        n = self.next_frame
        heard = self.pcm.array()[: n - self.pcm.start]  # what comes after is still to be answered
        return CodecPast(heard, n), CodecPast(self.agent_codes.array(), n)

    def excerpt(self, first_row: int) -> Journal:
        """A copy without audio and what lies before `first_row`: small enough to be asked for often."""
        part = Journal(self.session, self.spec)
        part.is_excerpt = True
        part.begin(self.prompt_hash, self.prompt_frames, self.numerics_id)
        part.anchor_frame, part.pending, part.controls = self.anchor_frame, self.pending.copy(), list(self.controls)
        part.pcm.fill(self.heard_frames, np.zeros((0, PCM_WIDTH), dtype=np.int16))
        for log, mine in (
            (part.rows, self.rows),
            (part.user_codes, self.user_codes),
            (part.agent_codes, self.agent_codes),
        ):
            log.fill(min(max(first_row, mine.start), mine.next), mine.since(first_row))
        return part

    def _refuse_excerpt(self) -> None:
        if self.is_excerpt:
            raise JournalError("An excerpt of a journal is not enough to continue a conversation from.")

    def control(self, frame: int, kind: str, values: Sequence[float]) -> None:
        """Notes a change in force from `frame` on; frames come in order."""
        if kind not in CONTROL_KINDS:
            raise JournalError(f"a journal knows no control '{kind}'")
        if self.controls and frame < self.controls[-1].frame:
            raise JournalError(f"a control for frame {frame} came after one for frame {self.controls[-1].frame}")
        if len(self.controls) >= MAX_CONTROLS:
            raise JournalError(f"a journal holds {MAX_CONTROLS} controls at most")
        self.controls.append(Control(frame, kind, tuple(values)))

    def anchor(self, frame: int, first_row: int) -> None:
        """The engine re-prefilled prompt + rows `first_row` … `frame` - 1: what came before is needed no more."""
        have = self.rows
        if not have.start <= first_row <= frame <= have.next:
            raise JournalError(f"anchor {frame} from row {first_row} does not fit rows {have.start} … {have.next}")
        self.anchor_frame = frame
        self.rows.drop_before(first_row)

    def to_bytes(self) -> bytes:
        """All that was noted: see actors.journal_bytes."""
        spec = self.spec
        return sealed(
            {
                "session": self.session,
                "voice": spec.voice,
                "role": spec.role,
                "role_tokens": None if spec.role_tokens is None else list(spec.role_tokens),
                "seed": spec.seed,
                "sampling": list(_sampling_values(spec.sampling)),
                "prompt_hash": self.prompt_hash,
                "prompt_frames": self.prompt_frames,
                "numerics_id": self.numerics_id,
                "anchor_frame": self.anchor_frame,
                "excerpt": self.is_excerpt,
                "first_row": self.first_row,
                "rows": self.rows.to_bytes(),
                "pending": self.pending.astype("<i2", copy=False).tobytes(),
                "controls": [[c.frame, c.kind, list(c.values)] for c in self.controls],
                "first_pcm": self.pcm.start,
                "pcm": self.pcm.to_bytes(),
                "first_codes": self.user_codes.start,
                "user_codes": self.user_codes.to_bytes(),
                "agent_codes": self.agent_codes.to_bytes(),
            }
        )

    @staticmethod
    def from_bytes(blob: bytes, receptive_s: float = RECEPTIVE_S) -> Journal:
        """The journal that `to_bytes` wrote. Raises JournalError, and nothing else, whatever the bytes are."""
        fields = Fields(unsealed(blob))
        text_temperature, text_top_k, audio_temperature, audio_top_k = fields.numbers("sampling", 4)
        sampling = Sampling(text_temperature, int(text_top_k), audio_temperature, int(audio_top_k))
        seed, role_tokens = fields.number("seed", MAX_SEED), fields.tokens("role_tokens")
        spec = SessionSpec(fields.text("voice"), fields.text("role"), seed, sampling, role_tokens)
        journal = Journal(fields.text("session"), spec, receptive_s)
        journal.begin(fields.text("prompt_hash"), fields.number("prompt_frames"), fields.text("numerics_id"))
        journal.rows.fill(fields.number("first_row"), fields.blob("rows", ROW_WIDTH, MAX_ROWS))
        journal.pending = fields.blob("pending", ROW_WIDTH, 16)
        journal.pcm.fill(fields.number("first_pcm"), fields.blob("pcm", PCM_WIDTH, MAX_RECEPTIVE_FRAMES))
        first_codes = fields.number("first_codes")
        journal.user_codes.fill(first_codes, fields.blob("user_codes", CODES_WIDTH, MAX_RECEPTIVE_FRAMES))
        journal.agent_codes.fill(first_codes, fields.blob("agent_codes", CODES_WIDTH, MAX_RECEPTIVE_FRAMES))
        journal.anchor_frame = fields.number("anchor_frame")
        journal.is_excerpt = fields.flag("excerpt")
        for frame, kind, values in fields.controls():
            journal.control(frame, kind, values)
        journal._check()
        return journal

    def _check(self) -> None:
        """Whether the parts belong together."""
        n = self.next_frame
        if self.user_codes.next != n or self.agent_codes.next != n:
            raise JournalError(f"a journal of {n} steps came with codes up to frame {self.user_codes.next}")
        if self.heard_frames < n:
            raise JournalError(f"a journal of {n} steps came with only {self.heard_frames} frames of the user")
        if self.is_excerpt:
            return
        if self.pcm.start > n:
            raise JournalError(f"a journal of {n} steps came with the user's frames from {self.pcm.start} on")
        if self.anchor_frame and not self.first_row <= self.anchor_frame <= n:
            raise JournalError(f"an anchor at frame {self.anchor_frame} lies outside rows {self.first_row} … {n}")
        if self.first_row and not self.anchor_frame:
            raise JournalError(f"a journal without an anchor begins at row {self.first_row}, not at 0")


def _sampling_values(s: Sampling) -> tuple[float, int, float, int]:
    return s.text_temperature, s.text_top_k, s.audio_temperature, s.audio_top_k
