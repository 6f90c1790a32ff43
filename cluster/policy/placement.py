"""Which replica a conversation goes to: pack, so that whole GPUs empty out, and keep away from the ingress."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What placement wants to know of a replica. `free` counts slots that nobody holds or may still hold."""

    @property
    def replica(self) -> str: ...

    @property
    def node(self) -> str: ...

    @property
    def free(self) -> int: ...

    @property
    def admitting(self) -> bool: ...


C = TypeVar("C", bound=Candidate)


def place(candidates: Iterable[C], avoid_node: str) -> C | None:
    """The replica that a new conversation should live on, or None when no slot is free.

    The fullest replica with room comes first: idle ones then stay idle and can be given back. A replica on
    `avoid_node` (the ingress's, whose journal must not die together with the slot) is taken only when no
    other node has room. Ties go to the smaller replica name, so equal states place equally.
    """
    best: C | None = None
    best_key: tuple[bool, int, str] | None = None
    for candidate in candidates:
        free = candidate.free
        if free <= 0 or not candidate.admitting:
            continue
        key = (candidate.node == avoid_node, free, candidate.replica)
        if best_key is None or key < best_key:
            best, best_key = candidate, key
    return best
