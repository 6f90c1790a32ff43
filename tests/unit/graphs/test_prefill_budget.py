"""How many rows a step takes for prompts, on a clock of the test's own."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from graphs.prefill_budget import LEAST_ROWS, PrefillBudget, share
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from tests.golden import golden_lm, golden_prompt, prefill, random_user


class Machine:
    """Steps of known cost: so much for any, for each live row and for each prefill row."""

    def __init__(self, step_ms: float, live_ms: float, row_ms: float) -> None:
        self.costs = step_ms, live_ms, row_ms
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    def took_ms(self, live: int, prefill: int) -> float:
        step_ms, live_ms, row_ms = self.costs
        return step_ms + live * live_ms + prefill * row_ms


def settled(machine: Machine, live: int, steps: int = 60) -> tuple[PrefillBudget, list[float]]:
    """A budget after `steps` steps on a machine, and what each of them took; every fourth has no prompt waiting."""
    budget, took = PrefillBudget(64), []
    for i in range(steps):
        prefill = 0 if i % 4 == 0 else budget.rows(live)
        took.append(machine.took_ms(live, prefill))
        budget.note(live, prefill, took[-1])
    return budget, took


def test_a_slow_machine_takes_few_rows_and_a_fast_one_a_whole_tile() -> None:
    assert settled(Machine(1, 0.1, 0.01), 4)[0].rows(4) == 64
    slow, _ = settled(Machine(4, 0.5, 0.5), 4)
    assert slow.rows(4) == 16  # 8 ms are theirs, of the 22 that the live rows leave; in fours
    slow, _ = settled(Machine(20, 0.5, 0.5), 4)
    assert slow.rows(4) == 12  # 28 ms less 22 for the live rows
    slow, _ = settled(Machine(4, 0.5, 1.0), 4)
    assert slow.rows(4, left_ms=16.0) == LEAST_ROWS
    assert slow.rows(4, left_ms=19.0) == 12
    assert slow.rows(4, anybody_live=False) == 64, "nobody waits for this step"


@given(step=st.floats(0.1, 15), live_row=st.floats(0.01, 1.0), row=st.floats(0.001, 1.5), live=st.integers(1, 16))
def test_steps_stay_within_their_time_once_measured(step: float, live_row: float, row: float, live: int) -> None:
    machine = Machine(step, live_row, row)
    budget, took = settled(machine, live)
    least = machine.took_ms(live, LEAST_ROWS)  # a prompt always advances, whatever it costs
    assert max(took) <= max(least, budget.step_ms) + 1e-6
    beside = max(took) - machine.took_ms(live, 0)
    assert beside <= max(LEAST_ROWS * row, budget.others_ms) + 1e-6, "live frames do not wait for more than that"


def test_what_stood_behind_other_frames_is_not_taken_for_work() -> None:
    budget, _ = settled(Machine(2, 0.2, 0.25), 4)
    assert budget.rows(0) == 32
    for _ in range(10):
        budget.note(0, 32, 100.0)  # 8 ms of work, in the turns that were left
    assert budget.rows(0) == 32
    for _ in range(20):
        budget.note(0, 32, 4.0)
    assert budget.rows(0) > 48, "but that rows cost less can be seen there"


def test_it_follows_a_machine_that_becomes_slow_and_recovers() -> None:
    budget, _ = settled(Machine(2, 0.2, 0.1), 4)
    assert budget.rows(4) == 64
    busy = Machine(2, 0.2, 1.2)
    for _ in range(4):
        rows = budget.rows(4)
        budget.note(4, rows, busy.took_ms(4, rows))
    assert budget.rows(4) == LEAST_ROWS
    quick = Machine(2, 0.2, 0.1)
    for _ in range(40):
        rows = budget.rows(4)
        budget.note(4, rows, quick.took_ms(4, rows))
    assert budget.rows(4) == 64


def test_before_anything_is_measured_it_is_careful() -> None:
    assert PrefillBudget(64).rows(4) == LEAST_ROWS
    assert PrefillBudget(4).rows(4) == 4
    assert PrefillBudget(64).rows(0, anybody_live=False) == 64


@given(budget=st.integers(0, 100), wanted=st.lists(st.integers(0, 60), max_size=8))
def test_shares_are_even_and_nothing_is_left_over(budget: int, wanted: list[int]) -> None:
    given_rows = share(budget, wanted)
    assert sum(given_rows) == min(budget, sum(wanted))
    assert all(got <= want for got, want in zip(given_rows, wanted, strict=True))
    unmet = [got for got, want in zip(given_rows, wanted, strict=True) if got < want]
    assert all(got + 1 >= max(given_rows) for got in unmet), "who got less than wanted got as much as anybody"


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    assert share(64, [3000, 100, 20]) == [22, 22, 20]
    assert share(3, [10, 10, 10, 10]) == [1, 1, 1, 0]


def test_the_engine_measures_its_steps_and_keeps_to_the_budget() -> None:
    """A step of the engine costs what its rows cost, on the test's clock."""
    machine, dice = Machine(2.0, 0.5, 1.0), random.Random(5)
    budget = PrefillBudget(64, clock=machine.clock)
    engine = SlotEngine(golden_lm(), 4, budget=budget)
    run, took = engine.frame_step.run, []

    def timed(rows, spans, emits, overrides=()):  # type: ignore[no-untyped-def] # FrameStep.run's own arguments
        live = sum(span.count == 1 for span in spans)
        took.append(machine.took_ms(live, len(rows) - live))
        machine.now_s += took[-1] / 1e3
        return run(rows, spans, emits, overrides)

    engine.frame_step.run = timed  # type: ignore[method-assign] # the point of it
    prefill(engine, 0, golden_prompt())
    took.clear()
    for tick in range(60):
        slot = dice.choice([1, 2, 3])
        engine.close(slot)
        engine.open(slot, golden_prompt(), Sampling(), tick)
        engine.step([0], random_user(1, tick))
    assert len(took) == 60
    assert max(took) <= budget.step_ms
    assert sorted(took)[40] > machine.took_ms(1, 0) + 0.9 * budget.others_ms, "and uses what there is"
