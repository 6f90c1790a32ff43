"""Keys and values of prompts' beginnings, kept so that the next conversation with the same voice need not compute them.

A snapshot is found by a hash of the exact columns it was computed from, and by its owner: "" for what everybody may
know (the published voices), else the tenant who brought it. So the time to ready tells nobody what others use.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from graphs.kv_cache import KVCache, KVPart
from models.prompt import Prompt

DEFAULT_LIMIT_BYTES = 256 << 20  # on the 7B shape 512 frames, on the demo shape tens of thousands


@dataclass(frozen=True)
class PrefixOwners:
    """Whose the two parts of a prompt are: "" is everybody's, None is not to be kept. The default shares voices, which
    come with the checkpoint, and keeps no roles."""

    voice: str | None = ""
    role: str | None = None


class PrefixKey(NamedTuple):
    owner: str
    digest: str
    frames: int


class PrefixCache:
    """Least recently used snapshots go first. Holds what it copies, on the cache's device; a limit of 0 keeps none."""

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._parts: OrderedDict[PrefixKey, KVPart] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parts)

    def restore(self, cache: KVCache, ring: int, prompt: Prompt, owners: PrefixOwners) -> int:
        """Copies the longest known beginning of `prompt` into a ring; returns its frames, 0 if none is known."""
        for key in reversed(prefix_keys(prompt, owners)):
            part = self._parts.get(key)
            if part is not None:
                self._parts.move_to_end(key)
                cache.write(ring, part)
                self.hits += 1
                return key.frames
        self.misses += 1
        return 0

    def keep(self, cache: KVCache, ring: int, prompt: Prompt, owners: PrefixOwners) -> None:
        """Takes what is missing of a prompt's beginnings from a ring that holds all of the prompt from position 0."""
        for key in prefix_keys(prompt, owners):
            if key in self._parts:
                self._parts.move_to_end(key)
                continue
            if cache.bytes_of(key.frames) > self.limit_bytes:
                continue
            part = cache.read(ring, key.frames)
            self._parts[key] = part
            self.bytes += part.bytes
            while self.bytes > self.limit_bytes:
                _, oldest = self._parts.popitem(last=False)
                self.bytes -= oldest.bytes

    def forget(self, owner: str) -> None:
        """Drops all that a tenant brought."""
        for key in [key for key in self._parts if key.owner == owner]:
            self.bytes -= self._parts.pop(key).bytes


def prefix_keys(prompt: Prompt, owners: PrefixOwners) -> list[PrefixKey]:
    """The beginnings of a prompt worth keeping, shortest first: its voice; and voice and role, all but the last column,
    which has to be run for what is drawn after it."""
    wanted = [(owners.voice, min(prompt.voice_frames, prompt.frames - 1)), (owners.role, prompt.frames - 1)]
    return [
        PrefixKey(owner, _digest(prompt, frames), frames)
        for owner, frames in wanted
        if owner is not None and frames > 0
    ]


def _digest(prompt: Prompt, frames: int) -> str:
    content = hashlib.blake2b(digest_size=16)
    content.update(prompt.columns[:frames].tobytes())
    content.update(prompt.voice_digest.encode())  # of embeddings, whose columns are placeholders
    return content.hexdigest()
