"""The system prompt as input columns: voice, silence, role text, silence, with a sine on the user's stream.

A *frame* is what was said in 80 ms; a *column* is what the model reads in one step. Streams with a delay of one
put a frame's code into the next column. Priming as published: column 0 is all initial tokens, the first frame is
dropped with its delayed codes, and from then on code k of frame t stands in column t + delay_k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.config import AUDIO_CODEBOOKS, STREAMS, TEXT_PAD, UNGENERATED, LMConfig

Tokens = npt.NDArray[np.int16]

SILENCE_FRAMES = 6  # half a second after the voice and after the role text
AGENT = slice(1, 1 + AUDIO_CODEBOOKS)
USER = slice(1 + AUDIO_CODEBOOKS, STREAMS)


class Voice(Protocol):
    """A voice prompt: either codes [T, 8], or the published form, embeddings [T', dim] and token cache [17, 4]."""

    @property
    def codes(self) -> Tensor | None: ...

    @property
    def embeddings(self) -> Tensor | None: ...

    @property
    def cache(self) -> Tensor | None: ...

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """All columns the model reads before the conversation is live, and what is already known of the next.

    columns: [P, 17] int16, column c is read at position c. The first `len(embeddings)` of them are placeholders
    whose summed input embedding is given instead.
    given: [17] int16, tokens of column P that belong to the last prompt frame; -2 where the model chooses.
    digest: hash of everything that determines the KV cache after the prompt.
    voice_frames: columns from 0 on that any prompt with this voice begins with.
    voice_digest: hash of the embeddings; empty where the columns say it all.
    """

    columns: Tokens
    given: Tokens
    embeddings: Tensor | None
    digest: str
    voice_frames: int = 0
    voice_digest: str = ""

    @property
    def frames(self) -> int:
        return int(self.columns.shape[0])


def _frame(text: int, agent: Sequence[int], user: Sequence[int]) -> list[int]:
    return [text, *agent, *user]


def _initial(config: LMConfig) -> Tokens:
    return np.array([config.text_card] + [config.card] * (STREAMS - 1), dtype=np.int16)


def build_prompt(
    config: LMConfig,
    voice: Voice,
    role_tokens: Sequence[int],
    *,
    silence_codes: Sequence[int],
    sine_codes: Sequence[int],
) -> Prompt:
    """Lays out the published system prompt.

    role_tokens are the ids of the wrapped role text, one a frame; empty for no role.
    Raises ValueError if a token is not in the model's vocabulary or the voice's shape does not fit.
    """
    if config.max_delay != 1:
        raise ValueError(f"this model delays a stream by {config.max_delay} frames; only a delay of one is known")
    silence = _frame(TEXT_PAD, silence_codes, sine_codes)
    frames = [silence] * SILENCE_FRAMES
    frames += [_frame(token, silence_codes, sine_codes) for token in role_tokens]
    frames += [silence] * SILENCE_FRAMES
    if any(not 0 <= token < config.text_card for token in role_tokens):
        raise ValueError("the role's text has tokens this checkpoint does not know: is its tokenizer the right one?")

    delayed = np.array([delay > 0 for delay in config.delays])
    embeddings = voice.embeddings
    if embeddings is not None:
        head, carry = _published_head(config, embeddings, voice.cache, delayed)
    elif voice.codes is not None:
        spoken = [_frame(TEXT_PAD, codes, sine_codes) for codes in voice.codes.tolist()]
        # The first call's frame is dropped whole; its place is the column of initial tokens.
        head, carry = [_initial(config)], _initial(config)
        frames = (spoken + frames)[1:]
    else:
        raise ValueError("a voice prompt holds either codes or embeddings; this one holds neither")

    columns = list(head)
    for frame in np.array(frames, dtype=np.int16):
        columns.append(np.where(delayed, carry, frame))
        carry = frame
    given = np.where(delayed, carry, np.int16(UNGENERATED)).astype(np.int16)
    table = np.stack(columns).astype(np.int16)
    voice_digest = voice.digest if embeddings is not None else ""
    after_voice = len(table) - len(role_tokens) - SILENCE_FRAMES  # where the role, or the second silence, begins
    digest = _digest(table, given, voice_digest)
    return Prompt(table, given, embeddings, digest, voice_frames=after_voice, voice_digest=voice_digest)


def _published_head(
    config: LMConfig, embeddings: Tensor, cache: Tensor | None, delayed: npt.NDArray[np.bool_]
) -> tuple[list[Tokens], Tokens]:
    """Columns 0..T' of a published voice: T' placeholders, then column T' and what is known of T' + 1.

    The published token cache is a ring of four: column c stands at index c % 4.
    """
    count = embeddings.shape[0]
    if embeddings.dim() != 2 or embeddings.shape[1] != config.dim:
        raise ValueError(
            f"the voice's embeddings are {list(embeddings.shape)}, this model reads [frames, {config.dim}]"
        )
    if cache is None or cache.dim() != 2 or cache.shape[0] != STREAMS:
        raise ValueError(f"a voice of the published form carries a token cache of [{STREAMS}, 4]")
    ring = cache.to(torch.int64).numpy()
    length = ring.shape[1]
    complete = ring[:, count % length].astype(np.int16)
    if (complete[:1] < 0).any() or (complete[:1] > config.text_card).any() or (complete[1:] > config.card).any():
        raise ValueError("the voice's token cache holds tokens that this checkpoint does not know")
    carry = np.where(delayed, ring[:, (count + 1) % length], 0).astype(np.int16)
    placeholder = np.full(STREAMS, -1, dtype=np.int16)
    return [placeholder] * count + [complete], carry


def _digest(columns: Tokens, given: Tokens, voice_digest: str) -> str:
    """Sixteen bytes are enough to tell prompts apart, and short enough for every journal."""
    content = hashlib.blake2b(digest_size=16)
    content.update(columns.tobytes())
    content.update(given.tobytes())
    content.update(voice_digest.encode())
    return content.hexdigest()


def next_column(config: LMConfig, pending: Tokens, user_now: Tokens, user_before: Tokens) -> Tokens:
    """The column to read once the user's frame is in.

    pending: [17] with text and agent tokens set; user_now, user_before: [8] codes of this frame and the last.
    """
    column = pending.copy()
    delays = np.array(config.delays[USER])
    column[USER] = np.where(delays > 0, user_before, user_now)
    return column
