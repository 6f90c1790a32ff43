"""`personaplex drain` and `personaplex replicas`, against a server that answers as the admin routes do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serving.cli.main import app


def replica(name: str, node: str, host: str, busy: int = 0, **changed: Any) -> dict[str, Any]:
    return {
        "replica": name, "node": node, "address": f"ws://{host}:7000", "slots": 4, "busy": busy, "arriving": 0,
        "free": 4 - busy, "admitting": True, "draining": False, "heard_ms": 1.0, "numerics_id": "n", **changed,
    }  # fmt: skip


class Server:
    """Two nodes, three replicas; one conversation leaves a draining replica each time somebody looks."""

    def __init__(self) -> None:
        self.replicas = [
            replica("abc1", "aaaa1111", "10.0.0.1", busy=2),
            replica("abd2", "aaaa1111", "10.0.0.1"),
            replica("xyz3", "bbbb2222", "10.0.0.2", busy=1, admitting=False),
        ]
        self.stuck = False
        self.keys: list[str | None] = []
        self.url = ""

    def look(self) -> list[dict[str, Any]]:
        for each in self.replicas:
            if each["draining"] and each["busy"] and not self.stuck:
                each["busy"] -= 1
        return self.replicas

    def drain(self, name: str) -> tuple[int, dict[str, Any]]:
        for each in self.replicas:
            if each["replica"] == name:
                each["draining"], each["admitting"] = True, False
                return 202, {"replica": name, "status": "draining"}
        return 404, {"error": {"message": f"There is no replica {name}."}}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.keys.append(self.headers.get("Authorization"))
            if state.keys[-1] == "Bearer wrong":
                self.answer(401, {"error": {"message": "Use one of a tenant with admin."}})
            else:
                self.answer(200, {"object": "list", "data": state.look()})

        def do_POST(self) -> None:
            self.answer(*state.drain(self.path.split("/")[-2]))

        def answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_table_says_who_holds_what(server: Server) -> None:
    lines = run("replicas", "--server", server.url).stdout.splitlines()
    assert lines[0].split() == ["replica", "node", "host", "state", "slots", "busy", "arriving", "free"]
    assert lines[1].split() == ["abc1", "aaaa1111", "10.0.0.1", "ready", "4", "2", "0", "2"]
    assert "not admitting" in lines[3]


def test_json_is_one_object_a_line(server: Server) -> None:
    printed = [json.loads(line) for line in run("replicas", "--json", "--server", server.url).stdout.splitlines()]
    assert [each["name"] for each in printed] == ["abc1", "abd2", "xyz3"]


def test_a_replica_is_drained_by_as_much_of_its_name_as_is_unique(server: Server) -> None:
    result = run("drain", "x", "--server", server.url)
    assert result.exit_code == 0, result.output
    assert [each["draining"] for each in server.replicas] == [False, False, True]


@pytest.mark.parametrize("node", ["10.0.0.1", "aaaa"])
def test_a_node_is_drained_by_its_address_or_its_id_and_waited_for(server: Server, node: str) -> None:
    result = run("drain", "--all-on", node, "--wait", "--server", server.url)
    assert result.exit_code == 0, result.output
    assert [each["draining"] for each in server.replicas] == [True, True, False]
    assert server.replicas[0]["busy"] == 0
    assert "empty after" in result.stderr


def test_what_cannot_move_in_time_is_an_exit_status_and_a_sentence(server: Server) -> None:
    server.stuck = True
    result = run("drain", "abc1", "--wait", "--within", "0.3", "--server", server.url)
    assert result.exit_code == 1
    assert "2 conversations are still on abc1" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["drain"], "say what to drain"),
        (["drain", "abc1", "--all-on", "10.0.0.1"], "say what to drain"),
        (["drain", "ab"], "abc1, abd2"),
        (["drain", "nobody"], "There are: abc1"),
        (["drain", "--all-on", "10.9.9.9"], "no replica on 10.9.9.9"),
    ],
)
def test_what_was_asked_wrongly_is_said_in_one_sentence(server: Server, arguments: list[str], says: str) -> None:
    result = run(*arguments, "--server", server.url)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert not any(each["draining"] for each in server.replicas)


def test_the_key_travels_and_a_refusal_is_told(server: Server) -> None:
    result = run("replicas", "--server", server.url, "--key", "wrong")
    assert (result.exit_code, server.keys) == (1, ["Bearer wrong"])
    assert "Use one of a tenant with admin." in result.stderr


def test_nobody_there() -> None:
    result = run("replicas", "--server", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "--server URL" in result.stderr
