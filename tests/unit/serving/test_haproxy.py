"""The wrapper around HAProxy, tried on Ray's own template: a new Ray that writes it otherwise fails here."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serving.haproxy import bundled_haproxy, haproxy_environment, health_environment, node_environment
from serving.settings import ServeSettings


@pytest.fixture
def configured(tmp_path: Path) -> str:
    """Ray's template after the wrapper has been at it."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    template = Path(spec.origin).parent / "serve" / "_private" / "haproxy_templates.py"
    text = template.read_text().split('HAPROXY_CONFIG_TEMPLATE = """')[1].split('"""')[0]
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(text)
    haproxy_environment(tmp_path, Path("/bin/echo"))
    run = subprocess.run(
        [tmp_path / "haproxy", "-db", "-f", configuration, "-dR"], check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == ["-db", "-f", str(configuration), "-dR"]  # it hands everything on
    return configuration.read_text()


def test_nothing_but_the_frontend_is_reachable_from_elsewhere(configured: str) -> None:
    binds = re.findall(r"^ *bind (\S+)", configured, re.MULTILINE)
    assert len(binds) >= 3
    public = [bind for bind in binds if not bind.startswith("127.0.0.1:")]
    assert all("frontend_host" in bind or bind == "{{" for bind in public), public


def test_the_control_socket_is_ours_alone_and_queries_are_not_logged(configured: str) -> None:
    assert "mode 600 level admin" in configured
    assert "mode 666" not in configured
    assert not re.search(r"^ *log .* local0", configured, re.MULTILINE)


def test_the_kernel_buffers_little_for_a_client_that_does_not_read(configured: str) -> None:
    global_section = configured.split("defaults")[0]
    assert "tune.sndbuf.client 32768" in global_section
    assert "tune.rcvbuf.server 32768" in global_section


def test_a_dead_ingress_is_not_dialled_for_long(configured: str) -> None:
    """Nor is the next one waited for: HAProxy pauses for as long as a connection may take, up to a second."""
    clocks = re.findall(r"timeout connect (\S+)", configured)
    assert len(clocks) >= 3
    assert {clock.removesuffix("{%") for clock in clocks} == {"300ms"}, clocks


@pytest.mark.skipif(sys.platform != "linux", reason="only there are the priorities that it is given")
def test_it_goes_as_first_as_a_process_that_carries_frames(tmp_path: Path) -> None:
    say = "import os; print((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)))"
    (tmp_path / "say").write_text(f"#!{sys.executable}\n{say}\n")
    (tmp_path / "say").chmod(0o700)
    haproxy_environment(tmp_path, tmp_path / "say")
    (tmp_path / "haproxy.cfg").touch()
    command = [tmp_path / "haproxy", "-f", tmp_path / "haproxy.cfg"]
    ours = [sys.executable, "-c", f"from actors.promptly import promptly; promptly(); {say}"]
    told = [subprocess.run(each, check=True, capture_output=True, text=True).stdout for each in (command, ours)]
    assert told[0] == told[1]


def test_no_clock_of_haproxy_cuts_a_healthy_call_within_an_hour(configured: str, tmp_path: Path) -> None:
    """All clocks that there are in the template are known here, and those that can end an open WebSocket are an hour
    or more, or off, under the environment that we give Ray."""
    clocks = set(re.findall(r"^ *(?:{% if .*? %})?timeout ([a-z-]+)", configured, re.MULTILINE))
    harmless = {"connect", "http-request", "http-keep-alive", "queue"}  # over before the WebSocket is open
    assert clocks <= harmless | {"client", "server", "tunnel"}
    code = """
from ray.serve._private.haproxy import BackendConfig, HAProxyConfig
fields = lambda cls: {name: field.default for name, field in cls.__dataclass_fields__.items()}
config, backend = fields(HAProxyConfig), fields(BackendConfig)
print([config["timeout_client_s"], config["timeout_server_s"], config["hard_stop_after_s"],
       backend["timeout_client_s"], backend["timeout_server_s"], backend["timeout_tunnel_s"]])
"""
    environment = os.environ | haproxy_environment(tmp_path, Path("/bin/echo"))
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    seconds = ast.literal_eval(run.stdout)
    assert len(seconds) == 6
    assert all(each is None or each >= 3600 for each in seconds), seconds


def test_a_dead_proxy_is_noticed_within_seconds() -> None:
    code = """
from ray.serve._private import constants
print(constants.PROXY_HEALTH_CHECK_PERIOD_S * constants.PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD)
"""
    environment = os.environ | health_environment()
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert float(run.stdout) <= 3.0


@pytest.mark.skipif(bundled_haproxy() is None, reason="ray[serve] brings HAProxy on Linux alone")
def test_two_servers_on_a_machine_share_no_path_and_no_port(tmp_path: Path) -> None:
    binary = bundled_haproxy()
    assert binary is not None
    environments = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        environments.append(haproxy_environment(tmp_path / name, binary))
    for name in environments[0]:
        if name.endswith(("_LOC", "_PATH", "_BASE", "_FILE", "_PORT")):
            assert environments[0][name] != environments[1][name], name


@pytest.mark.skipif(bundled_haproxy() is None, reason="ray[serve] brings no HAProxy for this platform")
def test_a_nodes_environment_can_be_had_on_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "proxies"
    run = subprocess.run(
        [sys.executable, "-m", "serving.haproxy", str(folder)], check=True, capture_output=True, text=True
    )
    said = dict(line.split("=", 1) for line in run.stdout.splitlines())
    assert said["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert said.items() >= node_environment(ServeSettings()).items()  # so that `deploy` need not give it to each worker
    assert said["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(folder.resolve() / "haproxy")
    assert os.access(folder / "haproxy", os.X_OK)
    assert folder.stat().st_mode & 0o077 == 0  # its control socket is nobody else's
