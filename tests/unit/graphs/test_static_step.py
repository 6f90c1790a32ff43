"""The step of fixed shape, in torch operators on a CPU: what a GPU will capture, equal to the portable step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from graphs.backends import make_cache
from graphs.cuda_step import StaticStep
from graphs.frame_step import GENERATED, Emit, FrameStep, Override
from graphs.kv_cache import KVCache, Span
from graphs.ring_cache import FP8, RingCache, fp8_scale
from graphs.sampling import SamplingRows, row_keys
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from graphs.step_inputs import GIVEN, KEY, POSITION, QUERY_ROWS, SLOT, Draws, Shape, StepInputs, blocks_of
from models.config import UNGENERATED
from tests.golden import GREEDY, golden_lm, golden_prompt, golden_run, golden_user, prefill, random_user, talk
from tests.unit.graphs.forced import forced_logits

CPU = torch.device("cpu")
LOGITS_TOLERANCE = 2e-5
FREE = np.full(GENERATED, UNGENERATED, dtype=np.int16)


def ring(slots: int, tile: int = 16, backend: str = "static") -> KVCache:
    return make_cache(golden_lm().config, slots, tile, device=CPU, dtype=torch.float32, backend=backend)


def test_golden_run() -> None:
    """100 frames in a context of 40, the prompt in chunks of 8: tokens and logits of the published code."""
    engine = SlotEngine(golden_lm(), 3, tile=8, backend="static")
    text: list[Tensor] = []
    audio: list[Tensor] = []
    engine.frame_step.probe = lambda t, a: (text.append(t[0]), audio.append(a[0]))[0]
    prefill(engine, 2, golden_prompt())
    frames = talk(engine, 2, golden_user())
    assert np.array_equal(frames[:99], golden_run()["expected_tokens"].numpy()[1:, :9])
    assert (torch.stack(text[:100]) - golden_run()["expected_text_logits"]).abs().max() < LOGITS_TOLERANCE
    every_tenth = torch.stack(audio[:100:10])
    assert (every_tenth - golden_run()["expected_audio_logits_every_10"]).abs().max() < LOGITS_TOLERANCE


def test_every_row_of_a_mixed_step_equals_the_portable_one() -> None:
    """Live rows, chunks of two prompts, one of them given as embeddings: row by row, tokens and logits."""
    columns = golden_prompt().columns
    given = torch.randn(5, golden_lm().config.dim, generator=torch.Generator().manual_seed(4))
    seen: list[list[tuple[npt.NDArray[np.int16], Tensor, Tensor]]] = []
    for backend in ("torch", "static"):
        step = FrameStep(golden_lm(), ring(4, 32, backend))
        logits: list[tuple[Tensor, Tensor]] = []
        step.probe = lambda text, audio, into=logits: into.append((text, audio))  # type: ignore[misc]  # bound at once
        step.run(columns[:20], [Span(0, 20, 1, 0)], [])
        outputs = []
        for frame in range(3):
            spans = [Span(0, 1, 1, 20 + frame), Span(1, 5, 3, 5 * frame), Span(6, 18, 0, 18 * frame)]
            rows = np.concatenate((columns[20 + frame : 21 + frame], columns[:5], columns[:18]))
            half = FREE.copy()
            half[:3] = (3, 7, 9)
            emits = [
                Emit(0, 21 + frame, FREE, Sampling(), 5),
                Emit(5, 5 + frame, half, GREEDY, 6),
                Emit(23, 18 + frame, FREE, Sampling(1.0, 40, 0.7, 12), 7),
            ]
            outputs.append(step.run(rows, spans, emits, [Override(1, given)]))
        seen.append([(tokens, text, audio) for tokens, (text, audio) in zip(outputs, logits, strict=True)])
    for (tokens, text, audio), (other_tokens, other_text, other_audio) in zip(*seen, strict=True):
        assert np.array_equal(tokens, other_tokens)
        assert tokens[1, :3].tolist() == [3, 7, 9]
        torch.testing.assert_close(text, other_text, atol=5e-6, rtol=0)
        torch.testing.assert_close(audio, other_audio, atol=5e-6, rtol=0)


@pytest.mark.parametrize("backend", ["static", "static-fp8"])
def test_company_and_chunks_change_nothing(backend: str) -> None:
    """A conversation at default temperatures: alone with its prompt in one piece, then among others in pieces of 5."""
    user, sampling = random_user(50, 3), Sampling()
    alone = SlotEngine(golden_lm(), 4, tile=40, backend=backend)
    prefill(alone, 0, golden_prompt(), sampling, 11)
    expected = talk(alone, 0, user)

    crowd = SlotEngine(golden_lm(), 4, tile=5, backend=backend)
    prefill(crowd, 2, golden_prompt(), Sampling(), 1)
    prefill(crowd, 1, golden_prompt(), sampling, 11)
    heard = []
    for tick, codes in enumerate(user):
        company = [2] if tick % 3 else []  # silent every third frame
        if tick == 10:
            crowd.open(0, golden_prompt(), GREEDY, 4)  # prefilled beside the live rows
        if tick == 30:
            crowd.close(0)
        out = crowd.step([1, *company], np.stack([codes, *random_user(len(company), tick)]))
        heard.append(out.tokens[0])
    assert np.array_equal(np.stack(heard), expected)


def test_fp8_keys_and_values_cost_little() -> None:
    """Logits over 132 given columns, so that no flipped token hides or multiplies the error."""
    exact, coarse = forced_logits(golden_lm(), ring(1)), forced_logits(golden_lm(), ring(1, backend="static-fp8"))
    for wanted, got in zip(exact, coarse, strict=True):
        error = (got - wanted).norm() / wanted.norm()
        assert 1e-5 < error < 0.003, error  # measured: 0.0010 text, 0.0004 audio; bf16 throughout costs 0.0055


def test_a_scale_of_its_own_keeps_every_vector_in_range() -> None:
    """Values from 1e-30 to 1e30 come back within e4m3's half step of the largest in their vector."""
    size = torch.tensor([1e-30, 1e-3, 1.0, 448.0, 449.0, 1e30]).unsqueeze(1)
    vectors = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * size
    scale = fp8_scale(vectors).unsqueeze(1)
    assert torch.equal(scale, scale.bfloat16().float())
    back = (vectors / scale).to(FP8).float() * scale
    assert ((back - vectors).abs() <= vectors.abs().amax(1, keepdim=True) / 16).all()
    assert torch.equal(fp8_scale(torch.zeros(1, 4)), torch.tensor([2.0**-126]))


def test_an_fp8_slot_moves_with_its_scales() -> None:
    cache = ring(3, backend="static-fp8")
    assert isinstance(cache, RingCache)
    step = FrameStep(golden_lm(), cache)
    columns = golden_prompt().columns
    for first in (0, 14):
        step.run(columns[first : first + 14], [Span(0, 14, 0, first)], [])
    cache.restore(1, cache.snapshot(0))
    cache.write(2, cache.read(0, 28))
    assert cache.read(0, 28).bytes == 28 * (cache.bytes_per_slot // cache.capacity)
    answers = [
        step.run(columns[28:29], [Span(0, 1, slot, 28)], [Emit(0, 29, FREE, Sampling(), 3)]) for slot in (0, 1, 2)
    ]
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])
    with pytest.raises(ValueError, match=r"holds torch\.float32, the cache torch\.float8"):
        cache.restore(1, ring(1).snapshot(0))
    with pytest.raises(ValueError, match=r"are torch\.float32, the cache holds"):
        cache.write(1, ring(1).read(0, 4))
    with pytest.raises(ValueError, match="do not read fp8"):
        cache.attention([Span(0, 1, 0, 0)])


def test_a_step_that_is_too_large_says_how_much_it_takes() -> None:
    step = FrameStep(golden_lm(), ring(2, 8))
    with pytest.raises(ValueError, match="takes 12 rows"):
        step.run(np.repeat(golden_prompt().columns, 2, 0)[:30], [Span(0, 30, 0, 0)], [])


def test_a_step_that_draws_nothing_leaves_the_heads_alone() -> None:
    cache = ring(2, 16)
    assert isinstance(cache, RingCache)
    model = StaticStep(golden_lm(), cache)
    parameters = SamplingRows(*(np.zeros(0, dtype) for dtype in (np.float32, int, np.float32, int, int, int)))
    nothing = Draws(np.zeros(0, dtype=np.int64), np.zeros((0, GENERATED), dtype=np.int64), parameters)
    probed: list[Tensor] = []
    with torch.inference_mode():
        drawn = model.frame(
            golden_prompt().columns[:9], [Span(0, 9, 1, 0)], nothing, [], lambda text, audio: probed.append(text)
        )
    assert drawn.shape == (0, GENERATED)
    assert not probed
    assert cache.keys[:, 1, :, :9].abs().sum() > 0
    assert cache.keys[:, 0].abs().sum() == 0


def test_what_a_step_is_told() -> None:
    """Blocks are at most 16 rows of one slot; padding is at position -1; a seed arrives whole."""
    spans = [Span(0, 1, 3, 70), Span(1, 37, 1, 5)]
    assert blocks_of(spans) == 4
    inputs = StepInputs(Shape(44, 6, 4), CPU)
    sampling = SamplingRows(
        np.array([0.7], np.float32), np.array([25]), np.array([0.8], np.float32), np.array([250]),
        np.array([2**63 - 1]), np.array([71]),
    )  # fmt: skip
    draws = Draws(np.array([0]), np.full((1, GENERATED), -2), sampling)
    shape = Shape(40, 5, 4)
    inputs.fill(shape, np.zeros((38, 17), dtype=np.int16), spans, draws, [(1, 2)])
    rows, blocks, asked = inputs.views(shape)
    assert rows[:3, SLOT].tolist() == [3, 1, 1]
    assert rows[[0, 1, 37, 38, 39], POSITION].tolist() == [70, 5, 41, -1, -1]
    assert rows[:4, POSITION + 1].tolist() == [0, 1, 1, 0]
    assert blocks.tolist() == [
        [0, 1, 3, 70],
        [1, QUERY_ROWS, 1, 5],
        [17, QUERY_ROWS, 1, 21],
        [33, 5, 1, 37],
        [0, 0, 0, 0],
    ]
    key = asked[0, KEY : KEY + 2].numpy().view(np.uint64)
    assert key == row_keys(sampling)
    assert asked[0, GIVEN:].tolist() == [-2] * GENERATED
    assert asked[1:, 2].tolist() == asked[1:, 4].tolist() == [1, 1, 1]
