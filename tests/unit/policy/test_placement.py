"""Packing: fullest with room first, away from the ingress, deterministic; and what is kept free of new callers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.placement import PlacementIndex, Spot, reserve


def spot(
    replica: str, node: str = "n1", free: int = 1, room: int | None = None, slots: int = 4, admitting: bool = True
) -> Spot:
    return Spot(replica, node, slots, free, free if room is None else room, admitting)


def index_of(*spots: Spot) -> PlacementIndex:
    index = PlacementIndex()
    for each in spots:
        index.put(each)
    return index


@st.composite
def spots(draw: st.DrawFn) -> Spot:
    free = draw(st.integers(-1, 4))
    return Spot(
        replica=draw(st.text("abcdef", min_size=1, max_size=2)),
        node=draw(st.sampled_from(["n1", "n2", "n3"])),
        slots=draw(st.integers(1, 4)),
        free=free,
        room=draw(st.integers(-1, max(-1, free))),
        admitting=draw(st.booleans()),
    )


def test_fullest_replica_with_room_comes_first() -> None:
    index = index_of(spot("a", free=4), spot("b", "n2", free=1), spot("c", "n3", free=0))
    assert index.place("elsewhere") == spot("b", "n2", free=1)


def test_the_ingress_node_is_taken_only_when_no_other_has_room() -> None:
    near, far = spot("a", "n1", free=1), spot("b", "n2", free=3)
    assert index_of(near, far).place("n1") == far
    assert index_of(near, spot("b", "n2", free=0)).place("n1") == near


def test_nobody_admits() -> None:
    assert index_of(spot("a", admitting=False)).place("n2") is None
    assert index_of().place("n2") is None


def test_a_replica_to_avoid_is_never_taken() -> None:
    assert index_of(spot("a"), spot("b", free=2)).place("n2", ("a",)) == spot("b", free=2)
    assert index_of(spot("a")).place("n2", ("a",)) is None


def test_a_replica_that_would_rather_not_takes_no_new_caller_but_one_that_lost_its_own() -> None:
    index = index_of(spot("a", free=2, room=0))
    assert index.place("n2") is None
    assert index.place_again("n2", (), lambda _: True) == spot("a", free=2, room=0)
    index.put(spot("b", free=4))
    assert index.place_again("n2", (), lambda _: True) == spot("b", free=4)


def test_who_lives_goes_only_where_it_can_be_rebuilt_now_and_a_suspect_where_it_harms_least() -> None:
    index = index_of(spot("a", free=1), spot("b", free=2), spot("c", free=3))
    assert index.place_again("n2", (), lambda replica: replica != "a") == spot("b", free=2)
    assert index.place_again("n2", (), lambda _: True, emptiest=True) == spot("c", free=3)
    assert index.place_again("n2", (), lambda _: False) is None


def test_the_reserve_is_the_largest_replica_where_there_is_more_than_one_and_room_for_the_stranded() -> None:
    one = index_of(spot("a", slots=4))
    assert reserve(None, one, stranded=0) == 0
    two = index_of(spot("a", slots=4), spot("b", slots=8))
    assert reserve(None, two, stranded=0) == 8
    assert reserve(2, two, stranded=3) == 5
    assert reserve(None, index_of(spot("a"), spot("b", slots=8, admitting=False)), stranded=3) == 3


@given(st.lists(spots(), max_size=20), st.lists(st.text("abcdef", min_size=1, max_size=2), max_size=4))
def test_the_index_says_after_any_changes_what_a_look_at_all_replicas_says(
    changes: list[Spot], gone: list[str]
) -> None:
    index = index_of(*changes)
    for replica in gone:
        index.drop(replica)
    left = {each.replica: each for each in changes if each.replica not in gone}
    admitting = [each for each in left.values() if each.admitting]
    assert index.free == sum(max(0, each.free) for each in admitting)
    assert (index.admitting, index.largest) == (len(admitting), max((each.slots for each in admitting), default=0))
    able = [each for each in admitting if each.room > 0]
    choice = index.place("n1", ("a",))
    assert choice == min(
        (each for each in able if each.replica != "a"),
        key=lambda each: (each.node == "n1", each.room, each.replica),
        default=None,
    )
