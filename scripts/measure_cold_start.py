"""What a replica's cold start consists of, in CPU seconds: a node's replacement as a whole, and each part by itself.

    taskset -c 0,1 .venv/bin/python scripts/measure_cold_start.py node      three fake nodes, one is killed and replaced
    taskset -c 0,1 .venv/bin/python scripts/measure_cold_start.py parts     imports and loading of each, without Ray

`node` watches /proc while a new node joins and a replica, its stages, an ingress and a proxy start on it, with nobody
talking, and adds up what every new process has used under each name that it went by: Ray's workers begin as
setup_worker.py and default_worker.py, are IDLE, and are called after their actor from its constructor on. `parts` runs
fresh interpreters, three times each, and takes the median. docs/decisions/cold-start.md has what became of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadtest.chaos.system import System

_LOOK_S = 0.05
_SETTLE_S = 8.0  # what the start of the whole system has left to do is not the replacement's
_AFTER_S = 5.0  # and what a replacement does when its slots are known is: an ingress may come later
_MISSED_S, _BACK_S = 5.0, 120.0
_LEAST_S = 0.05  # what is worth a line
_TICKS = os.sysconf("SC_CLK_TCK")
_REPEATS = 3

IMPORTS = (
    "numpy",
    "torch",
    "numba",
    "ray",
    "ray.serve",
    "fastapi",
    "opentelemetry.sdk.metrics",
    "serving.ingress",
    "serving.replica_deployment",
    "serving.router_actor",
    "actors.encoder_actor",
    "actors.stage_build",
)
STAGES = ("encoder", "decoder", "engine")


class Watch:
    """CPU seconds of our descendants that were not there when it began, under each name they went by."""

    def __init__(self) -> None:
        self._old = {pid: cpu_s for pid, cpu_s, _ in _processes()}
        self._seen: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self.count: Counter[str] = Counter()
        self.old_s = 0.0

    async def until(self, done: asyncio.Future[None]) -> None:
        while not done.done():
            self.look()
            await asyncio.sleep(_LOOK_S)
        self.look()

    def look(self) -> None:
        """What was used since the last look goes to the name a process had then, or has now if it is new."""
        for pid, cpu_s, name in _processes():
            if pid in self._old:
                self.old_s += cpu_s - self._old[pid]
                self._old[pid] = cpu_s
                continue
            if self._names.get(pid) != name:
                self.count[name] += 1
            self.spent_s[self._names.get(pid, name)] += cpu_s - self._seen.get(pid, 0.0)
            self._seen[pid], self._names[pid] = cpu_s, name


def _processes() -> list[tuple[int, float, str]]:
    """(process, its CPU seconds, name) of all our descendants."""
    from cluster.fake_nodes import family

    found = []
    for process in family([os.getpid()])[1:]:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # gone while we looked
        found.append((process, sum(map(int, fields[11:13])) / _TICKS, _name(command)))
    return found


def _name(command: list[bytes]) -> str:
    """A Python program by its script or module, all others by themselves; Ray's workers by their class."""
    words = [word.decode(errors="replace") for word in command if word]
    if not words:
        return "(ending)"
    if words[0].startswith("ray::"):
        return "ray::" + words[0].split(".")[0].strip().rpartition(":")[2]
    if "python" in Path(words[0]).name:
        for at, word in enumerate(words[1:], 1):
            if word == "-m":
                return f"python -m {words[at + 1]}"
            if not word.startswith("-"):
                return "/".join(Path(word).parts[-2:])
    return Path(words[0]).name


async def replaced_node(nodes: int) -> None:
    """Kills one of the fake nodes, adds another, and tells what its start took."""
    from loadtest.chaos.system import Layout, System

    async with System.running(Layout(nodes=nodes, ingresses=2)) as system:
        await asyncio.sleep(_SETTLE_S)
        # With a replica and an ingress, where one has both: what is measured is the same each time.
        index = max(await system.tell("nodes"), key=_weight)["index"]
        watch, started_s = Watch(), time.monotonic()
        await watch.until(asyncio.create_task(_replace(system, index)))
        took_s = time.monotonic() - started_s
        await watch.until(asyncio.create_task(asyncio.sleep(_AFTER_S)))
    print("| process | times | CPU s |\n|---|---|---|")
    for name, spent_s in sorted(watch.spent_s.items(), key=lambda item: -item[1]):
        if spent_s >= _LEAST_S:
            print(f"| `{name}` | {watch.count[name]} | {spent_s:.2f} |")
    print(f"| all that was new | | {sum(watch.spent_s.values()):.2f} |")
    print(f"| what was there before | | {watch.old_s:.2f} |")
    print(f"\nall slots were there again after {took_s:.1f} s")


def _weight(node: dict[str, Any]) -> int:
    titles = " ".join(node["workers"].values())
    return 2 * ("PersonaPlexReplica" in titles) + (":Ingress" in titles)


async def _replace(system: System, index: int) -> None:
    """Raises RuntimeError if the node's replica does not come back."""
    await system.tell("kill", index=index)
    await system.tell("add")
    for _ in range(int(_MISSED_S / _LOOK_S)):
        if await system.slots() < system.layout.nodes * system.layout.slots:
            break
        await asyncio.sleep(_LOOK_S)
    if not await system.whole(_BACK_S):
        raise RuntimeError(f"the node's replica did not come back within {_BACK_S:g} s")


def parts() -> None:
    """Fresh interpreters: what importing each module takes, and what building each stage does after it."""
    print("| in a fresh interpreter | CPU s |\n|---|---|")
    for module in IMPORTS:
        print(f"| import {module} | {_median_s(f'import {module}'):.2f} |", flush=True)
    for stage in STAGES:
        print(f"| {stage}, all that its actor's constructor does | {_median_s(_constructed(stage)):.2f} |", flush=True)


def _constructed(stage: str) -> str:
    shell = f"{stage.capitalize()}Shell"
    imports = f"from actors.{stage}_actor import {shell}; from actors.stage_config import StageConfig"
    return f"{imports}; begin(); {shell}(StageConfig())"


def _median_s(code: str) -> float:
    """CPU seconds of a fresh interpreter that runs the code, from its last `begin()` on."""
    program = (
        "import time\nzero = time.process_time()\ndef begin():\n    global zero\n    zero = time.process_time()\n"
        f"{code}\nprint(time.process_time() - zero)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return median(
        float(
            subprocess.run(
                [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for _ in range(_REPEATS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("node", "parts"))
    parser.add_argument("--nodes", type=int, default=3, help="fake nodes with a replica each (default 3)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if arguments.what == "parts":
        parts()
    else:
        asyncio.run(replaced_node(arguments.nodes))


if __name__ == "__main__":
    main()
