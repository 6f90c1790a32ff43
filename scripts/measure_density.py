"""How many conversations one ingress carries behind each of Serve's two proxies: the callers' frame gaps say.

    .venv/bin/python scripts/measure_density.py [SECONDS]

A server with a checkpoint so small that its replica costs next to nothing, so that what is measured is proxy, ingress
and codec; calls are added until p99 of the frame gap passes 120 ms, the beat and half of it again. Everything, the
callers included, runs on this machine: run it when nothing else does. The table is in docs/decisions/http-proxy.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.real_server import serve
from tests.small_checkpoint import write_small_checkpoint

GAP_MS = 120.0
SESSIONS = (8, 16, 24, 32, 40, 48, 64, 80, 96)
SLOTS = max(SESSIONS)
LOADTEST = (sys.executable, "-m", "serving.cli.main", "loadtest")


def measure(proxy: str, checkpoint: Path, seconds: str) -> None:
    with serve(proxy=proxy, checkpoint=checkpoint, device="cpu", slots=SLOTS, admission_wait_s=5) as url:
        for sessions in SESSIONS:
            command = [*LOADTEST, url, "--sessions", str(sessions), "--seconds", seconds, "--ramp", "2", "--json"]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            report = json.loads(said)
            gap, reply = report["frame_gap_ms"], report["spread"]["reply_ms"]
            print(
                f"{proxy:<9}{sessions:>9}{gap['p50']:>9.1f}{gap['p95']:>7.1f}{gap['p99']:>7.1f}{gap['max']:>8.1f}"
                f"{reply['p50']:>9.1f}{reply['p99']:>7.1f}{report['underruns']:>10}{report['generator_lag_ms']:>7.1f}"
                f"  {'' if report['valid'] else 'invalid: the generator was late'}",
                flush=True,
            )
            if gap["p99"] > GAP_MS:
                return


def main() -> None:
    seconds = sys.argv[1] if len(sys.argv) > 1 else "10"
    print("proxy     sessions  gap p50    p95    p99     max  reply p50   p99 underruns    lag")
    with tempfile.TemporaryDirectory(prefix="density-") as folder:
        checkpoint = write_small_checkpoint(Path(folder))
        for proxy in ("python", "haproxy"):
            measure(proxy, checkpoint, seconds)


if __name__ == "__main__":
    main()
