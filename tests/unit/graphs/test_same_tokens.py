"""In each mode by itself, at default temperatures: same seed, same tokens.

Whatever the neighbours, the slot and the moment of joining, with whole rings and with pages that somebody may have to
yield; and after a rebuild from the journal, wherever it was cut, the last time when the ring has wrapped three times.

Run by `make gpu` as well, on machines with torch and pytest alone.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from evaluation.modes import Mode, modes
from graphs.paging import OutOfPages
from graphs.prefix_cache import PrefixCache
from graphs.slot_engine import SlotEngine
from graphs.stages import Past, Sampling
from models.config import AUDIO_CODEBOOKS, LMConfig
from models.lm import LanguageModel
from models.prompt import Prompt, build_prompt
from tests.golden import NOBODY, CodesVoice, prefill, random_user
from tests.unit.graphs.diary import Chunks, Diary

# Heads of 64, so that vLLM has kernels for them; rings of two pages.
CONFIG = LMConfig(
    dim=128,
    text_card=96,
    num_heads=2,
    num_layers=2,
    context=190,
    depformer_dim=32,
    depformer_dim_feedforward=96,
    depformer_num_heads=2,
    depformer_num_layers=1,
)
RING, PROMPT, SEED, SLOTS = 256, 32, 20_261_123, 5
WRAPPED = 3 * RING - PROMPT  # the frame whose key is the first of the ring's fourth turn
FRAMES, MORE = WRAPPED + 60, 12
OVERCOMMIT = 2.4  # five pages for five conversations, each of which grows to two

SLOW = ("static fp32", "static fp32, KV fp8", "static bf16")  # the fourth of them runs always


def marks(mode: Mode) -> list[pytest.MarkDecorator]:
    return [pytest.mark.full] if mode.name in SLOW else []


EVERY_MODE = [
    *(pytest.param((mode, "cpu"), id=mode.name, marks=marks(mode)) for mode in modes("cpu")),
    *(pytest.param((mode, "cuda"), id=f"cuda: {mode.name}", marks=pytest.mark.gpu) for mode in modes("cuda")),
]
every_mode = pytest.mark.parametrize("where", EVERY_MODE)
whole_and_paged = pytest.mark.parametrize("overcommit", [1.0, OVERCOMMIT], ids=["rings", "pages"])
Where = tuple[Mode, str]


@functools.cache
def model_in(dtype: torch.dtype, device: str) -> LanguageModel:
    model, generator = LanguageModel(CONFIG), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    lower = LanguageModel(CONFIG, dtype=dtype)
    lower.load_state_dict(model.state_dict())
    return lower.to(device)


def prompt_of(seed: int) -> Prompt:
    codes = torch.from_numpy(random_user(12, seed).astype(np.int64))
    constant = (1,) * AUDIO_CODEBOOKS
    return build_prompt(
        CONFIG, CodesVoice(codes, digest=str(seed)), [5, 6, 7, 8 + seed % 40] * 2, silence_codes=constant,
        sine_codes=constant,
    )  # fmt: skip


def engine_of(where: Where, slots: int, overcommit: float, chunk: int = 64) -> SlotEngine:
    """On CUDA all engines have as many slots: there their number is part of numerics_id."""
    mode, device = where
    if mode.missing():
        pytest.skip(mode.missing())
    chosen = replace(mode.backends, kv_overcommit=overcommit, kv_reserve_s=0.5)
    return SlotEngine(
        model_in(mode.dtype, device),
        SLOTS if device == "cuda" else slots,
        backend=chosen,
        budget=Chunks(chunk),
        prefixes=PrefixCache(),
    )


@dataclass(frozen=True)
class Life:
    """A conversation alone from its first frame to its last: tokens [FRAMES, 9], and its journal at any of them."""

    tokens: np.ndarray
    rows: list[np.ndarray]
    pending: list[np.ndarray]

    def past(self, frame: int) -> Past:
        return Past(np.stack(self.rows[:frame]), 0, self.pending[frame - 1])


def user() -> np.ndarray:
    return random_user(FRAMES, 77)


@functools.cache
def alone(where: Where) -> Life:
    engine, diary = engine_of(where, 1, 1.0), Diary()
    assert engine.cache.capacity == RING
    prefill(engine, 0, prompt_of(1), Sampling(), SEED)
    tokens, pending = [], []
    for codes in user():
        tokens.append(diary.note(engine.step([0], codes[None])))
        assert diary.pending is not None
        pending.append(diary.pending)
    return Life(np.stack(tokens), diary.rows, pending)


@whole_and_paged
@every_mode
def test_company_slot_and_moment_change_nothing(where: Where, overcommit: float) -> None:
    """Neighbours join, fall silent, hang up and come again; the one conversation begins at any moment, in any slot.

    In pages it speaks until it needs a second one and there are too few, so that somebody yields.
    """
    parked, expected = 0, alone(where).tokens
    frames = 40 if overcommit == 1.0 else RING // 2 - PROMPT + 20
    for seed in (1, 2):
        dice = random.Random(f"{where[0].name} {seed}")
        engine = engine_of(where, SLOTS, overcommit, chunk=dice.randrange(4, 64))
        mine, joins = dice.randrange(SLOTS), dice.randrange(30)
        opened: set[int] = set()
        live: set[int] = set()
        heard: list[np.ndarray] = []
        for tick in range(2_000):
            for slot in range(SLOTS):
                if slot in opened:
                    if slot != mine and dice.random() < 0.01:
                        engine.close(slot)
                        opened.discard(slot)
                        live.discard(slot)
                elif tick >= joins if slot == mine else dice.random() < 0.2:
                    prompt, sampling, own = (
                        (prompt_of(1), Sampling(), SEED)
                        if slot == mine
                        else (prompt_of(tick), Sampling(1.0, 20, 1.5, 30), tick)
                    )
                    try:
                        engine.open(slot, prompt, sampling, own)
                    except OutOfPages:
                        continue
                    opened.add(slot)
            wanting = [slot for slot in live if dice.random() < 0.8]
            dice.shuffle(wanting)
            yielding = engine.make_room(wanting)
            live -= set(yielding)
            parked += len(yielding)
            speakers = [slot for slot in wanting if slot not in yielding]
            codes = [user()[len(heard)] if slot == mine else random_user(1, tick)[0] for slot in speakers]
            out = engine.step(speakers, np.stack(codes) if codes else NOBODY)
            live |= set(out.ready)
            if mine in speakers:
                heard.append(out.tokens[speakers.index(mine)])
            if len(heard) == frames:
                break
        assert np.array_equal(np.stack(heard), expected[:frames]), seed
    assert (parked > 0) == (overcommit > 1.0), "pages were never short: nothing was tested"


@whole_and_paged
@every_mode
def test_rebuilt_from_its_journal_it_goes_on(where: Where, overcommit: float) -> None:
    """At three random frames, the last of them after the ring has wrapped three times; in chunks of a random size,
    beside a neighbour who speaks."""
    mode, life = where[0], alone(where)
    dice = random.Random(f"{mode.name} {overcommit}")
    cuts = (dice.randrange(1, 150), dice.randrange(150, WRAPPED), dice.randrange(WRAPPED, FRAMES - MORE))
    for cut in cuts:
        engine = engine_of(where, 3 if overcommit == 1.0 else SLOTS, overcommit, chunk=dice.randrange(4, 64))
        prefill(engine, 0, prompt_of(2), Sampling(), 4)
        slot = dice.choice((1, 2))
        engine.open(slot, prompt_of(1), Sampling(), SEED, past=life.past(cut))
        ready, tick = False, 0
        while not ready:
            ready = slot in engine.step([0], random_user(1, tick)).ready
            tick += 1
        heard = []
        for frame in range(cut, cut + MORE):
            said = np.stack([random_user(1, frame)[0], user()[frame]])
            heard.append(engine.step([0, slot], said).tokens[1])
        assert np.array_equal(np.stack(heard), life.tokens[cut : cut + MORE]), cut
