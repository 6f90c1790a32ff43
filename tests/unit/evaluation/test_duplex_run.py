"""An evaluation's folder: what it holds, with whom, and what happens when that changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
import pytest

from evaluation.duplex.items import Cue
from evaluation.duplex.recording import RECORDING
from evaluation.duplex.run import (
    RUN,
    EvaluationError,
    Order,
    Server,
    check_judges,
    enter_server,
    judge_all,
    make_items,
    meet_server,
    open_run,
    to_hold,
)
from tests.unit.evaluation.duplex_items import item, turn, write

ORDER = Order("own", "first", 4, 0)
SERVER = Server("http://host", "demo", True, ("NATF0", "NATM0"))


def python(tmp_path: Path, body: str) -> Path:
    """An interpreter that runs `body` whatever it is asked for."""
    path = tmp_path / "env" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


class TestFolder:
    def test_the_same_order_goes_on(self, tmp_path: Path) -> None:
        open_run(tmp_path / "out", ORDER)
        open_run(tmp_path / "out", ORDER)

    def test_more_items_may_be_asked_for(self, tmp_path: Path) -> None:
        open_run(tmp_path, ORDER)
        open_run(tmp_path, Order("own", "first", 9, 0))
        assert json.loads((tmp_path / RUN).read_text())["order"]["items"] == 9

    @pytest.mark.parametrize(
        "other", [Order("own", "wide", 4, 0), Order("own", "first", 4, 1), Order("own", "first", 3, 0)]
    )
    def test_another_order_is_refused(self, tmp_path: Path, other: Order) -> None:
        open_run(tmp_path, ORDER)
        with pytest.raises(EvaluationError, match="another --out"):
            open_run(tmp_path, other)

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        open_run(tmp_path, ORDER)
        enter_server(tmp_path, SERVER)
        enter_server(tmp_path, Server("http://elsewhere", "demo", True, ()))
        with pytest.raises(EvaluationError, match="another --out"):
            enter_server(tmp_path, Server("http://host", "demo", False, ()))

    def test_voices_the_server_lacks_are_named(self, tmp_path: Path) -> None:
        open_run(tmp_path, ORDER)
        write(tmp_path / "items" / "a", item(turn(0, Cue("user", 0.5)), voice="VARF3"))
        with pytest.raises(EvaluationError, match="VARF3"):
            enter_server(tmp_path, SERVER)
        enter_server(tmp_path, Server("http://host", "", None, ()))  # one that does not list its voices

    def test_only_what_has_no_recording_is_held(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write(tmp_path / "items" / name, item(turn(0, Cue("user", 0.5)), name=name))
        (tmp_path / "items" / "a" / RECORDING).write_text("{}")
        assert [folder.name for folder in to_hold(tmp_path)] == ["b"]


def server(models: httpx.Response, voices: httpx.Response | None = None) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers.get("authorization") == "Bearer key"
        return models if request.url.path == "/v1/models" else voices or httpx.Response(200, json={"data": []})

    return httpx.MockTransport(answer)


class TestServer:
    def test_says_who_it_is(self) -> None:
        models = httpx.Response(200, json={"data": [{"id": "demo", "trained": False}]})
        voices = httpx.Response(200, json={"data": [{"id": "NATF0"}, {"id": "NATM0"}]})
        met = meet_server("http://host:1/", "key", server(models, voices))
        assert met == Server("http://host:1", "demo", False, ("NATF0", "NATM0"))

    def test_a_published_one_says_nothing(self) -> None:
        assert meet_server("http://host", "key", server(httpx.Response(404))) == Server("http://host", "", None, ())

    @pytest.mark.parametrize(
        "models", [httpx.Response(401), httpx.Response(200, json={"data": []}), httpx.Response(200, text="<html>")]
    )
    def test_one_that_answers_otherwise_is_not_evaluated(self, models: httpx.Response) -> None:
        with pytest.raises(EvaluationError, match="does not answer as"):
            meet_server("http://host", "key", server(models))

    @pytest.mark.parametrize("url", ["localhost:8998", "ws://host", ""])
    def test_an_address_is_http(self, url: str) -> None:
        with pytest.raises(EvaluationError, match="no server's address"):
            meet_server(url, None)

    def test_nobody_there(self) -> None:
        with pytest.raises(EvaluationError, match="does not answer"):
            meet_server("http://127.0.0.1:1", None)


class TestJudgesEnvironment:
    def test_without_one_the_setup_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match="personaplex train setup"):
            check_judges(tmp_path / "nowhere")

    def test_without_its_packages_as_well(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match="personaplex train setup"):
            check_judges(python(tmp_path, "sys.exit(3)"))

    def test_its_lines_are_progress(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        made: list[str] = []
        maker = python(
            tmp_path, "print(json.dumps({'item': sys.argv[2]})); print('a remark'); print(json.dumps({'item': 'b'}))"
        )
        make_items(tmp_path / "out", ORDER, maker, made.append)
        assert made == ["training.evaluation_items", "b"]
        assert "a remark" in capfd.readouterr().err

    def test_its_failure_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(EvaluationError, match="goes on from here"):
            make_items(tmp_path, ORDER, python(tmp_path, "sys.exit(1)"), lambda _: None)

    def test_nothing_to_judge_starts_nobody(self, tmp_path: Path) -> None:
        judge_all(tmp_path, tmp_path / "nowhere", lambda _: None)
