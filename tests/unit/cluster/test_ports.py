"""Ports that nobody else is given before whoever asked for one listens on it."""

from __future__ import annotations

import random
import socket

import pytest

from cluster.ports import free_port


def test_it_is_free_and_none_that_connections_or_workers_are_given() -> None:
    for _ in range(20):
        port = free_port()
        assert 20_000 <= port < 32_768
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_one_that_somebody_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        taken = somebody.getsockname()[1]
        monkeypatch.setattr(random, "sample", lambda _ports, _many: [taken, free])
        assert free_port() == free
        monkeypatch.setattr(random, "sample", lambda _ports, _many: [taken])
        with pytest.raises(OSError, match="no port of"):
            free_port()


def test_a_host_that_is_not_this_machine_is_said_at_once() -> None:
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")  # RFC 5737: nobody's
