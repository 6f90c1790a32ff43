"""Mimi against the published code's golden run, and its promises about slots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.config import FRAME_SAMPLES, CodecTransformerConfig, MimiConfig, SeanetConfig
from models.mimi import Mimi
from models.mimi_transformer import visibility
from models.slot_state import SlotState

DATA = Path(__file__).parents[2] / "data"
FRAMES = 60  # the golden run: 120 positions, so the small codec's context of 20 wraps six times


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    config = MimiConfig.from_dict(json.loads((DATA / "mimi_small_config.json").read_text()))
    codec = Mimi(config).eval()
    codec.load_state_dict({name: value.float() for name, value in load_file(DATA / "mimi_small.safetensors").items()})
    return codec


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "mimi_small_golden.safetensors")


def encode(mimi: Mimi, pcm: Tensor, slots: int, slot: int) -> Tensor:
    """pcm [frames * 1920] alone in `slot` of `slots` → codes [frames, 8]."""
    state = mimi.init_encoder_state(slots)
    active = torch.arange(slots) == slot
    codes = []
    for frame in pcm.view(-1, FRAME_SAMPLES):
        batch = torch.zeros(slots, FRAME_SAMPLES)
        batch[slot] = frame
        codes.append(mimi.encode_frame(batch, state, active)[slot])
    return torch.stack(codes)


def decode(mimi: Mimi, codes: Tensor, slots: int, slot: int) -> Tensor:
    """codes [frames, 8] alone in `slot` of `slots` → pcm [frames * 1920]."""
    state = mimi.init_decoder_state(slots)
    active = torch.arange(slots) == slot
    pcm = []
    for frame in codes:
        batch = torch.zeros(slots, codes.shape[1], dtype=torch.int64)
        batch[slot] = frame
        pcm.append(mimi.decode_frame(batch, state, active)[slot])
    return torch.cat(pcm)


def test_names_and_shapes_are_the_published_ones() -> None:
    manifest = json.loads((DATA / "mimi_state_dict.json").read_text())
    with torch.device("meta"):
        state = Mimi(MimiConfig()).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {k: v[0] for k, v in manifest.items()}


@pytest.mark.parametrize(("slots", "slot"), [(1, 0), (4, 2)])
def test_golden_codes(mimi: Mimi, golden: dict[str, Tensor], slots: int, slot: int) -> None:
    codes = encode(mimi, golden["pcm_in"], slots, slot)
    assert torch.equal(codes, golden["expected_codes"])  # the tolerance is 99 %; anything less is a mistake by now


@pytest.mark.parametrize(("slots", "slot"), [(1, 0), (4, 2)])
def test_golden_pcm(mimi: Mimi, golden: dict[str, Tensor], slots: int, slot: int) -> None:
    pcm = decode(mimi, golden["expected_codes"], slots, slot)
    torch.testing.assert_close(pcm, golden["expected_pcm"], atol=2e-5, rtol=0.0)


def test_first_position_of_a_frame_sees_one_key_fewer() -> None:
    positions = torch.arange(40)
    seen = (visibility(positions, positions, 20) == 0).sum(-1)
    assert seen[:18].tolist() == list(range(1, 19))
    assert seen[20::2].tolist() == [18] * 10
    assert seen[21::2].tolist() == [19] * 10


def test_neighbours_do_not_change_a_bit(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    """The golden stream in slot 3 of a group of four, while its neighbours talk, pause, leave and begin anew."""
    pcm = golden["pcm_in"].view(FRAMES, FRAME_SAMPLES)
    alone_codes = encode(mimi, golden["pcm_in"], 4, 3)
    alone_pcm = decode(mimi, golden["expected_codes"], 4, 3)
    torch.manual_seed(5)
    encoder, decoder = mimi.init_encoder_state(4), mimi.init_decoder_state(4)
    done = 0
    while done < FRAMES:
        call_pcm = 3.0 * torch.randn(4, FRAME_SAMPLES)
        call_codes = torch.randint(0, mimi.config.quantizer.bins, (4, 8))
        active = torch.rand(4) < 0.7
        for neighbour in range(3):
            if torch.rand(()) < 0.1:
                encoder.reset(neighbour)
                decoder.reset(neighbour)
        call_pcm[3], call_codes[3] = pcm[done], golden["expected_codes"][done]
        codes = mimi.encode_frame(call_pcm, encoder, active)[3]
        out = mimi.decode_frame(call_codes, decoder, active)[3]
        if active[3]:
            assert torch.equal(codes, alone_codes[done])
            assert torch.equal(out, alone_pcm[done * FRAME_SAMPLES : (done + 1) * FRAME_SAMPLES])
            done += 1


def test_every_place_in_the_group_gives_the_same_bits(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    codes = golden["expected_codes"][:25]
    first = decode(mimi, codes, 4, 0)
    for slot in range(1, 4):
        assert torch.equal(decode(mimi, codes, 4, slot), first)
        assert torch.equal(encode(mimi, golden["pcm_in"], 4, slot), golden["expected_codes"])


def test_reset_is_a_fresh_stream(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    pcm = golden["pcm_in"].view(FRAMES, FRAME_SAMPLES)
    state = mimi.init_encoder_state(4)
    for frame in range(15):
        mimi.encode_frame(pcm[frame].repeat(4, 1), state)
    state.reset(1)
    restarted = [mimi.encode_frame(pcm[frame].repeat(4, 1), state)[1] for frame in range(25)]
    assert torch.equal(torch.stack(restarted), golden["expected_codes"][:25])


def test_snapshot_goes_on_in_another_slot(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    codes = golden["expected_codes"]
    alone = decode(mimi, codes, 4, 0).view(FRAMES, FRAME_SAMPLES)
    source, target = mimi.init_decoder_state(4), mimi.init_decoder_state(8)
    for frame in range(21):
        mimi.decode_frame(codes[frame].repeat(4, 1), source)
    target.restore(6, source.snapshot(2))
    for frame in range(21, FRAMES):
        out = mimi.decode_frame(codes[frame].repeat(4, 1), target.group(4, 8))
        assert torch.equal(out[2], alone[frame])


def test_a_group_view_is_the_state_itself(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    state = mimi.init_encoder_state(8)
    mimi.encode_frame(golden["pcm_in"][:FRAME_SAMPLES].repeat(4, 1), state.group(4, 8))
    assert state["frames"].tolist() == [0] * 4 + [1] * 4
    assert all(not tensor[:4].any() for tensor in state.tensors.values())


@pytest.mark.parametrize("frames", [1, 3, 32, 47, FRAMES])
def test_whole_sequences_equal_the_streamed_codec(mimi: Mimi, golden: dict[str, Tensor], frames: int) -> None:
    pcm = golden["pcm_in"][: frames * FRAME_SAMPLES]
    codes = golden["expected_codes"][:frames]
    assert torch.equal(mimi.encode_sequence(pcm[None])[0], codes)
    torch.testing.assert_close(mimi.decode_sequence(codes[None])[0], decode(mimi, codes, 1, 0), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("frames", [3, 33])
def test_a_slot_rebuilt_from_its_past_goes_on(mimi: Mimi, golden: dict[str, Tensor], frames: int) -> None:
    pcm, codes = golden["pcm_in"].view(FRAMES, FRAME_SAMPLES), golden["expected_codes"]
    encoder, decoder = mimi.init_encoder_state(1), mimi.init_decoder_state(1)
    mimi.encode_sequence(pcm[:frames].view(1, -1), encoder)
    mimi.decode_sequence(codes[None, :frames], decoder)
    live_encoder, live_decoder = mimi.init_encoder_state(4), mimi.init_decoder_state(4)
    live_encoder.restore(1, encoder.snapshot(0))
    live_decoder.restore(1, decoder.snapshot(0))
    expected = golden["expected_pcm"].view(FRAMES, FRAME_SAMPLES)
    for frame in range(frames, FRAMES):
        assert torch.equal(mimi.encode_frame(pcm[frame].repeat(4, 1), live_encoder)[1], codes[frame])
        out = mimi.decode_frame(codes[frame].repeat(4, 1), live_decoder)[1]
        torch.testing.assert_close(out, expected[frame], atol=2e-5, rtol=0.0)


def test_training_path_equals_the_streamed_codec(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        quantized = mimi.quantizer(mimi.encode_latent(golden["pcm_in"][None, None]))
        pcm = mimi.decode_latent(quantized.latent)
    assert torch.equal(quantized.codes[0], golden["expected_codes"])
    torch.testing.assert_close(pcm[0, 0], golden["expected_pcm"], atol=2e-5, rtol=0.0)


def test_gradients_reach_every_used_weight(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    codec = Mimi(mimi.config)
    codec.load_state_dict(mimi.state_dict())
    latent = codec.encode_latent(golden["pcm_in"][None, None, : 4 * FRAME_SAMPLES])
    quantized = codec.quantizer(latent)
    commitment = sum((i - e).square().mean() for i, e in zip(quantized.inputs, quantized.entries, strict=True))
    (codec.decode_latent(quantized.latent).square().mean() + commitment).backward()
    assert [name for name, weight in codec.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_changed_weights_are_seen(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    """What is derived from the weights doesn't outlive them."""
    codec = Mimi(mimi.config).eval()
    codec.load_state_dict(mimi.state_dict())
    codes = golden["expected_codes"][:1]
    before = decode(codec, codes, 1, 0)
    changed = {name: 2.0 * value if name.startswith("decoder.") else value for name, value in mimi.state_dict().items()}
    codec.load_state_dict(changed)
    assert not torch.equal(decode(codec, codes, 1, 0), before)
    codec.load_state_dict(mimi.state_dict())
    assert torch.equal(decode(codec, codes, 1, 0), before)
    codec.train()
    for _ in range(2):  # as an optimiser does between two looks at the codec
        with torch.no_grad():
            codec.decoder.model[14].conv["conv"].bias += 0.25
        trained = decode(codec, codes, 1, 0)
        assert not torch.equal(trained, before)
        before = trained
    assert torch.equal(decode(codec.eval(), codes, 1, 0), before)


def test_used_codebooks_follow_the_config(mimi: Mimi) -> None:
    assert mimi.encode_sequence(torch.zeros(1, FRAME_SAMPLES)).shape == (1, 1, 8)
    assert len(mimi.quantizer.codebooks()) == 8
    assert len(mimi.quantizer.rvq_rest.codebooks()) == 11


def test_broken_frames_and_impossible_shapes_are_refused(mimi: Mimi) -> None:
    with pytest.raises(ValueError, match="whole frames"):
        mimi.encode_sequence(torch.zeros(1, 1000))
    with pytest.raises(ValueError, match="frame"):
        Mimi(MimiConfig(seanet=SeanetConfig(ratios=(8, 6, 5, 2))))
    with pytest.raises(ValueError, match="context"):
        Mimi(MimiConfig(transformer=CodecTransformerConfig(context=2)))
    with pytest.raises(ValueError, match="codebooks"):
        Mimi(MimiConfig(num_codebooks=33))


@pytest.mark.gpu
def test_golden_run_on_cuda(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    codec = Mimi(mimi.config).eval()
    codec.load_state_dict(mimi.state_dict())
    codec.cuda()
    encoder, decoder = codec.init_encoder_state(4), codec.init_decoder_state(4)
    codes, pcm = [], []
    for frame, expected in zip(golden["pcm_in"].view(FRAMES, -1).cuda(), golden["expected_codes"].cuda(), strict=True):
        codes.append(codec.encode_frame(frame.repeat(4, 1), encoder)[2].cpu())
        pcm.append(codec.decode_frame(expected.repeat(4, 1), decoder)[2].cpu())
    assert (torch.stack(codes) == golden["expected_codes"]).float().mean() >= 0.99
    torch.testing.assert_close(torch.cat(pcm), golden["expected_pcm"], atol=2e-5, rtol=0.0)


@pytest.mark.gpu
def test_a_captured_frame_gives_the_bits_of_an_eager_one(mimi: Mimi, golden: dict[str, Tensor]) -> None:
    """Both directions in one CUDA graph: nothing in the step waits for the host or depends on data."""
    codec = Mimi(mimi.config).eval()
    codec.load_state_dict(mimi.state_dict())
    codec.cuda()
    pcm = golden["pcm_in"].view(FRAMES, 1, FRAME_SAMPLES).expand(-1, 4, -1).cuda()
    eager = codec.init_encoder_state(4), codec.init_decoder_state(4)
    captured = codec.init_encoder_state(4), codec.init_decoder_state(4)
    active = torch.tensor([True, False, True, True], device="cuda")
    static = pcm[0].clone()

    def step(states: tuple[SlotState, SlotState]) -> tuple[Tensor, Tensor]:
        codes = codec.encode_frame(static, states[0], active)
        return codes, codec.decode_frame(codes, states[1], active)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(captured)
    torch.cuda.synchronize()
    for state in captured:
        for slot in range(4):
            state.reset(slot)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(captured)
    for state in captured:
        for slot in range(4):
            state.reset(slot)
    for frame in pcm:
        static.copy_(frame)
        expected = step(eager)
        graph.replay()
        assert torch.equal(replayed[0], expected[0])
        assert torch.equal(replayed[1], expected[1])


def test_state_is_slots_first(mimi: Mimi) -> None:
    for state in (mimi.init_encoder_state(5), mimi.init_decoder_state(5)):
        assert isinstance(state, SlotState)
        assert all(tensor.shape[0] == 5 and not tensor.any() for tensor in state.tensors.values())
