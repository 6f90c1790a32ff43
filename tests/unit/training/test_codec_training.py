"""The codec's trainer: losses, codebooks that live, a step that learns, and the served codec's own numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import FRAME_SAMPLES, CodecTransformerConfig, MimiConfig, QuantizerConfig, SeanetConfig
from models.mimi_quantizer import SplitQuantizer
from training import codebooks, codec, codec_model
from training.adversarial import Discriminators, discriminator_loss, generator_losses
from training.codec_data import PackedSpeech, draw
from training.codec_losses import MelLoss, mel_filters
from training.folders import FROZEN, Log
from training.piece import Piece
from training.state import load_state

TINY = MimiConfig(
    seanet=SeanetConfig(dimension=16, n_filters=2),
    transformer=CodecTransformerConfig(d_model=16, num_heads=2, num_layers=1, context=12, dim_feedforward=32),
    quantizer=QuantizerConfig(dimension=8, n_q=8, bins=16),
)


@pytest.fixture(name="pcm")
def _pcm(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for side, frames in (("train", 60), ("val", 50)):
        np.save(tmp_path / f"{side}-000.npy", rng.integers(-9000, 9000, frames * FRAME_SAMPLES).astype(np.int16))
        np.save(tmp_path / f"{side}-000-semantic.npy", rng.standard_normal((frames, 6)).astype(np.float16))
    return tmp_path


class TestMelLoss:
    def test_is_zero_for_equal_sounds_and_has_a_gradient_at_silence(self) -> None:
        loss = MelLoss(((256, 16),))
        silence = torch.zeros(1, 4800, requires_grad=True)
        assert float(loss(silence, torch.zeros(1, 4800)).detach()) == 0.0
        torch.autograd.backward(loss(silence, torch.randn(1, 4800)))
        assert silence.grad is not None
        assert bool(torch.isfinite(silence.grad).all())

    def test_is_a_difference_of_levels(self) -> None:
        loss, noise = MelLoss(((512, 16),)), torch.randn(1, 24_000)
        # Twice the amplitude is ln 2 in every band.
        assert float(loss(2 * noise, noise)) == pytest.approx(np.log(2.0), abs=1e-3)

    def test_an_envelope_is_nearer_to_noise_of_its_own_shape_than_its_fine_structure_is(self) -> None:
        loss, generator = MelLoss(), torch.Generator().manual_seed(0)
        one, other = (torch.randn(1, 48_000, generator=generator) for _ in range(2))
        assert float(loss.envelope(one, one)) == 0.0
        assert float(loss.envelope(2 * one, one)) == pytest.approx(np.log(2.0), abs=1e-3)
        assert float(loss.envelope(one, other)) < 0.5 * float(loss(one, other))

    def test_filters_cover_every_band(self) -> None:
        filters = mel_filters(80, 513)
        assert torch.allclose(filters.sum(1), torch.ones(80), atol=1e-4)


class TestCodebooks:
    def test_entries_move_to_what_chooses_them_and_dead_ones_are_replaced(self) -> None:
        torch.manual_seed(0)
        quantizer = SplitQuantizer(16, TINY.quantizer, 8)
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(4, 16, 200)
        codebooks.initialise(quantizer, latent, generator)

        def distance() -> float:
            with torch.no_grad():
                seen = quantizer(latent)
            return float(sum((a - b).square().mean() for a, b in zip(seen.inputs, seen.entries, strict=True)))

        before = distance()
        dead = quantizer.codebooks()[0]
        dead.embedding_sum[3] = 1e3 * dead.cluster_usage[3]  # an entry far from everything
        dead.cluster_usage[3] = 1e-4
        replaced = 0
        for _ in range(60):
            replaced += codebooks.update(quantizer, quantizer(latent), generator)
        assert distance() < before
        assert replaced > 0
        assert float(dead.entries()[3].abs().max()) < 10.0

    def test_use_counts_distinct_entries(self) -> None:
        codes = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]])
        assert codebooks.use_of(codes, 4) == [0.25, 0.75]


class TestData:
    def test_batches_are_a_function_of_their_number(self, pcm: Path) -> None:
        speech = PackedSpeech(pcm, "train")
        one, two = (draw(speech, 3, 12, np.random.default_rng([5, 7])) for _ in range(2))
        assert torch.equal(one.audio, two.audio)
        assert one.audio.shape == (3, 12 * FRAME_SAMPLES)
        assert one.semantic.shape == (3, 12, 6)
        assert float(one.audio.abs().max()) <= 0.99

    def test_a_missing_side_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"training\.pack"):
            PackedSpeech(tmp_path, "train")


class TestTrainer:
    def test_reconstructs_as_the_served_codec_does(self) -> None:
        trainer = codec_model.CodecTrainer(TINY, 6).eval()
        torch.manual_seed(3)
        audio = torch.randn(2, 6 * FRAME_SAMPLES) * 0.1
        codebooks.initialise(trainer.mimi.quantizer, torch.randn(4, 16, 64), torch.Generator().manual_seed(1))
        trainer.mimi.unpack()
        with torch.no_grad():
            output, seen = trainer(audio, torch.ones(2, dtype=torch.bool))
            codes = trainer.mimi.encode_sequence(audio)
            pcm = trainer.mimi.decode_sequence(codes)
        assert torch.equal(seen.codes, codes)
        assert torch.allclose(output, pcm, atol=2e-5)

    def test_a_run_resumes_where_it_stopped_and_logs(
        self, pcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(codec_model, "CONFIG", TINY)
        monkeypatch.setattr(codec, "Discriminators", lambda: Discriminators(channels=4, scales=(256,)))
        preset = codec.CodecPreset(
            batch=2, frames=6, steps=20, peak=1e-3, adversarial_from=6, warmup=2, quantise_from=4, judge_warmup=4,
            validate_every=20,
        )  # fmt: skip
        folder = tmp_path / "run"
        cpu = torch.device("cpu")
        codec.train(dataclasses.replace(preset, steps=10), folder, pcm, Piece(0.0), cpu)
        saved = load_state(folder)
        assert saved is not None
        assert saved[1]["step"] == 10
        codec.train(preset, folder, pcm, Piece(0.0), cpu)
        saved = load_state(folder)
        assert saved is not None
        assert saved[1]["step"] == 20
        rows = Log(folder / "log.jsonl").read()
        assert rows[-1]["val_mel"] > 0.0
        assert {"mel", "wave", "commit", "semantic", "judge", "fooled", "features"} <= rows[-2].keys()

    def test_once_frozen_the_codes_stay_and_the_decoder_learns(
        self, pcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(codec_model, "CONFIG", TINY)
        preset = codec.CodecPreset(
            batch=2, frames=6, steps=8, peak=1e-3, adversarial_from=99, warmup=2, quantise_from=2, validate_every=99
        )
        folder, cpu = tmp_path / "run", torch.device("cpu")
        codec.train(preset, folder, pcm, Piece(0.0), cpu)
        before = load_state(folder)
        (folder / FROZEN).write_text("8\n")
        codec.train(dataclasses.replace(preset, decoder_steps=6), folder, pcm, Piece(0.0), cpu)
        after = load_state(folder)
        assert before is not None
        assert after is not None

        def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {n.removeprefix("mimi."): t for n, t in tensors.items() if n.startswith("mimi.")}

        old, new = weights(before[0]), weights(after[0])
        assert after[1]["step"] == 14
        assert codec_model.hearing_digest(old) == codec_model.hearing_digest(new)
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert any(name.startswith("decoder.") for name in changed)
        assert any("output_proj" in name for name in changed)
        assert not any(codec_model.hears(name) for name in changed)


class TestAdversarial:
    def test_ignorance_costs_two_and_equal_features_nothing(self) -> None:
        judge = Discriminators(channels=4, scales=(256, 128))
        torch.nn.init.zeros_(judge.scales[0].last.bias)
        sound = torch.randn(2, 4800)
        with torch.no_grad():
            heard = judge(sound)
            fooled, features = generator_losses(heard, heard)
            quiet = [verdict._replace(verdicts=torch.zeros_like(verdict.verdicts)) for verdict in heard]
        assert float(discriminator_loss(quiet, quiet)) == 2.0
        assert float(features) == 0.0
        assert float(fooled) == pytest.approx(-float(torch.stack([h.verdicts.mean() for h in heard]).mean()))

    def test_learns_to_tell_noise_from_tones(self) -> None:
        torch.manual_seed(0)
        judge = Discriminators(channels=4, scales=(256,))
        optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
        tones = torch.sin(torch.arange(4800) * torch.rand(4, 1))
        for _ in range(40):
            loss = discriminator_loss(judge(tones), judge(torch.randn(4, 4800)))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        assert float(loss.detach()) < 0.5
