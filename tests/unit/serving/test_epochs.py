"""Epochs under an adversary: no (session, epoch) is given to two homes or two owners, and no old one is listened to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.epoch_world import LEASE_S, EpochMachine

TestEpochMachine = EpochMachine.TestCase
TestEpochMachine.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.full
@pytest.mark.timeout(1800)
class TestEpochMachineForLong(EpochMachine.TestCase):  # type: ignore[misc, valid-type] # hypothesis makes it
    settings = settings(
        max_examples=5000, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )


# ---- what the machine found, each as short as it can be told -----------------------------------------------------


@pytest.fixture
def world() -> Iterator[EpochMachine]:
    machine = EpochMachine()
    machine.begin()
    yield machine
    machine.teardown()


def test_a_new_router_repeats_no_epoch_of_a_move_that_came_to_nothing(world: EpochMachine) -> None:
    world.caller_comes("i1")
    world.begins_to_move(0)
    world.ends_its_move(0, gives_up=True)
    world.router_dies()
    world.time_passes(LEASE_S)  # its home alone is reported
    world.begins_to_move(0)
    assert world.talks[0].next is not None


def test_two_routers_repeat_no_epoch_of_resumes_that_did_not_arrive(world: EpochMachine) -> None:
    world.caller_comes("i1")
    world.network_changes(loses=False, keeps=True)
    for ingress in ("i1", "i2"):
        world.router_dies()
        world.time_passes(2.0)
        world.is_resumed(0, ingress, again=False)  # under an epoch that its replica hears of only at the end
    assert len(world.talks) == 3


def test_a_session_that_was_forgotten_is_not_begun_again_at_an_epoch_it_had(world: EpochMachine) -> None:
    world.caller_comes("i1")
    world.is_resumed(0, "i2", again=False)
    world.hangs_up(1)
    world.time_passes(3 * LEASE_S)
    world.is_recovered(0, unreachable=True)  # its former ingress has not heard of any of that
    assert world.talks[0].home is not None


def test_a_token_that_comes_twice_at_once_to_one_ingress_makes_two_epochs(world: EpochMachine) -> None:
    world.caller_comes("i1")
    world.network_changes(loses=False, keeps=True)
    world.is_resumed(0, "i1", again=False)
    world.is_resumed(0, "i1", again=False)
    homes = [talk.home for talk in world.talks]
    assert [home.epoch for home in homes if home is not None] == [1, 2, 3]


def test_what_a_replaced_conversation_asked_for_is_forgotten_without_its_successors_slot(world: EpochMachine) -> None:
    world.caller_comes("i1")
    former = world.talks[0]
    world.is_resumed(0, "i1", again=False)
    world.time_passes(0.5)
    former.holding._forget()  # it was waiting for a second slot when its client came back, to the same ingress
    world.time_passes(0.5)
    lease = world.router._leases.get(former.holding.session)
    assert lease is not None
    assert lease.epoch == 2
