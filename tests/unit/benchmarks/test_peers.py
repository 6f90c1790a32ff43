"""The comparison with peers: whose turn it is, how contexts are filled, what the ratios are of."""

from __future__ import annotations

import time

import torch

from benchmarks.peers import ROUNDS, compare
from models.demo_checkpoint import LM


def test_contexts_are_filled_by_real_steps_and_ratios_are_taken_turn_by_turn() -> None:
    order: list[str] = []

    def step(name: str, seconds: float = 0.0) -> None:
        order.append(name)
        time.sleep(seconds)

    peers = {"slow": lambda: step("slow", 0.004), "quick": lambda: step("quick")}
    rows = list(compare(LM, 3, [5, ROUNDS + 15], peers, lambda: step("ours", 0.001), torch.device("cpu")))
    assert [(row.context_frames, row.peer) for row in rows] == [
        (5, "slow"),
        (5, "quick"),
        (ROUNDS + 15, "slow"),
        (ROUNDS + 15, "quick"),
    ]
    assert rows[0].times_faster > 1.5
    assert rows[1].times_faster < 0.5
    # Filled to 5, measured, which adds ROUNDS, filled on to the second context.
    filling, turns = ["ours"] * 5 + ["slow"] * 5 + ["quick"] * 5, ["ours", "slow", "quick"] * ROUNDS
    further = ["ours"] * 10 + ["slow"] * 10 + ["quick"] * 10
    assert order == filling + turns + further + turns
