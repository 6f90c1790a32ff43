"""`python -m loadtest.density`: how many calls one ingress carries behind each of Serve's two proxies.

    python -m loadtest.density
    python -m loadtest.density --proxy haproxy --sessions 16 32 64 --seconds 20

A server with a checkpoint so small that its replica costs little, so that what is measured is proxy, ingress and Opus.
Calls are added, step by step, until p99 of the frame gap passes 120 ms: the beat and half of it again. The CPU of proxy
and ingress is that of their processes (Linux: /proc), by the frame that was heard; 80 ms divided by it is how many
calls one core of it carries. Everything, the callers included, runs on this machine: run it when nothing else does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.server import CLI, served

GAP_MS = 120.0
FRAME_MS = 80.0
SESSIONS = (8, 16, 32, 48, 64, 96)
PROXIES = ("python", "haproxy")
# What a process calls itself, for the parts that every byte of a call passes.
_PARTS = {
    "proxy": re.compile(r"ray::(ProxyActor|HAProxyManager)|\S*/haproxy "),
    "ingress": re.compile(r"ray::ServeReplica:\w+:Ingress"),
}


@dataclass(frozen=True)
class Step:
    """One run of the load runner, and what it cost: `cpu_ms` is CPU time by the frame heard, by part."""

    proxy: str
    report: Mapping[str, Any]
    cpu_ms: Mapping[str, float]

    @property
    def in_time(self) -> bool:
        """Whether its callers heard no more than half a beat too much, once in a hundred, and all were held."""
        gap = self.report["frame_gap_ms"]
        return gap is not None and gap["p99"] <= GAP_MS and not self.report["refusals"] and not self.report["closes"]

    @property
    def calls_per_core(self) -> float:
        spent_ms = sum(self.cpu_ms.values())
        return FRAME_MS / spent_ms if spent_ms else float("inf")

    def __str__(self) -> str:
        report = self.report
        gap, reply = report["frame_gap_ms"] or {}, report["spread"]["reply_ms"] or {}
        gaps = "".join(f"{gap.get(name, float('nan')):>8.1f}" for name in ("p50", "p95", "p99", "max"))
        costs = "".join(f"{self.cpu_ms[part]:>9.2f}" for part in _PARTS)
        doubt = "" if report["valid"] else "  invalid: the generator was late"
        failed = {**report["refusals"], **report["closes"]}
        return (
            f"{self.proxy:<9}{report['sessions']:>5}{gaps}{reply.get('p50', float('nan')):>8.1f}"
            f"{report['underruns']:>10}{costs}{self.calls_per_core:>12.0f}"
            f"{doubt}{f'  refused or closed: {failed}' if failed else ''}"
        )


HEADER = (
    "proxy    calls gap p50     p95     p99     max   reply underruns    proxy  ingress   calls/core\n"
    "                  (ms)                         p50 ms            (CPU ms a frame)"
)


def part_of(command: str) -> str | None:
    """Which part of the way a process is, by its command line."""
    return next((part for part, pattern in _PARTS.items() if pattern.match(command)), None)


def cpu_s(root: int) -> dict[str, float]:
    """CPU seconds that the parts below this process have used so far."""
    used = dict.fromkeys(_PARTS, 0.0)
    for process in _family(root):
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        part = part_of(command)
        if part is not None:
            used[part] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _family(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [root]
    while left:
        process = left.pop()
        found.append(process)
        left += children.get(process, [])
    return found


def measure(proxy: str, url: str, process: int, sessions: int, seconds: float) -> Step:
    """One run of the load runner against a server."""
    before = cpu_s(process)
    command = [*CLI, "loadtest", url, "--sessions", str(sessions), "--seconds", str(seconds), "--ramp", "2", "--json"]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    report = json.loads(said)
    frames = max(1, report["frames"])
    return Step(proxy, report, {part: (s - before[part]) * 1e3 / frames for part, s in cpu_s(process).items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m loadtest.density"
    )
    parser.add_argument("--proxy", choices=PROXIES, nargs="+", default=PROXIES)
    parser.add_argument("--sessions", type=int, nargs="+", default=SESSIONS, help="calls at once, step by step")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long they talk in each step")
    arguments = parser.parse_args()
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="density-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        subprocess.run([sys.executable, "-m", "models.demo_checkpoint", str(checkpoint), "--tiny"], check=True)
        for proxy in arguments.proxy:
            settings = {
                "proxy": proxy,
                "checkpoint": checkpoint,
                "device": "cpu",
                "slots": max(arguments.sessions),
                "admission_wait_s": 10,  # all dial within seconds, and prompts are read one after the other
            }
            with served(settings) as server:
                for sessions in sorted(arguments.sessions):
                    step = measure(proxy, server.url, server.process, sessions, arguments.seconds)
                    print(step, flush=True)
                    if not step.in_time:
                        break


if __name__ == "__main__":
    main()
