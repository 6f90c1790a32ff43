"""The error tree: codes, pickling, the way over the wire."""

from __future__ import annotations

import pickle

import pytest

from actors import errors
from actors.errors import BY_CODE, EngineLost, NoCapacity, ServingError, from_code

EVERY = sorted(BY_CODE.values(), key=lambda cls: cls.code)


@pytest.mark.parametrize("cls", EVERY)
def test_every_error_survives_pickling(cls: type[ServingError]) -> None:
    for error in (cls("What happened."), cls("What happened.", "Do this.")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is cls
        assert (copy.message, copy.next_step, str(copy)) == (error.message, error.next_step, str(error))


def test_codes_are_unique_and_every_class_has_one() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ServingError)]
    assert len({c.code for c in classes}) == len(classes) == len(BY_CODE)


def test_every_error_says_what_to_do_next() -> None:
    for cls in EVERY:
        assert cls("It broke.").next_step.endswith(".")
        assert str(cls("It broke.")).startswith("It broke. ")


def test_a_code_off_the_wire_becomes_its_class_again() -> None:
    assert type(from_code("engine_lost", "gone")) is EngineLost
    assert from_code("engine_lost", "gone", "Call back.").next_step == "Call back."
    assert type(from_code("a_code_of_a_newer_build", "?")) is ServingError


def test_a_class_made_later_takes_over_no_code() -> None:
    class Mixed(NoCapacity):  # what Ray does when it ships an error
        pass

    assert BY_CODE[Mixed.code] is NoCapacity
