"""Where words get lost: `python -m training.ladder`. The model's codes in place of real ones, book by book.

Held-out dialogues are shown to the model as they are. Of each frame the first k codes stay, the others are drawn by the
model, which has seen everything before that frame; the codec speaks the result, and Whisper counts word errors against
the dialogue's own text. All eight kept: what codec and Whisper lose. None kept, few errors: the model says its words.
None kept, many errors, and few with two or three: it is these books that it has to learn.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.duplex.judges import Judges
from evaluation.duplex.words import errors, spoken
from models.config import AUDIO_CODEBOOKS, SAMPLE_RATE
from models.demo_checkpoint import TOKENIZER
from models.mimi import Mimi
from models.tokenizer import TextTokenizer
from training.codes import load_codec
from training.folders import state_folder
from training.lm import CONFIG, trained_model
from training.lm_data import EncodedDialogues, Item, Weights, columns_of
from training.lm_forward import depth, heads, temporal

KEPT = (8, 4, 3, 2, 1, 0)
_TOP = 250  # as served


class Ladder:
    """A trained model, its codec and who listens."""

    def __init__(self, lm: Path, codec: Path, data: EncodedDialogues, temperature: float) -> None:
        """Raises FileNotFoundError if there is no model or no codec."""
        self._model, self.step = trained_model(lm)
        self._mimi: Mimi = load_codec(codec)[0]
        self._data, self._temperature = data, temperature
        self._tokenizer, self._judges = TextTokenizer(TOKENIZER), Judges(state_folder() / "packages")
        self._resample: Any = importlib.import_module("soxr").resample
        self._generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def climb(self, item: Item) -> tuple[int, dict[int, int]]:
        """Words of a dialogue, and for each of KEPT how many of them were not understood."""
        data = self._data
        columns, counted = columns_of(CONFIG, item, data.prompts[item.voice][0], data.silence, data.sine, Weights())
        columns = columns[: CONFIG.window - 1]
        first = int(counted.any(axis=1).argmax())
        table = torch.from_numpy(columns.astype(np.int64))
        hidden = temporal(self._model, table[None])[0][first - 1 : len(table) - 1]
        live = table[first:, : 1 + AUDIO_CODEBOOKS]
        said = spoken("".join(self._tokenizer.piece(int(token)) for token in live[:, 0]))
        found = {}
        for kept in KEPT:
            found[kept] = min(errors(said, self._heard(self._drawn(hidden, live, kept))), len(said))
        return len(said), found

    def _drawn(self, hidden: Tensor, live: Tensor, kept: int) -> Tensor:
        """live [frames, 9] with all codes but the first `kept` drawn by the model."""
        tokens = live.clone()
        matrices = heads(self._model)[1]
        for book in range(kept, AUDIO_CODEBOOKS):
            logits = depth(self._model, hidden, tokens, books=book + 1)[book] @ matrices[book].t()
            best, which = logits.topk(min(_TOP, logits.shape[1]))
            chances = (best / self._temperature).softmax(-1)
            tokens[:, 1 + book] = which.gather(1, torch.multinomial(chances, 1, generator=self._generator)).squeeze(1)
        return tokens

    def _heard(self, tokens: Tensor) -> list[str]:
        codes = tokens[:, 1:].clamp(min=0)
        together = torch.cat([codes[:-1, :1], codes[1:, 1:]], dim=1)  # all but the first book come a frame later
        sound = self._mimi.decode_sequence(together[None])[0].numpy()
        low = self._resample(sound, SAMPLE_RATE, 16_000)
        words, _ = self._judges.words(low, self._judges.speech(low))
        return spoken(" ".join(word.text for word in words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=8, help="dialogues")
    parser.add_argument("--side", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--lm", type=Path, default=state_folder() / "lm")
    parser.add_argument("--codec", type=Path, default=state_folder() / "codec")
    parser.add_argument("--codes", type=Path, default=state_folder() / "codes")
    arguments = parser.parse_args()
    os.nice(max(0, 19 - os.nice(0)))
    torch.set_num_threads(1)
    data = EncodedDialogues(arguments.codes, arguments.side)
    ladder = Ladder(arguments.lm, arguments.codec, data, arguments.temperature)
    words, lost = 0, dict.fromkeys(KEPT, 0)
    for number, item in enumerate(data.items[: arguments.count]):
        more, found = ladder.climb(item)
        words += more
        lost = {kept: lost[kept] + found[kept] for kept in KEPT}
        rates = "  ".join(f"{kept} kept {lost[kept] / max(words, 1):.0%}" for kept in KEPT)
        print(f"\r{number + 1}/{arguments.count} dialogues, {words} words, lost with  {rates} ", end="", flush=True)
    print(f"\nstep {ladder.step}, temperature {arguments.temperature}", flush=True)


if __name__ == "__main__":
    main()
