"""What Serve's two proxies cost a WebSocket message: round trip in ms, CPU of everything behind the socket.

    .venv/bin/python scripts/measure_proxy.py [SECONDS]

An echo deployment behind each proxy in turn; N clients send 400 bytes (80 ms of Opus) every 80 ms. The CPU of all of
Ray's processes is counted, less what they use when nobody talks. Run it on an idle machine; the table is in
docs/decisions/http-proxy.md.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from websockets.asyncio.client import connect

from serving.haproxy import bundled_haproxy, free_port, haproxy_environment

FRAME_S = 0.08
MESSAGE = bytes(400)
IDLE_S = 5.0

SERVER = """
import sys
import ray
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from ray import serve
from ray.serve.config import HTTPOptions

app = FastAPI()

@app.websocket("/")
async def echo(socket: WebSocket) -> None:
    await socket.accept()
    try:
        while True:
            await socket.send_bytes(await socket.receive_bytes())
    except WebSocketDisconnect:
        return

@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
@serve.ingress(app)
class Echo:
    pass

ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[1])))
serve.run(Echo.bind(), name="echo")
print("up", flush=True)
sys.stdin.read()
serve.delete("echo")
ray.shutdown()
"""


def family(root: int) -> list[int]:
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


def cpu_s(root: int) -> float:
    used = 0.0
    for process in family(root):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


async def talk(address: str, clients: int, seconds: float) -> list[float]:
    """Round trips of all clients, in ms."""
    trips: list[float] = []

    async def one(index: int) -> None:
        async with connect(address, proxy=None, compression=None) as socket:
            start_s = time.perf_counter() + FRAME_S * index / clients
            for frame in range(int(seconds / FRAME_S)):
                await asyncio.sleep(start_s + frame * FRAME_S - time.perf_counter())
                sent_s = time.perf_counter()
                await socket.send(MESSAGE)
                await socket.recv()
                trips.append((time.perf_counter() - sent_s) * 1000)

    await asyncio.gather(*(one(index) for index in range(clients)))
    return trips


def measure(proxy: str, seconds: float) -> None:
    port = free_port()
    environment = os.environ | {"RAY_worker_niceness": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
    with tempfile.TemporaryDirectory(prefix="proxy-") as folder:
        binary = bundled_haproxy()
        if proxy == "haproxy" and binary is not None:
            environment |= haproxy_environment(Path(folder), binary)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        with server.stdin, server.stdout:
            server.stdout.readline()
            time.sleep(2)
            before_s = cpu_s(server.pid)
            time.sleep(IDLE_S)
            idle = (cpu_s(server.pid) - before_s) / IDLE_S
            for clients in (1, 4, 16):
                before_s, start_s = cpu_s(server.pid), time.perf_counter()
                trips = asyncio.run(talk(f"ws://127.0.0.1:{port}", clients, seconds))
                wall_s = time.perf_counter() - start_s
                core = (cpu_s(server.pid) - before_s) / wall_s - idle
                p50, p99 = np.percentile(trips, [50, 99])
                cost_ms = core * wall_s * 1000 / len(trips)
                print(f"{proxy:<9}{clients:>8}{p50:>8.2f}{p99:>8.2f}{core * 100:>11.0f} %{cost_ms:>9.2f}", flush=True)
            server.stdin.close()
            server.wait()


if __name__ == "__main__":
    print(f"{'proxy':<9}{'clients':>8}{'p50 ms':>8}{'p99 ms':>8}{'of a core':>13}{'ms/msg':>9}")
    for each in ("python", "haproxy"):
        measure(each, float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
