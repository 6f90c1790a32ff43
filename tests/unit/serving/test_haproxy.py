"""The wrapper around HAProxy, tried on Ray's own template: a new Ray that writes it otherwise fails here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from serving.haproxy import bundled_haproxy, haproxy_environment


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
