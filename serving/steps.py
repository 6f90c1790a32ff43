"""How long the steps of a conversation's way to another home took: one line of the log."""

from __future__ import annotations

from actors.interfaces import Clock


class Steps:
    """When each step of an attempt was done, in seconds after its beginning: for the log."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.now()
        self._done: list[str] = []

    def done(self, what: str) -> None:
        self._done.append(f"{what} {self._clock.now() - self._began_s:.2f}")

    def __str__(self) -> str:
        return ", ".join(self._done) or "nothing"
