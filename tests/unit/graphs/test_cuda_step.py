"""The captured step on a GPU: the golden run, bits that depend on nothing but the row, what fp8 costs, no waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.setting import random_lm
from graphs.backends import make_cache
from graphs.cuda_step import StaticStep
from graphs.frame_step import GENERATED, Emit, FrameStep
from graphs.kv_cache import Span
from graphs.ring_cache import RingCache
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import STREAMS, UNGENERATED, LMConfig
from models.lm import LanguageModel
from tests.golden import GREEDY, golden_prompt, golden_run, golden_user, prefill, random_user, talk
from tests.unit.graphs.forced import forced_logits, golden_lm_on

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
TILE = 64
FREE = np.full(GENERATED, UNGENERATED, dtype=np.int16)
# The 7B model's layers, fewer: every product has the width it has there.
WIDE = LMConfig(num_layers=2, context=600, depformer_num_layers=2)


@pytest.fixture(scope="module")
def wide() -> LanguageModel:
    return random_lm(WIDE, DEVICE, torch.bfloat16)


def columns(model: LanguageModel, count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(0, model.config.text_card, (count, STREAMS))
    drawn[:, 1:] %= model.config.card
    return drawn.astype(np.int16)


def ring(model: LanguageModel, slots: int, backend: str = "static") -> RingCache:
    cache = make_cache(model.config, slots, TILE, device=DEVICE, dtype=model.dtype, backend=backend)
    assert isinstance(cache, RingCache)
    return cache


def test_golden_run() -> None:
    engine = SlotEngine(golden_lm_on(DEVICE), 2, tile=16)
    assert isinstance(engine.cache, RingCache)
    text: list[Tensor] = []
    audio: list[Tensor] = []
    engine.frame_step.probe = lambda t, a: (text.append(t[0].cpu()), audio.append(a[0].cpu()))[0]
    prefill(engine, 1, golden_prompt())
    frames = talk(engine, 1, golden_user())
    assert np.array_equal(frames[:99], golden_run()["expected_tokens"].numpy()[1:, :9])
    assert (torch.stack(text[:100]) - golden_run()["expected_text_logits"]).abs().max() < 2e-5
    every_tenth = torch.stack(audio[:100:10])
    assert (every_tenth - golden_run()["expected_audio_logits_every_10"]).abs().max() < 2e-5


@pytest.mark.parametrize("backend", ["static", "static-fp8"])
def test_a_row_has_the_same_bits_alone_and_in_chunks_and_company(wide: LanguageModel, backend: str) -> None:
    """700 columns, a window of 599: a slot's cache and logits, one row a step or up to 64 beside others."""
    told, others = columns(wide, 700, 1), columns(wide, 64, 2)
    one_by_one, chunked = ring(wide, 8, backend), ring(wide, 8, backend)
    logits: list[list[Tensor]] = [[], []]
    steps = [FrameStep(wide, cache) for cache in (one_by_one, chunked)]
    for step, into in zip(steps, logits, strict=True):
        step.probe = lambda text, audio, into=into: into.append(torch.cat((text[-1], audio[-1].flatten())).cpu())  # type: ignore[misc]  # bound at once
    ends, first, dice = set(), 0, np.random.default_rng(3)
    while first < len(told):
        count = min(int(dice.integers(1, TILE + 1)), len(told) - first)
        company = [Span(i, 1, slot, 600 + i) for i, slot in enumerate((0, 1, 6)[: int(dice.integers(0, 4))])]
        rows = np.concatenate((others[: len(company)], told[first : first + count]))
        emits = [Emit(span.start, 1, FREE, Sampling(), 1) for span in company]
        emits.append(Emit(len(rows) - 1, first + count, FREE, Sampling(), 9))
        steps[1].run(rows, [*company, Span(len(company), count, 3, first)], emits)
        first += count
        ends.add(first - 1)
    for position in range(len(told)):
        emits = [Emit(0, position + 1, FREE, Sampling(), 9)] if position in ends else []
        steps[0].run(told[position : position + 1], [Span(0, 1, 5, position)], emits)
    for name in ("keys", "values"):
        alone, together = getattr(one_by_one, name)[:, 5], getattr(chunked, name)[:, 3]
        assert torch.equal(alone.view(torch.uint8), together.view(torch.uint8)), name
    assert all(torch.equal(alone, together) for alone, together in zip(*logits, strict=True))


def test_a_captured_step_equals_an_eager_one_that_never_waits(wide: LanguageModel) -> None:
    caches = [ring(wide, 4), ring(wide, 4)]
    models = [StaticStep(wide, cache, capture=capture) for cache, capture in zip(caches, (True, False), strict=True)]
    steps = [FrameStep(wide, cache) for cache in caches]
    for step, model in zip(steps, models, strict=True):
        step._model = model
    outputs: list[list[np.ndarray]] = [[], []]
    for step, into in zip(steps, outputs, strict=True):
        for frame in range(6):
            spans = [Span(0, 1, 2, frame), Span(1, 30 if frame % 2 else 1, 0, 40 * frame)]
            rows = columns(wide, spans[0].count + spans[1].count, frame)
            into.append(step.run(rows, spans, [Emit(0, frame + 1, FREE, Sampling(), 4)]))
    assert np.array_equal(*outputs)
    shape = models[1]._largest
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            models[1]._run(shape)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tokens_do_not_depend_on_company_or_moment(wide: LanguageModel) -> None:
    """At default temperatures: alone, then joining others at tick 5 in another slot."""
    model, user = golden_lm_on(DEVICE, torch.bfloat16), random_user(40, 5)
    alone = SlotEngine(model, 4, tile=16)
    prefill(alone, 0, golden_prompt(), Sampling(), 77)
    expected = talk(alone, 0, user)
    crowd = SlotEngine(model, 4, tile=16)
    prefill(crowd, 1, golden_prompt(), Sampling(), 1)
    for tick in range(5):
        crowd.step([1], random_user(1, tick))
    prefill(crowd, 3, golden_prompt(), Sampling(), 77)
    heard = []
    for tick, codes in enumerate(user):
        if tick == 8:
            crowd.open(2, golden_prompt(), GREEDY, 2)
        heard.append(crowd.step([1, 3], np.stack((random_user(1, tick)[0], codes))).tokens[1])
    assert np.array_equal(np.stack(heard), expected)


@pytest.mark.parametrize(("dtype", "backend", "bound"), [
    (torch.float32, "static-fp8", 0.003),
    (torch.bfloat16, "static", 0.012),
    (torch.bfloat16, "static-fp8", 0.014),
])  # fmt: skip
def test_what_bf16_and_fp8_cost(dtype: torch.dtype, backend: str, bound: float) -> None:
    """Relative error of the logits over 131 given columns against fp32."""
    exact = golden_lm_on(DEVICE)
    coarse = golden_lm_on(DEVICE, dtype)
    for wanted, got in zip(
        forced_logits(exact, ring(exact, 1)), forced_logits(coarse, ring(coarse, 1, backend)), strict=True
    ):
        error = ((got - wanted).norm() / wanted.norm()).item()
        print(f"{dtype} {backend}: relative error of the logits {error:.2e}")
        assert 1e-5 < error < bound
