"""What the language model understands: `python -m training.comprehension`. Words it hears, and values of its prompt.

Shown what was said so far, the likeliest word is compared with the one that is written: in lessons in listening, and in
a café's answers, where a value (a price, an hour) stands in the prompt. Without the prompt's text, and without its own
voice, which says the same sentence with few values, a value can only be guessed: how well it does so is what it did not
have to understand.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from models.config import NO_INPUT, TEXT_END_OF_PAD, TEXT_PAD
from models.prompt import AGENT
from training.bank import Bank
from training.folders import state_folder
from training.listening import write_listening
from training.lm import CONFIG, trained_model
from training.lm_data import EncodedDialogues, Item, Weights, columns_of
from training.lm_forward import forward
from training.plans import HELD_OUT_DIALOGUES, PLANS, script_of
from training.roles import Split
from training.script import AGENT_VOICES, Script
from training.splice import Codec, load_pieces, said_in, timeline_of
from training.splice import splice as spliced

_FACTS = "cafe"


@dataclass
class Tally:
    right: int = 0
    of: int = 0

    def add(self, hits: npt.NDArray[np.bool_]) -> None:
        self.right += int(hits.sum())
        self.of += len(hits)

    def __str__(self) -> str:
        return f"{self.right / max(1, self.of):5.0%} of {self.of}"


def values_in(text: Sequence[int], values: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """[len(text)]: which tokens are part of one of these values."""
    found = np.zeros(len(text), dtype=np.bool_)
    for value in values:
        for first in range(len(text) - len(value) + 1):
            if list(text[first : first + len(value)]) == list(value):
                found[first : first + len(value)] = True
    return found


class Examiner:
    """A trained model, and what it is asked of."""

    def __init__(self, lm: Path, codes: Path) -> None:
        """Raises FileNotFoundError if there is no model or nothing is encoded."""
        self._model, self.step = trained_model(lm)
        self._codec: Codec = load_pieces(codes, state_folder() / "codec")
        self._data = EncodedDialogues(codes, "held_out")
        self._bank = Bank()

    @torch.no_grad()
    def words(self, script: Script, seed: int, *, blind: bool = False) -> tuple[list[int], npt.NDArray[np.bool_]]:
        """The tokens of what is written, and which of them the model would write.

        blind: without the prompt's text and its own voice.
        """
        frames, _ = spliced(script, timeline_of(script, self._bank.load, seed), self._codec, seed)
        encode = self._codec.tokenizer.encode_role
        item = Item(frames, np.array(encode(script.prompt), dtype=np.int16), AGENT_VOICES.index(script.agent_voice))
        data = self._data
        columns, counted = columns_of(CONFIG, item, data.prompts[item.voice][0], data.silence, data.sine, Weights())
        columns = columns[: CONFIG.window - 1].astype(np.int64)
        first = int(counted.any(axis=1).argmax())
        shown = columns.copy()
        if blind:
            shown[:first, 0], shown[first:, AGENT] = TEXT_PAD, NO_INPUT
        table = torch.from_numpy(shown)[None]
        text = forward(self._model, table, torch.arange(first - 1, len(columns) - 1)).text
        text[:, [TEXT_PAD, TEXT_END_OF_PAD]] = float("-inf")  # when to write is another question
        written = ~np.isin(columns[first:, 0], [TEXT_PAD, TEXT_END_OF_PAD])
        tokens = columns[first:, 0][written]
        return tokens.tolist(), text.argmax(-1).numpy()[written] == tokens

    def lessons(self, split: Split, count: int) -> Iterator[Script]:
        """What the users of one side of `first` say, to be written down."""
        plan = PLANS["first"]
        for number in range(count):
            yield write_listening(
                PLANS["listening"],
                number,
                lambda rng: (script_of(plan, split, int(rng.integers(40))), False),
                self._bank.has,
            )

    def dialogues(self, split: Split, count: int) -> Iterator[Script]:
        """Dialogues of one side of `first` that have facts."""
        found = 0
        for number in range(HELD_OUT_DIALOGUES):
            script = script_of(PLANS["first"], split, number)
            if found < count and script.role == _FACTS and all(map(self._codec.pieces.complete, said_in(script))):
                found += 1
                yield script

    def values(self, script: Script) -> list[list[int]]:
        """What the prompt tells, as tokens."""
        encode = self._codec.tokenizer.encode
        every = [value for fact in script.facts for value in fact.expected]
        return [[token for word in value.split() for token in encode(word)] for value in every]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12, help="lessons and dialogues of each side")
    parser.add_argument("--lm", type=Path, default=state_folder() / "lm")
    parser.add_argument("--codes", type=Path, default=state_folder() / "codes")
    arguments = parser.parse_args()
    os.nice(max(0, 19 - os.nice(0)))
    torch.set_num_threads(1)
    examiner = Examiner(arguments.lm, arguments.codes)
    print(f"step {examiner.step}: tokens that are the model's likeliest, where a word is written", flush=True)
    sides: tuple[Split, ...] = ("train", "held_out")
    for split in sides:
        heard, others, values, guessed = Tally(), Tally(), Tally(), Tally()
        for lesson in examiner.lessons(split, arguments.count):
            heard.add(examiner.words(lesson, PLANS["listening"].seed)[1])
        for script in examiner.dialogues(split, arguments.count):
            tokens, hits = examiner.words(script, PLANS["first"].seed)
            told = values_in(tokens, examiner.values(script))
            values.add(hits[told])
            others.add(hits[~told])
            guessed.add(examiner.words(script, PLANS["first"].seed, blind=True)[1][told])
        print(f"{split:8}  heard {heard}   answers {others}   values {values}   guessed {guessed}", flush=True)


if __name__ == "__main__":
    main()
