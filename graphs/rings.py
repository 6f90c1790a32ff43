"""The rings of an engine's cache that are free, and prompts' beginnings that are copied into those just taken."""

from __future__ import annotations

from graphs.anchors import AnchorPolicy
from graphs.conversation import Conversation, Fill
from graphs.kv_cache import KVCache
from graphs.prefix_cache import PrefixCache


class Rings:
    """Lends the rings of one cache."""

    def __init__(self, cache: KVCache, count: int, prefixes: PrefixCache) -> None:
        self._cache = cache
        self._prefixes = prefixes
        self._free = list(range(count))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, prefer: int = -1) -> int:
        """A free ring. Raises IndexError if there is none: slots and spares are counted so that there is."""
        ring = prefer if prefer in self._free else self._free[-1]
        self._free.remove(ring)
        return ring

    def let_go(self, ring: int) -> None:
        """What it holds is not wanted any more."""
        self._cache.release(ring)
        self._free.append(ring)

    def begin(self, talk: Conversation, first_row: int, prefer: int = -1) -> Fill:
        """Takes a free ring for a conversation's next anchor, with as much of the prompt in it as is known."""
        fill = Fill(self.take(prefer), first_row)
        self.restore_prompt(talk, fill)
        return fill

    def restore_prompt(self, talk: Conversation, fill: Fill) -> None:
        """Copies what is known of a conversation's prompt into an empty ring."""
        fill.filled = self._prefixes.restore(self._cache, fill.ring, talk.prompt, talk.owners)

    def keep_prompt(self, talk: Conversation) -> None:
        """Remembers a prompt that has just been computed, unless the ring has lost its beginning already."""
        if talk.fill.filled <= self._cache.capacity:
            self._prefixes.keep(self._cache, talk.fill.ring, talk.prompt, talk.owners)


def spare_rings(slots: int, anchors: AnchorPolicy | None) -> int:
    """Rings beside the slots' own, for anchors being prepared."""
    return 0 if anchors is None else 1 + slots // 16
