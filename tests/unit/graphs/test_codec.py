"""Lanes: int16 in and out, any subset of slots, and the bits of a stream whatever happens around it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from graphs.codec import DecoderLane, EncoderLane, Int16
from graphs.codec_runners import GroupedRunner, spans
from graphs.sampling import HAS_NUMBA
from models.config import FRAME_SAMPLES, MimiConfig
from models.mimi import Mimi
from models.slot_state import SlotState

DATA = Path(__file__).parents[2] / "data"
FRAMES = 60


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    config = MimiConfig.from_dict(json.loads((DATA / "mimi_small_config.json").read_text()))
    codec = Mimi(config).eval()
    codec.load_state_dict({name: value.float() for name, value in load_file(DATA / "mimi_small.safetensors").items()})
    return codec


@pytest.fixture(scope="module")
def speech() -> Int16:
    """[60, 1920]: the golden input, rounded to what a client sends."""
    pcm = load_file(DATA / "mimi_small_golden.safetensors")["pcm_in"].numpy().reshape(FRAMES, FRAME_SAMPLES)
    return np.clip(np.rint(pcm * 32768), -32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def codes() -> Int16:
    return load_file(DATA / "mimi_small_golden.safetensors")["expected_codes"].numpy().astype(np.int16)


@pytest.fixture(scope="module", params=["compiled", "torch"])
def runner(request: pytest.FixtureRequest) -> str:
    """How lanes run on a CPU."""
    if request.param == "compiled" and not HAS_NUMBA:
        pytest.skip("the compiled codec needs numba")
    return str(request.param)


@pytest.fixture(scope="module")
def alone(mimi: Mimi, speech: Int16, codes: Int16, runner: str) -> tuple[Int16, Int16]:
    """The golden stream through both lanes with nobody else there: codes [60, 8], pcm [60, 1920]."""
    encoder, decoder = EncoderLane(mimi, 1, runner=runner), DecoderLane(mimi, 1, runner=runner)
    return (
        np.concatenate([encoder.run([0], frame[None]) for frame in speech]),
        np.concatenate([decoder.run([0], frame[None]) for frame in codes]),
    )


def test_int16_is_scaled_by_32768_both_ways(
    mimi: Mimi, speech: Int16, codes: Int16, alone: tuple[Int16, Int16]
) -> None:
    floats = torch.from_numpy(speech.astype(np.float32) / 32768)
    assert np.array_equal(alone[0], mimi.encode_sequence(floats.view(1, -1))[0].numpy())
    expected = load_file(DATA / "mimi_small_golden.safetensors")["expected_pcm"].numpy().reshape(FRAMES, FRAME_SAMPLES)
    assert np.abs(alone[1] - np.clip(expected * 32768, -32768, 32767)).max() <= 0.5 + 2e-5 * 32768


def test_output_is_clipped_not_wrapped(mimi: Mimi, codes: Int16) -> None:
    loud = Mimi(mimi.config)
    last = "decoder.model.14.conv.conv.weight"
    loud.load_state_dict({**mimi.state_dict(), last: 1e4 * mimi.state_dict()[last]})
    pcm = DecoderLane(loud, 1).run([0], codes[:1])
    reference = loud.decode_sequence(torch.from_numpy(codes[None, :1].astype(np.int64)))[0].numpy()
    beyond = np.abs(reference) > 1.0
    assert beyond.any()
    assert np.array_equal(np.sign(pcm[0][beyond]), np.sign(reference[beyond]))
    assert set(pcm[0][beyond].tolist()) <= {-32768, 32767}


def test_a_stream_keeps_its_bits_whatever_its_neighbours_do(
    mimi: Mimi, speech: Int16, codes: Int16, alone: tuple[Int16, Int16], runner: str
) -> None:
    """Slot 3 of five, so its group has three more and the next one is mostly padding."""
    random = np.random.default_rng(11)
    encoder, decoder = EncoderLane(mimi, 5, runner=runner), DecoderLane(mimi, 5, runner=runner)
    done = 0
    while done < FRAMES:
        for slot in (0, 1, 2, 4):
            if random.random() < 0.1:  # leaves, somebody else joins
                encoder.reset(slot)
                decoder.reset(slot)
        slots = [int(slot) for slot in random.permutation(5) if random.random() < 0.6]
        pcm = random.integers(-32768, 32767, (len(slots), FRAME_SAMPLES), dtype=np.int16)
        agent = random.integers(0, 128, (len(slots), 8), dtype=np.int16)
        if 3 in slots:
            pcm[slots.index(3)], agent[slots.index(3)] = speech[done], codes[done]
        encoded, decoded = encoder.run(slots, pcm), decoder.run(slots, agent)
        if 3 in slots:
            assert np.array_equal(encoded[slots.index(3)], alone[0][done])
            assert np.array_equal(decoded[slots.index(3)], alone[1][done])
            done += 1


@pytest.mark.parametrize("slot", [0, 1, 5, 6, 11])
def test_any_place_in_any_group(
    mimi: Mimi, speech: Int16, codes: Int16, alone: tuple[Int16, Int16], slot: int, runner: str
) -> None:
    encoder, decoder = EncoderLane(mimi, 12, runner=runner), DecoderLane(mimi, 12, runner=runner)
    for frame in range(25):
        assert np.array_equal(encoder.run([slot], speech[frame : frame + 1])[0], alone[0][frame])
        assert np.array_equal(decoder.run([slot], codes[frame : frame + 1])[0], alone[1][frame])


@pytest.mark.parametrize(
    ("groups", "widths", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6], (4, 2, 1), [(0, 4), (4, 2), (6, 1)]),
        ([0, 2, 3, 5], (4, 2, 1), [(0, 1), (2, 2), (5, 1)]),
        ([3, 4, 5], (1,), [(3, 1), (4, 1), (5, 1)]),
        ([], (4, 2, 1), []),
    ],
)
def test_spans(groups: list[int], widths: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert spans(groups, widths) == expected


@pytest.mark.parametrize("lane", [EncoderLane, DecoderLane])
def test_joined_groups_give_the_bits_of_single_ones(mimi: Mimi, lane: type[EncoderLane] | type[DecoderLane]) -> None:
    """On every machine: where joining changes bits, the lane must have noticed."""
    random = np.random.default_rng(3)
    joined, single = lane(mimi, 16, runner="torch"), lane(mimi, 16, runner="torch")
    assert isinstance(single.runner, GroupedRunner)
    single.runner.widths = (1,)
    for _ in range(20):
        slots = [slot for slot in range(16) if random.random() < 0.7]
        top = 128 if lane is DecoderLane else 8000
        data = random.integers(0, top, (len(slots), joined.width_in), dtype=np.int16)
        assert np.array_equal(joined.run(slots, data), single.run(slots, data))


def test_groups_stay_apart_where_more_rows_round_otherwise(mimi: Mimi, codes: Int16) -> None:
    class OtherCpu(Mimi):
        def decode_frame(self, codes: Tensor, state: SlotState, active: Tensor | None = None) -> Tensor:
            return super().decode_frame(codes, state, active) * (1.0 + 1e-6 * (len(codes) > 4))

    other = OtherCpu(mimi.config)
    other.load_state_dict(mimi.state_dict())
    lane = DecoderLane(other, 16, runner="torch")
    assert isinstance(lane.runner, GroupedRunner)
    assert lane.runner.widths == (1,)
    pcm = lane.run(list(range(16)), np.repeat(codes[:1], 16, axis=0))
    assert np.array_equal(pcm, np.repeat(DecoderLane(mimi, 1, runner="torch").run([0], codes[:1]), 16, axis=0))


def test_migration_mid_call(mimi: Mimi, speech: Int16, codes: Int16, alone: tuple[Int16, Int16], runner: str) -> None:
    """A snapshot goes on in another slot of another lane, and the slot it left is free for a fresh stream."""
    here = EncoderLane(mimi, 4, runner=runner), DecoderLane(mimi, 4, runner=runner)
    there = EncoderLane(mimi, 8, runner=runner), DecoderLane(mimi, 8, runner=runner)
    for frame in range(30):
        here[0].run([2], speech[frame : frame + 1])
        here[1].run([2], codes[frame : frame + 1])
    for source, target in zip(here, there, strict=True):
        target.restore(7, source.snapshot(2))
        source.reset(2)
    for frame in range(30, FRAMES):
        encoded = there[0].run([7], speech[frame : frame + 1])[0], here[0].run([2], speech[frame - 30 : frame - 29])[0]
        decoded = there[1].run([7], codes[frame : frame + 1])[0], here[1].run([2], codes[frame - 30 : frame - 29])[0]
        assert np.array_equal(encoded[0], alone[0][frame])
        assert np.array_equal(encoded[1], alone[0][frame - 30])
        assert np.array_equal(decoded[0], alone[1][frame])
        assert np.array_equal(decoded[1], alone[1][frame - 30])


def test_snapshots_of_another_model_are_refused(mimi: Mimi) -> None:
    lane = DecoderLane(mimi, 4)
    with pytest.raises(ValueError, match="another model"):
        lane.restore(0, EncoderLane(mimi, 4).snapshot(0))


def test_bad_calls_raise_and_advance_nothing(mimi: Mimi, codes: Int16, alone: tuple[Int16, Int16], runner: str) -> None:
    lane = DecoderLane(mimi, 4, runner=runner)
    two = codes[:2]
    for slots, data, match in (
        ([0, 0], two, "once a call"),
        ([0, 4], two, "slot 4"),
        ([0, -1], two, "slot -1"),
        ([0], two, "int16"),
        ([0, 1], two.astype(np.int64), "int64"),
        ([0, 1], np.where(two == two[0, 0], 128, two).astype(np.int16), "codes must lie"),
        ([0, 1], np.where(two == two[0, 0], -1, two).astype(np.int16), "codes must lie"),
    ):
        with pytest.raises(ValueError, match=match):
            lane.run(slots, data)
    assert np.array_equal(lane.run([0], codes[:1])[0], alone[1][0])
    with pytest.raises(ValueError, match="slot 4"):
        lane.reset(4)
    with pytest.raises(ValueError, match="at least one slot"):
        EncoderLane(mimi, 0)


def test_an_empty_call_is_an_empty_answer(mimi: Mimi) -> None:
    assert EncoderLane(mimi, 4).run([], np.zeros((0, FRAME_SAMPLES), np.int16)).shape == (0, 8)
    assert DecoderLane(mimi, 4).run([], np.zeros((0, 8), np.int16)).shape == (0, FRAME_SAMPLES)


def test_runners_agree_but_for_rounding(mimi: Mimi, speech: Int16, codes: Int16) -> None:
    """Compiled, static and torch's groups: the same codes, samples that differ by one step of int16 at most."""
    names = ("compiled", "static", "torch") if HAS_NUMBA else ("static", "torch")
    encoders = [EncoderLane(mimi, 3, runner=name) for name in names]
    decoders = [DecoderLane(mimi, 3, runner=name) for name in names]
    for frame in range(FRAMES):
        slots = [0, 2] if frame % 3 else [2, 1]
        pcm, agent = np.repeat(speech[None, frame], 2, axis=0), np.repeat(codes[None, frame], 2, axis=0)
        heard = [lane.run(slots, pcm) for lane in encoders]
        said = [lane.run(slots, agent) for lane in decoders]
        for other in range(1, len(names)):
            assert np.array_equal(heard[0], heard[other])
            assert np.abs(said[0].astype(int) - said[other]).max() <= 1


@pytest.mark.parametrize("lane", [EncoderLane, DecoderLane])
def test_the_static_step_is_torchs_over_all_slots(mimi: Mimi, lane: type[EncoderLane] | type[DecoderLane]) -> None:
    """What CUDA captures, here without a graph: bit for bit what operators give, slots that sit out included."""
    random = np.random.default_rng(5)
    static, grouped = lane(mimi, 6, runner="static"), lane(mimi, 6, group=6, runner="torch")
    for _ in range(25):
        slots = [int(slot) for slot in random.permutation(6) if random.random() < 0.6]
        top = 128 if lane is DecoderLane else 8000
        data: Int16 = random.integers(0, top, (len(slots), static.width_in), dtype=np.int16)
        assert np.array_equal(static.run(slots, data), grouped.run(slots, data))
    if lane is EncoderLane:  # what a second frame would overwrite has to be fetched first
        wait = static.start([0], np.zeros((1, FRAME_SAMPLES), np.int16))
        with pytest.raises(RuntimeError, match="not fetched"):
            static.start([0], np.zeros((1, FRAME_SAMPLES), np.int16))
        assert wait().shape == (1, 8)


def test_a_runner_that_cannot_be_says_why(mimi: Mimi) -> None:
    with pytest.raises(ValueError, match="no codec runner 'fast'"):
        EncoderLane(mimi, 1, runner="fast")
    narrow = MimiConfig.from_dict({**json.loads((DATA / "mimi_small_config.json").read_text())})
    narrow = dataclasses.replace(narrow, transformer=dataclasses.replace(narrow.transformer, num_heads=8))
    with pytest.raises(ValueError, match="heads of a multiple of 16"):
        DecoderLane(Mimi(narrow), 1, runner="compiled")
    assert isinstance(DecoderLane(Mimi(narrow), 1).runner, GroupedRunner)
