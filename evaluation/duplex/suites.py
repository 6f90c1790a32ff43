"""The suites: who makes the items of each, and what is to be reached. A new one is an entry here.

Its maker is a module run as `python -m MODULE OUT --items N --seed N …` in the judges' environment, which writes
`OUT/items/NAME/` as `items.py` has them (fixed user audio is a line whose cue is "user"), and for the judge of voices
`OUT/references/`. Whoever wants answers judged by a language model gives `score` another `FactJudge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.duplex.gates import OWN_GATES, Gate


@dataclass(frozen=True)
class Suite:
    """`about` is a sentence for the report; `plans` are the data sets it can be drawn from, the usual one first."""

    name: str
    about: str
    maker: str
    plans: tuple[str, ...]
    gates: tuple[Gate, ...]


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "own",
            "Held-out dialogues of the demo model's training data, with a scripted user who reacts to the agent.",
            "training.evaluation_items",
            ("first", "wide"),
            OWN_GATES,
        ),
    )
}
