"""The report of an evaluation: its numbers as JSON, and one page that shows them."""

from __future__ import annotations

import asyncio
import json
import os
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from evaluation.duplex.dialogue import Span, Word
from evaluation.duplex.items import Cue, Item, Line, write_json
from evaluation.duplex.page import page
from evaluation.duplex.recording import CONVERSATION, RECORDING, Recording
from evaluation.duplex.report import REPORT_HTML, REPORT_JSON, loudness, read_report, write_report
from evaluation.duplex.run import FAILURE, Order, open_run
from evaluation.duplex.user import FRAME_SAMPLES, RATE, Spoken
from evaluation.duplex.verdicts import ABOUT_REFERENCES, JUDGED, REFERENCES, Verdict
from tests.browser import find_chromium, open_page
from tests.unit.evaluation.duplex_items import item, piece, tone, turn, write

NOW = datetime(2026, 11, 23, 9, 30, tzinfo=UTC)
LINES = (
    turn(0, Cue("user", 1.0), answer=True, asks=True, expected=("four fifty",)),
    Line("interruption", Cue("agent_speaks", 1.0), (piece(1, "wait <now>"),)),
)


def hold(out: Path, made: Item, *, yields: bool, price: str) -> None:
    """A held and judged conversation: a question to 1.9 s, an answer from 2.2 s, an interruption at 4.02 s."""
    folder = write(out / "items" / made.name, made)
    sound = np.zeros((10 * RATE, 2), dtype=np.float32)
    sound[2 * RATE : 4 * RATE, 1] = tone(2 * RATE)
    soundfile.write(folder / CONVERSATION, sound, RATE, subtype="PCM_16")
    spoken = (Spoken(0, "said", 1.0), Spoken(1, "said", 4.0))
    words = tuple(Word(text, 2.2 + 0.3 * n, 2.5 + 0.3 * n) for n, text in enumerate(f"it is {price}".split()))
    text = ((2.2, " it"), (2.5, " is"), (2.8, " four fifty"))
    metadata = {"lm_model_file": "personaplex-demo", "trained": True}
    write_json(folder / RECORDING, Recording(spoken, text, 10.0, 0.12, (), metadata).to_json())
    speech = (Span(2.2, 4.3 if yields else 8.0),)
    verdict = Verdict({"words": "a judge"}, speech, words, 0, {"NATF0": 0.9, "NATM0": 0.5})
    write_json(folder / JUDGED, verdict.to_json())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Three items: a good conversation, a bad one, and one that could not be held."""
    folder = tmp_path / "out"
    open_run(folder, Order("own", "first", 3, 0))
    (folder / REFERENCES).mkdir()
    write_json(folder / REFERENCES / ABOUT_REFERENCES, {"models": "personaplex-demo"})
    hold(folder, item(*LINES, name="a-good"), yields=True, price="four fifty")
    hold(folder, item(*LINES, name="b-bad"), yields=False, price="three fifty")
    write(folder / "items" / "c-lost", item(*LINES, name="c-lost"))
    write_json(folder / "items" / "c-lost" / FAILURE, {"why": "the server closed the connection"})
    return folder


class TestNumbers:
    def test_of_all(self, out: Path) -> None:
        report = read_report(out, NOW)
        shares = {result.gate.measure: (result.share, result.n) for result in report.results}
        assert shares == {
            None: (pytest.approx(1 / 8), 8),
            "turns": (1.0, 2),
            "yields": (0.5, 2),
            "facts": (0.5, 2),
            "pauses": (None, 0),
            "voice": (1.0, 2),
        }
        assert [result.gate.measure for result in report.gates_missed] == ["yields"]

    def test_the_worst_comes_first_and_nothing_is_dropped(self, out: Path) -> None:
        report = read_report(out, NOW)
        assert [entry.item.name for entry in report.judged] == ["b-bad", "a-good"]
        assert report.not_held == (("c-lost", "the server closed the connection"),)
        assert not report.complete

    def test_json_has_every_item(self, out: Path) -> None:
        write_report(out, read_report(out, NOW))
        raw = json.loads((out / REPORT_JSON).read_text(encoding="utf-8"))
        assert raw["passed"] is False
        assert raw["made"] == "2026-11-23T09:30:00+00:00"
        assert raw["not_held"] == [{"name": "c-lost", "why": "the server closed the connection"}]
        bad = raw["items"][0]
        assert bad["counts"]["yields"] == {"met": 0, "missed": 1, "void": 0}
        assert (bad["word_errors"], bad["words_said"]) == (1, 4)
        [event] = [event for event in bad["events"] if event["measure"] == "yields"]
        assert (event["at_s"], event["delay_s"]) == (pytest.approx(4.02), pytest.approx(3.98))

    def test_a_conversation_held_again_is_not_judged_by_the_old_verdict(self, out: Path) -> None:
        recording = out / "items" / "a-good" / RECORDING
        later_ns = (out / "items" / "a-good" / JUDGED).stat().st_mtime_ns + 1_000_000_000
        os.utime(recording, ns=(later_ns, later_ns))
        assert [entry.item.name for entry in read_report(out, NOW).judged] == ["b-bad"]

    def test_voices_of_another_model_are_not_compared(self, out: Path) -> None:
        write_json(out / REFERENCES / ABOUT_REFERENCES, {"models": "somebody-else"})
        voice = read_report(out, NOW).results[-1]
        assert (voice.n, voice.void) == (0, 2)

    def test_judges_of_two_kinds_are_both_named(self, out: Path) -> None:
        path = out / "items" / "a-good" / JUDGED
        raw = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**raw, "judges": {"words": "another judge"}})
        assert read_report(out, NOW).judges == {"words": "a judge and another judge"}

    def test_with_nothing_judged_nothing_is_passed(self, tmp_path: Path) -> None:
        open_run(tmp_path, Order("own", "first", 3, 0))
        report = read_report(tmp_path, NOW)
        assert len(report.gates_missed) == 3
        assert "None has been judged yet" in page(report)

    def test_loudness_is_the_agents(self, tmp_path: Path) -> None:
        sound = np.zeros((2 * FRAME_SAMPLES, 2), dtype=np.float32)
        sound[:FRAME_SAMPLES, 1] = 0.1  # -20 dB
        sound[:, 0] = 0.9
        soundfile.write(tmp_path / "a.flac", sound, RATE, subtype="PCM_16")
        assert loudness(tmp_path / "a.flac") == (pytest.approx(0.67), 0.0)


class Tags(HTMLParser):
    """Notices what is opened and not closed, and every address."""

    VOID = frozenset(("meta", "line", "rect", "circle", "polygon", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


class TestPage:
    @pytest.fixture
    def html(self, out: Path) -> str:
        return page(read_report(out, NOW))

    def test_is_whole_and_asks_for_the_recordings_alone(self, html: str, out: Path) -> None:
        tags = Tags()
        tags.feed(html)
        assert tags.open == []
        assert tags.addresses == ["items/b-bad/conversation.flac", "items/a-good/conversation.flac"]
        assert all((out / address).is_file() for address in tags.addresses)
        assert "http" not in html
        assert "@import" not in html

    def test_what_was_said_is_escaped(self, html: str) -> None:
        assert "wait &lt;now&gt;" in html
        assert "<now>" not in html

    def test_pictures_are_svg_with_a_mark_for_each_occasion(self, html: str) -> None:
        pictures = re.findall(r'<svg class="timeline" .*?</svg>', html)
        assert len(pictures) == 2
        bad, good = (ElementTree.fromstring(picture) for picture in pictures)
        marks = [[mark.get("class") for mark in picture.iter("g")] for picture in (bad, good)]
        assert marks == [["mark met", "mark missed", "mark missed"], ["mark met"] * 3]
        assert sum(shape.get("class") == "user turn" for shape in bad.iter("rect")) == 1
        assert sum(shape.get("class") == "user interruption" for shape in bad.iter("rect")) == 1

    def test_says_what_is_missing(self, html: str) -> None:
        assert "1 conversations are missing" in html
        assert "the server closed the connection" in html

    def test_untrained_weights_are_named(self, out: Path) -> None:
        raw = json.loads((out / "items" / "b-bad" / RECORDING).read_text(encoding="utf-8"))
        raw["metadata"]["trained"] = False
        write_json(out / "items" / "b-bad" / RECORDING, raw)
        os.utime(out / "items" / "b-bad" / JUDGED)
        assert "random weights" in page(read_report(out, NOW))


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine (PERSONAPLEX_CHROMIUM names one)")
async def test_a_browser_shows_it_and_a_click_plays_from_there(out: Path) -> None:
    write_report(out, read_report(out, NOW))
    chromium = find_chromium()
    assert chromium is not None
    async with asyncio.timeout(60), open_page(chromium, out / "none.wav") as tab:
        await tab.look(width=1100, height=900)
        await tab.open((out / REPORT_HTML).resolve().as_uri())
        assert await tab.run("document.querySelectorAll('.conversation').length") == 2
        await tab.run(
            """(() => { const svg = document.querySelector('.scroll svg'), box = svg.getBoundingClientRect();
            const place = {clientX: box.left + 10 + 64 * 3, clientY: box.top + 60};
            svg.dispatchEvent(new MouseEvent('click', place)); })()"""
        )
        await tab.until("Math.abs(document.querySelector('audio').currentTime - 3) < 1.5")
        await tab.until("Number(document.querySelector('.playhead').getAttribute('x1')) > 10 + 64 * 2.9")
        assert tab.complaints == []
