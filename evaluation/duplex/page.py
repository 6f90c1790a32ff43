"""The report as one HTML file: gates, then every conversation with its timeline, the worst first.

Styles, script and pictures are inside; only the recordings lie beside it, in the items' folders.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

from evaluation.duplex.gates import Result
from evaluation.duplex.recording import CONVERSATION
from evaluation.duplex.report import MEASURES, Judged, Report, tally
from evaluation.duplex.score import Event
from evaluation.duplex.timeline_svg import MEANS, SIGNS, overview, timeline

_HERE = Path(__file__).parent

_GLOSSARY = (
    ("word errors", "Whisper's words of the agent's voice against the agent's own text stream: words changed, lost and "
     "added, over words in the text."),
    ("takes its turn", "After a user's turn the agent begins between 0.5 s before its end and 1 s after it, and goes "
     "on. Who has been speaking all along has not taken a turn, and a murmur (below 1 s, three words at most, all of "
     "them murmurs like “uh huh”) is none."),
    ("falls silent", "The agent's voice ends within 600 ms of the interruption's first sound, and does not begin again "
     "over it. An agent that never spoke has missed it; one that had just ended by itself makes it void."),
    ("facts", "The words heard between a question and the user's next turn contain what the role's prompt says. Void "
     "where the prompt has no answer, or the user broke into it."),
    ("pauses", "No turn of the agent's sounds while the user pauses inside a turn, nor begins up to 200 ms after. "
     "Anything below 1 s and of three words at most is listening along."),
    ("voice", "The agent's voice is nearer to the recording its voice prompt was made of than to any other's. With "
     "less than 2 s of speech it is missed."),
)  # fmt: skip


def page(report: Report) -> str:
    """The whole file."""
    css, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = f"{report.model}: {len(report.judged)} conversations"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>
{css}</style></head><body><main>
{_heading(report)}
<h2>Gates and goals</h2>
<div class="card wide">{_gates(report)}</div>
<h2>Conversations, the worst first</h2>
{"".join(_conversation(entry) for entry in report.judged) or '<p class="faint">None has been judged yet.</p>'}
{_not_held(report)}
</main><script>
{script}</script></body></html>
"""


def _heading(report: Report) -> str:
    missed = f"{len(report.gates_missed)} of {report.gate_count} gates missed"
    verdict = missed if report.gates_missed else "all gates met"
    seconds = sum(entry.dialogue.seconds for entry in report.judged)
    lines = [
        f"<h1>{escape(report.model)}: {verdict}</h1>",
        f'<p class="faint">{escape(report.suite.about)} {len(report.judged)} conversations, {seconds / 60:.1f} min, '
        f"{report.made:%Y-%m-%d %H:%M} UTC. Judges: {escape('; '.join(report.judges.values()) or 'none yet')}.</p>",
    ]
    if report.trained is False:
        lines.append(
            '<p class="warn">This checkpoint has random weights: it cannot speak. The figures below are what an agent '
            "gets that babbles, and say nothing of a trained one.</p>"
        )
    elif report.notice:
        lines.append(f'<p class="warn">{escape(report.notice)}</p>')
    if report.not_held:
        lines.append(
            f'<p class="warn">{len(report.not_held)} conversations are missing; they are listed at the end, and the '
            "figures are of the others.</p>"
        )
    return "\n".join(lines)


def _gates(report: Report) -> str:
    head = (
        "<tr><th></th><th class=number>found</th><th></th><th class=number>wanted</th><th class=number>n</th>"
        "<th class=number>void</th><th class=number>median delay</th><th></th></tr>"
    )
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _GLOSSARY)
    return (
        f"<table>{head}{''.join(_gate(result) for result in report.results)}</table>"
        '<p class="faint">A gate has to be met, a goal is to be reached. The grey band is the 95 % interval of a share '
        "of so few occasions, the upright line what is wanted. Void: nothing could be measured.</p>"
        f"<details><summary>What is counted</summary><dl>{meanings}</dl></details>"
    )


def _gate(result: Result) -> str:
    state = "met" if result.passed else "missed"
    found = "no figure" if result.share is None else f"{result.share:.0%}"
    delay = "" if result.median_delay_s is None else f"{result.median_delay_s * 1e3:.0f} ms"
    sign = "≤" if result.gate.measure is None else "≥"
    occasions = f"{result.n} words" if result.gate.measure is None else str(result.n)
    return (
        f'<tr><td>{escape(result.gate.name)}</td><td class="number big {state}">{found}</td><td>{_range(result)}</td>'
        f'<td class="number">{sign} {result.gate.limit:.0%}</td><td class="number">{occasions}</td>'
        f'<td class="number">{result.void}</td><td class="number">{delay}</td>'
        f'<td><span class="chip {state}">{SIGNS[state]} {result.gate.tier} {state}</span></td></tr>'
    )


def _range(result: Result) -> str:
    """A share on a scale from nothing to all, with its interval and its limit."""
    if result.share is None:
        return ""
    state = "met" if result.passed else "missed"
    at = [150 * min(1.0, value) for value in (result.share, result.gate.limit, *(result.interval or (0.0, 0.0)))]
    spread = f'<rect class="spread" x="{at[2]:.1f}" y="5" width="{at[3] - at[2]:.1f}" height="6"/>'
    return (
        '<svg class="range" viewBox="0 0 150 16" aria-hidden="true"><rect class="track" y="5" width="150" height="6" '
        f'rx="3"/>{spread if result.interval else ""}<circle class="{state}" cx="{min(145, max(5, at[0])):.1f}" cy="8" '
        f'r="5"/><line class="limit" x1="{at[1]:.1f}" x2="{at[1]:.1f}" y1="1" y2="15"/></svg>'
    )


def _conversation(entry: Judged) -> str:
    item, dialogue = entry.item, entry.dialogue
    sound = f"items/{quote(item.name)}/{CONVERSATION}"
    stalled_s = sum(stall.seconds for stall in dialogue.stalls)
    stalled = f", {stalled_s:.0f} s of it stalled" if stalled_s else ""
    errors = f"{entry.score.word_errors} word errors in {entry.score.words_said}"
    # y of the lanes as in the picture.
    return f"""<article class="card conversation" id="{escape(item.name)}">
<div class="head"><h3>{escape(item.name)}</h3>
<span class="faint">{escape(item.role)}, voice {escape(item.voice)}, {dialogue.seconds:.0f} s{stalled}, {errors}</span>
{"".join(_chips(entry))}</div>
{overview(dialogue, entry.score)}
<div class="rows"><div class="lanes"><span style="top:65px">user</span><span style="top:118px">agent</span></div>
<div class="scroll">{timeline(dialogue, entry.score, entry.loudness)}</div></div>
<audio controls preload="none" src="{sound}"></audio>
<details><summary>What was scored, and the words</summary>
<div class="wide"><table class="events">{"".join(_event(event) for event in _missed_first(entry))}</table></div>
<dl>{"".join(_definitions(entry))}</dl></details>
</article>
"""


def _chips(entry: Judged) -> Iterable[str]:
    for measure in MEASURES:
        counts = tally(entry.score, measure)
        n = counts["met"] + counts["missed"]
        if n:
            state = "missed" if counts["missed"] else "met"
            yield f'<span class="chip {state}">{SIGNS[state]} {measure} {counts["met"]}/{n}</span>'


def _missed_first(entry: Judged) -> list[Event]:
    return sorted(entry.score.events, key=lambda event: (("missed", "void", "met").index(event.outcome), event.at_s))


def _event(event: Event) -> str:
    at = "" if event.measure == "voice" else f"{event.at_s:.1f} s"
    return (
        f'<tr><td class="{event.outcome}">{SIGNS[event.outcome]}</td><td>{MEANS[event.measure]}</td>'
        f'<td class="number">{at}</td><td>{escape(event.why)}</td></tr>'
    )


def _definitions(entry: Judged) -> Iterable[str]:
    dialogue = entry.dialogue
    heard = " ".join(word.text for word in dialogue.words)
    for name, text in (
        ("the role's prompt", entry.item.prompt),
        ("the agent's own text", dialogue.text.strip()),
        ("heard of its voice", heard),
        ("left out, its cue never came", "; ".join(f"{line.text} ({line.why})" for line in dialogue.unspoken)),
    ):
        yield f"<dt>{name}</dt><dd>{escape(text) or '–'}</dd>"


def _not_held(report: Report) -> str:
    if not report.not_held:
        return ""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(why)}</td></tr>" for name, why in report.not_held)
    return f'<h2>Not judged</h2><div class="card wide"><table class="events">{rows}</table></div>'
