"""What a process that starts costs frames on the same two cores, by its priority: p50, p99 and longest way in ms.

    taskset -c 0,1 .venv/bin/python scripts/measure_newcomers.py [SECONDS]

Four conversations' frames: every 80 ms each passes four processes of its own three times, 2.4 ms of work at each, which
keeps 72 % of both cores busy. Beside them one process computes all the time, as one that imports and compiles does.
Raising frames takes CAP_SYS_NICE. Run it on otherwise idle cores; the table is in docs/decisions/priorities.md.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

FRAME_S = 0.08
CONVERSATIONS, PROCESSES, ROUNDS = 4, 4, 3
WORK_S = 0.0024
PAGES, PAGE_BYTES = 2048, 4096  # the newcomer allocates, too


@dataclass(frozen=True)
class Standing:
    """A thread's place in the queue: Linux' niceness, or a policy that knows none."""

    niceness: int = 0
    policy: str = ""  # SCHED_RR, SCHED_IDLE

    def take(self) -> None:
        """For this process and its children."""
        os.setpriority(os.PRIO_PROCESS, 0, self.niceness)
        if self.policy:
            os.sched_setscheduler(0, getattr(os, self.policy), os.sched_param(int(self.policy == "SCHED_RR")))

    def __str__(self) -> str:
        return self.policy or f"{self.niceness}"


CASES = [(Standing(frames), Standing(newcomer)) for frames in (0, -10) for newcomer in (0, 5, 19)]
CASES += [(Standing(frames), Standing(policy="SCHED_IDLE")) for frames in (0, -10)]
CASES += [(Standing(policy="SCHED_RR"), Standing(newcomer)) for newcomer in (0, 5, 19)]


def work(seconds: float) -> None:
    until_s = time.thread_time() + seconds
    while time.thread_time() < until_s:
        pass


def newcomer() -> None:
    while True:
        work(0.02)
        memory = bytearray(PAGES * PAGE_BYTES)
        memory[::PAGE_BYTES] = b"x" * PAGES


def stage(come: socket.socket, go: socket.socket) -> None:
    while come.recv(1):
        work(WORK_S)
        go.send(b"x")


def child(body: Callable[..., object], *arguments: object) -> int:
    """Starts a process that does nothing else; its id."""
    process = os.fork()
    if not process:
        try:
            body(*arguments)
        finally:
            os._exit(0)
    return process


def conversation(number: int, seconds: float, pipe: int) -> None:
    """The ingress' part of it: writes the way each frame took, in seconds, into `pipe`."""
    links = [socket.socketpair() for _ in range(PROCESSES)]
    stages = [child(stage, links[i][1], links[i + 1][0]) for i in range(PROCESSES - 1)]
    due_s = time.monotonic() + number * FRAME_S / CONVERSATIONS
    until_s = time.monotonic() + seconds
    while due_s < until_s:
        due_s += FRAME_S
        time.sleep(max(0.0, due_s - time.monotonic()))
        for _ in range(ROUNDS):
            links[0][0].send(b"x")
            links[-1][1].recv(1)
            work(WORK_S)
        os.write(pipe, struct.pack("d", time.monotonic() - due_s))
    for each in stages:
        os.kill(each, signal.SIGKILL)
        os.waitpid(each, 0)


def measure(frames: Standing, beside: Standing | None, seconds: float) -> tuple[list[float], float]:
    """Sorted ways in ms, and how much of a core the newcomer got."""
    other = None
    if beside is not None:
        other = child(lambda: (beside.take(), newcomer()))
    read, write = os.pipe()
    talks = [child(lambda i=i: (frames.take(), conversation(i, seconds, write))) for i in range(CONVERSATIONS)]
    os.close(write)
    raw = b""
    while part := os.read(read, 65_536):
        raw += part
    os.close(read)
    for each in talks:
        os.waitpid(each, 0)
    got_s = 0.0
    if other is not None:
        os.kill(other, signal.SIGKILL)
        _, _, usage = os.wait4(other, 0)
        got_s = usage.ru_utime + usage.ru_stime
    return sorted(1e3 * way_s for way_s in struct.unpack(f"{len(raw) // 8}d", raw)), got_s / seconds


def show(frames: Standing, beside: Standing | None, seconds: float) -> None:
    ways, share = measure(frames, beside, seconds)
    p50, p99 = ways[len(ways) // 2], ways[int(len(ways) * 0.99)]
    label = "nobody" if beside is None else str(beside)
    print(f"| {frames} | {label} | {p50:.0f} | {p99:.0f} | {ways[-1]:.0f} | {share:.2f} |", flush=True)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 6.0
    print("| frames | newcomer | p50 ms | p99 ms | longest ms | cores the newcomer got |\n|---|---|---|---|---|---|")
    show(Standing(0), None, seconds)
    for frames, beside in CASES:
        show(frames, beside, seconds)


if __name__ == "__main__":
    main()
