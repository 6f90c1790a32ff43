"""Messages to and from the router between builds: pickled by one, read by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving.routing import Grant, complete


@dataclass(frozen=True, slots=True)
class Older:
    """A Grant before it knew of serials."""

    session: str
    epoch: int
    replica: str
    address: str
    numerics_id: str


@dataclass(frozen=True, slots=True)
class Newer:
    session: str
    epoch: int
    replica: str
    address: str
    numerics_id: str
    serial: int = 0
    node: str = ""
    invented: str = "tomorrow"


def as_grant(message: Any) -> Grant:
    """What a process of this build makes of another build's Grant: pickle sends the class's name and its state."""
    grant = Grant.__new__(Grant)
    grant.__setstate__(message.__getstate__())  # type: ignore[attr-defined] # dataclass makes it
    return complete(grant)


def test_what_an_older_build_did_not_know_gets_its_default() -> None:
    assert as_grant(Older("s", 2, "r", "a", "n")) == Grant("s", 2, "r", "a", "n", serial=0)


def test_what_a_newer_build_knows_more_is_left_out() -> None:
    assert as_grant(Newer("s", 2, "r", "a", "n", 7)) == Grant("s", 2, "r", "a", "n", serial=7)


def test_a_message_of_this_build_is_as_it_was() -> None:
    grant = Grant("s", 2, "r", "a", "n", serial=3)
    assert complete(grant) is grant
