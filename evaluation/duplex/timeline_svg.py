"""One conversation as a picture: both speakers' bars, words, and a mark for every occasion that was scored. SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from evaluation.duplex.dialogue import Dialogue, UserTurn
from evaluation.duplex.score import TAKES_WITHIN_S, YIELDS_WITHIN_S, Event, Score, stretches
from evaluation.duplex.user import FRAME_S

PIXELS_PER_S = 64.0
SIGNS = {"met": "✓", "missed": "✗", "void": "–"}

_LEFT = 10.0  # so that a mark at second 0 is whole
_AXIS, _USER_TEXT, _USER, _MARKS, _AGENT, _WORDS = 14.0, 40.0, 66.0, 104.0, 118.0, 156.0  # y, px
_BAR, _WORD_ROW, _WORD_ROWS, _TEXT_ROW = 22.0, 14.0, 3, 13.0
_LETTER = 6.0  # of a word, on average
HEIGHT = _WORDS + _WORD_ROWS * _WORD_ROW


def timeline(dialogue: Dialogue, score: Score, loudness: Sequence[float] = ()) -> str:
    """Everything of one conversation on a scale of seconds. Colours are the page's.

    loudness: the agent's channel, a value from 0 to 1 each FRAME_S, drawn behind its bars: what sounds and is no speech
    is seen, too.
    """
    width = _x(dialogue.seconds) + _LEFT
    shapes = [
        *_axis(dialogue.seconds),
        *(_rect(*span, 18, HEIGHT - 18, "stall", "the line stalled: not measured") for span in dialogue.stalls),
        *(shape for event in score.events for shape in _window(event)),
        *_user(dialogue.turns),
        _envelope(loudness),
        *_agent(dialogue),
        *(shape for event in score.events for shape in _mark(event)),
        f'<line class="playhead" x1="{_LEFT}" x2="{_LEFT}" y1="0" y2="{HEIGHT:.0f}"/>',
    ]
    return (
        f'<svg class="timeline" width="{width:.0f}" height="{HEIGHT:.0f}" viewBox="0 0 {width:.0f} {HEIGHT:.0f}" '
        f'data-left="{_LEFT:g}" data-scale="{PIXELS_PER_S:g}" role="img" '
        f'aria-label="timeline of user and agent, {dialogue.seconds:.0f} seconds">{"".join(shapes)}</svg>'
    )


def _x(at_s: float) -> float:
    return _LEFT + at_s * PIXELS_PER_S


def _axis(seconds: float) -> Iterable[str]:
    for second in range(int(seconds) + 1):
        x, long = _x(second), second % 5 == 0
        yield f'<line class="tick{" long" if long else ""}" x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{HEIGHT:.0f}"/>'
        if long:
            yield f'<text class="axis" x="{x + 3:.1f}" y="{_AXIS}">{second} s</text>'


def _window(event: Event) -> Iterable[str]:
    """The time in which something had to happen, behind the agent's bars."""
    seconds = {"turns": TAKES_WITHIN_S, "yields": YIELDS_WITHIN_S}.get(event.measure)
    if seconds is not None and event.outcome != "void":
        yield _rect(event.at_s, event.at_s + seconds, _AGENT - 6, _BAR + 12, f"window {event.outcome}", "")


def _user(turns: Sequence[UserTurn]) -> Iterable[str]:
    for number, turn in enumerate(turns):
        for pause in turn.pauses:
            yield _rect(pause.start_s, pause.end_s, _USER + 4, _BAR - 8, "pause", f"pause of {pause.seconds:.1f} s")
        for span in turn.spans:
            yield _rect(span.start_s, span.end_s, _USER, _BAR, f"user {turn.kind}", f"{turn.kind}: {turn.text}")
        # Two rows in turn: a short line's text is longer than its bar.
        y = _USER_TEXT + (number % 2) * _TEXT_ROW
        yield f'<text class="said" x="{_x(turn.start_s):.1f}" y="{y:.0f}">{escape(turn.text)}</text>'


def _agent(dialogue: Dialogue) -> Iterable[str]:
    for stretch in stretches(dialogue.speech, dialogue.words):
        kind = "murmur" if stretch.murmur else "turn"
        title = f"{kind}, {stretch.start_s:.2f} to {stretch.end_s:.2f} s"
        yield _rect(stretch.start_s, stretch.end_s, _AGENT, _BAR, f"agent {kind}", title)
    free = [0.0] * _WORD_ROWS  # where each row ends
    for word in dialogue.words:
        x = _x(word.start_s)
        row = next((row for row, end in enumerate(free) if end <= x), free.index(min(free)))
        free[row] = x + (len(word.text) + 1) * _LETTER
        y = _WORDS + row * _WORD_ROW
        yield f'<text class="word" x="{x:.1f}" y="{y:.0f}">{escape(word.text)}</text>'


def _envelope(loudness: Sequence[float]) -> str:
    middle, half = _AGENT + _BAR / 2, _BAR / 2 - 2
    upper = [f"{_x((n + 0.5) * FRAME_S):.1f},{middle - half * value:.1f}" for n, value in enumerate(loudness)]
    lower = [f"{_x((n + 0.5) * FRAME_S):.1f},{middle + half * value:.1f}" for n, value in enumerate(loudness)]
    return f'<polygon class="sound" points="{" ".join([*upper, *reversed(lower)])}"/>' if loudness else ""


def overview(dialogue: Dialogue, score: Score) -> str:
    """The whole conversation in the width there is: who speaks when, and a line where something was missed."""
    bars = [
        f'<rect class="user {turn.kind}" x="{span.start_s:.2f}" y="2" width="{span.seconds:.2f}" height="9"/>'
        for turn in dialogue.turns
        for span in turn.spans
    ]
    bars += [
        f'<rect class="agent" x="{span.start_s:.2f}" y="15" width="{span.seconds:.2f}" height="9"/>'
        for span in dialogue.speech
    ]
    bars += [
        f'<line class="missed" x1="{event.at_s:.2f}" x2="{event.at_s:.2f}" y1="0" y2="26"/>'
        for event in score.events
        if event.outcome == "missed" and event.measure != "voice"
    ]
    return (
        f'<svg class="timeline overview" viewBox="0 0 {max(1.0, dialogue.seconds):.2f} 26" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(bars)}</svg>'
    )


def _mark(event: Event) -> Iterable[str]:
    if event.measure == "voice":  # of the whole conversation, not of a moment
        return
    # Question and turn end are the same moment: a fact's mark stands a little to the right.
    x = _x(event.at_s) + (15 if event.measure == "facts" else 0)
    shape = (
        f'<rect x="{x - 6.5:.1f}" y="{_MARKS - 6.5}" width="13" height="13" rx="2"/>'
        if event.measure in ("facts", "pauses")
        else f'<circle cx="{x:.1f}" cy="{_MARKS}" r="6.5"/>'
    )
    yield (
        f'<g class="mark {event.outcome}">{shape}<text x="{x:.1f}" y="{_MARKS + 3.5}">{SIGNS[event.outcome]}</text>'
        f"<title>{escape(MEANS[event.measure])} at {event.at_s:.2f} s: {escape(event.why)}</title></g>"
    )


MEANS = {
    "turns": "taking its turn",
    "yields": "interruption",
    "pauses": "pause",
    "facts": "fact",
    "voice": "voice",
}


def _rect(start_s: float, end_s: float, y: float, height: float, kind: str, title: str) -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    width = max(1.5, (end_s - start_s) * PIXELS_PER_S)
    return (
        f'<rect class="{kind}" x="{_x(start_s):.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3">'
        f"{inside}</rect>"
    )
