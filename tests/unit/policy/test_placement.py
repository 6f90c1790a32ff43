"""Packing: fullest with room first, away from the ingress, deterministic."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.placement import place


@dataclass(frozen=True)
class Spot:
    replica: str
    node: str
    free: int
    admitting: bool = True


SPOTS = st.lists(
    st.builds(
        Spot,
        replica=st.text("abcdef", min_size=1, max_size=4),
        node=st.sampled_from(["n1", "n2", "n3"]),
        free=st.integers(-1, 4),
        admitting=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda spot: spot.replica,
)


def test_fullest_replica_with_room_comes_first() -> None:
    spots = [Spot("a", "n1", 4), Spot("b", "n2", 1), Spot("c", "n3", 0)]
    assert place(spots, "elsewhere") == spots[1]


def test_the_ingress_node_is_taken_only_when_no_other_has_room() -> None:
    near, far = Spot("a", "n1", 1), Spot("b", "n2", 3)
    assert place([near, far], "n1") == far
    assert place([near, Spot("b", "n2", 0)], "n1") == near


def test_nobody_admits() -> None:
    assert place([Spot("a", "n1", 3, admitting=False)], "n2") is None
    assert place([], "n2") is None


@given(SPOTS, st.randoms())
def test_the_choice_has_room_and_does_not_depend_on_the_order(spots: list[Spot], random: object) -> None:
    choice = place(spots, "n1")
    shuffled = list(spots)
    random.shuffle(shuffled)  # type: ignore[attr-defined] # hypothesis gives a random.Random
    assert place(shuffled, "n1") == choice
    able = [spot for spot in spots if spot.free > 0 and spot.admitting]
    assert (choice is None) == (not able)
    if choice is not None:
        assert choice in able
        rivals = [spot for spot in able if (spot.node == "n1") == (choice.node == "n1")]
        assert choice.free == min(spot.free for spot in rivals)
        assert choice.node != "n1" or all(spot.node == "n1" for spot in able)
