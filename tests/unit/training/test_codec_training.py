"""The codec's training: losses, an encoder that learns to hear, codebooks fitted to it, a decoder that learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import FRAME_SAMPLES, SAMPLE_RATE, CodecTransformerConfig, MimiConfig, QuantizerConfig, SeanetConfig
from models.mimi import Mimi
from training import codec, codec_model, fit_codebooks, hearing
from training.adversarial import Discriminators, discriminator_loss, generator_losses
from training.codec_data import PackedSpeech, _another_voice, draw
from training.codec_losses import SpectralLoss
from training.codec_model import CodecTrainer
from training.fit_codebooks import Sample
from training.folders import FROZEN, Log
from training.hearing import Hearing, HearingPreset
from training.piece import Piece
from training.spectrogram import BANDS, PER_FRAME, WIDTH, columns, mel_filters, sound
from training.state import load_state, save_state

CPU = torch.device("cpu")
_FEATURES = 12  # of the speech encoder
_DOWN = "downsample.conv.conv.conv.weight"
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
        np.save(tmp_path / f"{side}-000-semantic.npy", rng.standard_normal((frames, _FEATURES)).astype(np.float16))
    return tmp_path


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_model, "CONFIG", TINY)


def tone(hertz: float, frames: int) -> torch.Tensor:
    """[1, frames * 1920] at amplitude 0.3."""
    return 0.3 * torch.sin(2 * torch.pi * hertz / SAMPLE_RATE * torch.arange(frames * FRAME_SAMPLES))[None]


class TestSpectrogram:
    def test_filters_cover_every_band(self) -> None:
        assert torch.allclose(mel_filters(80, 513).sum(1), torch.ones(80), atol=1e-4)

    def test_columns_know_level_and_place(self) -> None:
        audio = torch.cat([torch.zeros(1, 5 * FRAME_SAMPLES), tone(1000.0, 5)], dim=1)
        heard = columns(audio).view(10, PER_FRAME, BANDS)
        assert heard.shape == (10, PER_FRAME, BANDS)
        # Silence is the floor, ln 1e-3, everywhere.
        assert torch.allclose(heard[:4], torch.full((4, PER_FRAME, BANDS), (np.log(1e-3) + 4) / 2))
        edges = np.linspace(2595 * np.log10(1 + 30 / 700), 2595 * np.log10(1 + 12_000 / 700), BANDS + 2)
        expected = int(np.argmin(np.abs(edges[1:-1] - 2595 * np.log10(1 + 1000 / 700))))
        assert set(heard[6:9].argmax(-1).flatten().tolist()) == {expected}

    def test_twice_as_loud_is_the_logarithm_of_two(self) -> None:
        noise = torch.randn(1, 8 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(0))
        difference = columns(2 * noise) - columns(noise)
        assert float(difference.mean()) == pytest.approx(np.log(2.0) / 2, abs=2e-3)

    def test_a_spectrogram_can_be_listened_to(self) -> None:
        audio = torch.cat([tone(300.0, 6), tone(2000.0, 6)], dim=1)
        wanted, again = columns(audio), sound(columns(audio))
        assert again.shape == audio.shape
        assert float((columns(again) - wanted).square().mean()) < 0.2 * float(wanted.var())
        steady = [1, 2, 3, 4, 7, 8, 9, 10]  # without the ends and the click in the middle
        loudest = [made.view(12, PER_FRAME, BANDS)[steady].argmax(-1) for made in (columns(again), wanted)]
        assert torch.equal(*loudest)


class TestLoss:
    def test_is_zero_for_equal_sounds_and_has_a_gradient_at_silence(self) -> None:
        loss = SpectralLoss(((256, 16),))
        silence = torch.zeros(1, 4800, requires_grad=True)
        logs, roots = loss(silence, torch.zeros(1, 4800))
        assert (float(logs.detach()), float(roots.detach())) == (0.0, 0.0)
        torch.autograd.backward(sum(loss(silence, torch.randn(1, 4800))))
        assert silence.grad is not None
        assert bool(torch.isfinite(silence.grad).all())

    def test_is_a_difference_of_levels(self) -> None:
        loss, noise = SpectralLoss(((512, 16),)), torch.randn(1, 24_000)
        # Ten times the amplitude is ln 10 in every band: beyond a nat, where half a nat is taken off.
        assert float(loss(10 * noise, noise)[0]) == pytest.approx(np.log(10.0) - 0.5, abs=5e-3)

    def test_what_is_nearly_silent_asks_for_little(self) -> None:
        loss, noise = SpectralLoss(), torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0))
        asked = []
        for level in (1e-5, 1e-3):  # the noise of 16 bits, and one as loud as the floor
            output = (level * noise).requires_grad_()
            torch.autograd.backward(loss(output, torch.zeros_like(noise))[0])
            assert output.grad is not None
            asked.append(float(output.grad.norm()))
        assert asked[0] < 0.1 * asked[1]


class TestHearing:
    def test_resumes_where_it_stopped_and_logs(self, pcm: Path, tmp_path: Path) -> None:
        preset = HearingPreset(batch=2, frames=6, steps=40, peak=3e-3, warmup=2, validate_every=20)
        folder = tmp_path / "run"
        hearing.train(dataclasses.replace(preset, steps=20), folder, pcm, Piece(0.0), CPU)
        saved = load_state(folder)
        assert saved is not None
        assert saved[1]["step"] == 20
        assert not any(name.startswith("mimi.decoder") for name in saved[0])
        hearing.train(preset, folder, pcm, Piece(0.0), CPU)
        model, step = hearing.load_hearing(folder, _FEATURES)
        assert step == 40
        assert not model.training
        rows = [row for row in Log(folder / "log.jsonl").read() if "val_columns" in row]
        assert [row["step"] for row in rows] == [20, 40]
        assert rows[1]["val_columns"] < rows[0]["val_columns"]

    def test_without_an_encoder_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"training\.hearing"):
            hearing.load_hearing(tmp_path, _FEATURES)


class TestFit:
    def test_k_means_finds_what_is_there(self) -> None:
        generator = torch.Generator().manual_seed(0)
        truth = torch.randn(4, 3, generator=generator) * 10
        points = truth[torch.randint(4, (400,), generator=generator)] + 0.01 * torch.randn(400, 3, generator=generator)
        centres = fit_codebooks.k_means(points, 16, generator, rounds=20)
        nearest = torch.cdist(truth, centres).amin(1)
        assert float(nearest.max()) < 0.05

    def test_axes_are_where_points_differ_most(self) -> None:
        points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 3.0])
        axes = fit_codebooks.principal_axes(points, 2).abs()
        assert axes[1, 0] > 0.99
        assert axes[2, 1] > 0.99

    def test_codes_tell_what_is_heard(self) -> None:
        """Columns read from codes miss no more than k-means leaves over and what lies outside of the axes."""
        torch.manual_seed(0)
        model = Hearing(TINY, _FEATURES).eval()
        audio = torch.randn(8, 12 * FRAME_SAMPLES) * torch.logspace(-3, -1, 8)[:, None]
        with torch.no_grad():
            heard = model.columns(model.latent(audio))
            sample = Sample(model.latent(audio).flatten(0, 1), heard.flatten(0, 1), torch.randn(96, _FEATURES))
            reading = fit_codebooks.fit(model.mimi, model, sample, torch.Generator().manual_seed(1))
            codes = model.mimi.encode_sequence(audio)
            told = fit_codebooks.columns_of(model.mimi, reading, codes)
        spread = (heard - heard.mean((0, 1))).square().mean()
        assert float((told - heard).square().mean()) < 0.05 * float(spread)
        # Eight axes of sixteen, seven codebooks of sixteen entries, 96 points: close, but not the points themselves.
        assert float((told - heard).abs().max()) > 0.0

    def test_both_positions_of_a_frame_hear_the_latent_and_differ(self) -> None:
        torch.manual_seed(0)
        config = dataclasses.replace(TINY, quantizer=dataclasses.replace(TINY.quantizer, dimension=2))
        model = Hearing(config, _FEATURES).eval()
        sample = Sample(torch.randn(64, 16), torch.randn(64, WIDTH), torch.randn(64, _FEATURES))
        fit_codebooks.fit(model.mimi, model, sample, torch.Generator().manual_seed(1))
        latent = torch.randn(1, 16, 3)
        with torch.no_grad():
            up = model.mimi.upsample(latent)
        first, second = up[0, :, ::2], up[0, :, 1::2]
        both = torch.tensor([True] * 4 + [False] * 4 + [True] * 4 + [False] * 4)
        assert torch.equal(first[both], latent[0, both])
        assert torch.equal(second[both], latent[0, both])
        assert torch.equal(first[4:8], latent[0, 4:8])
        assert torch.equal(second[12:], latent[0, 12:])
        assert not bool(second[4:8].any())
        assert not bool(first[12:].any())

    def test_use_counts_distinct_entries(self) -> None:
        codes = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]])
        assert fit_codebooks.use_of(codes, 4) == [0.25, 0.75]


class TestData:
    def test_batches_are_a_function_of_their_number(self, pcm: Path) -> None:
        speech = PackedSpeech(pcm, "train")
        one, two = (draw(speech, 3, 12, np.random.default_rng([5, 7])) for _ in range(2))
        assert torch.equal(one.audio, two.audio)
        assert one.audio.shape == (3, 12 * FRAME_SAMPLES)
        assert one.semantic.shape == (3, 12, _FEATURES)
        assert float(one.audio.abs().max()) <= 0.99

    def test_another_voice_has_another_pitch_and_the_same_level(self, tmp_path: Path) -> None:
        np.save(tmp_path / "train-000.npy", (20_000 * tone(200.0, 400)[0].numpy()).astype(np.int16))
        np.save(tmp_path / "train-000-semantic.npy", np.zeros((400, _FEATURES), dtype=np.float16))
        speech = PackedSpeech(tmp_path, "train")
        pitches = set()
        for seed in range(8):
            audio = _another_voice(speech, 20, np.random.default_rng(seed))
            assert audio.shape == (20 * FRAME_SAMPLES,)
            spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
            pitches.add(int(np.argmax(spectrum)) * SAMPLE_RATE / len(audio))
            assert float(np.sqrt(np.mean(audio**2))) == pytest.approx(0.3 * 20_000 / 32_768 / np.sqrt(2), rel=0.02)
        assert all(200 * 0.84 < pitch < 200 * 1.19 for pitch in pitches)
        assert len(pitches) > 5

    def test_what_is_to_be_spoken_is_drawn_clean(self, pcm: Path) -> None:
        speech = PackedSpeech(pcm, "train")
        batch = draw(speech, 64, 4, np.random.default_rng(1), clean=True)
        assert 0.85 < float(batch.spoken.float().mean()) < 1.0
        assert float(draw(speech, 64, 4, np.random.default_rng(1)).spoken.float().mean()) < 0.85

    def test_a_missing_side_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"training\.pack"):
            PackedSpeech(tmp_path, "train")


@pytest.fixture(name="fitted")
def _fitted(pcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A codec's folder with codebooks fitted to an encoder of four steps."""
    preset = HearingPreset(batch=2, frames=6, steps=4, peak=1e-3, warmup=2)
    hearing.train(preset, tmp_path / "hearing", pcm, Piece(0.0), CPU)
    _fit(tmp_path, pcm, monkeypatch)
    return tmp_path / "codec"


def _fit(state: Path, pcm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = ["--hearing", str(state / "hearing"), "--folder", str(state / "codec"), "--pcm", str(pcm)]
    monkeypatch.setattr("sys.argv", ["fit_codebooks", *folders, "--batches", "3"])
    monkeypatch.setattr("os.nice", lambda _by: 19)
    fit_codebooks.main()


class TestTrainer:
    def test_reconstructs_as_the_served_codec_does(self, fitted: Path) -> None:
        saved = load_state(fitted)
        assert saved is not None
        trainer = CodecTrainer(TINY).eval()
        trainer.load_state_dict({**trainer.state_dict(), **saved[0]})
        audio = torch.randn(2, 6 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(3)) * 0.1
        with torch.no_grad():
            output, said = trainer(audio)
            pcm = trainer.mimi.decode_sequence(trainer.mimi.encode_sequence(audio))
        assert said.shape == (2, 6, WIDTH)
        assert torch.allclose(output, pcm, atol=2e-5)

    def test_a_run_resumes_where_it_stopped_and_logs(
        self, fitted: Path, pcm: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(codec, "Discriminators", lambda: Discriminators(channels=4, scales=(256,)))
        preset = codec.CodecPreset(
            batch=2, frames=6, steps=40, peak=1e-3, adversarial_from=6, warmup=2, judge_warmup=4, validate_every=40
        )
        codec.train(dataclasses.replace(preset, steps=20), fitted, pcm, Piece(0.0), CPU)
        saved = load_state(fitted)
        assert saved is not None
        assert (saved[1]["step"], saved[1]["hearing_step"]) == (20, 4)
        codec.train(preset, fitted, pcm, Piece(0.0), CPU)
        saved = load_state(fitted)
        assert saved is not None
        assert saved[1]["step"] == 40
        rows = Log(fitted / "log.jsonl").read()
        assert rows[-1]["val_mel"] > 0.0
        assert {"mel", "loud", "columns", "judge", "fooled", "features"} <= rows[-2].keys()

    def test_the_codes_stay_and_the_decoder_learns(self, fitted: Path, pcm: Path) -> None:
        before = load_state(fitted)
        preset = codec.CodecPreset(batch=2, frames=6, steps=6, peak=1e-3, adversarial_from=None, warmup=2)
        codec.train(preset, fitted, pcm, Piece(0.0), CPU)
        after = load_state(fitted)
        assert before is not None
        assert after is not None

        def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {n.removeprefix("mimi."): t for n, t in tensors.items() if n.startswith("mimi.")}

        old, new = weights(before[0]), weights(after[0])
        assert codec_model.codes_digest(old) == codec_model.codes_digest(new)
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert any(name.startswith("decoder.") for name in changed)
        assert any(name.startswith("decoder_transformer.") for name in changed)
        assert any("output_proj" in name for name in changed)
        assert not any(codec_model.hears(name) for name in changed)

    def test_fitted_again_the_decoder_goes_on(
        self, fitted: Path, pcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        preset = codec.CodecPreset(batch=2, frames=6, steps=6, peak=1e-3, adversarial_from=None, warmup=2)
        codec.train(preset, fitted, pcm, Piece(0.0), CPU)
        spoken = load_state(fitted)
        _fit(tmp_path, pcm, monkeypatch)
        again = load_state(fitted)
        assert spoken is not None
        assert again is not None
        assert again[1]["step"] == 6
        last = "mimi.decoder.model.14.conv.conv.weight"
        assert torch.equal(again[0][last], spoken[0][last])

    def test_under_final_codebooks_a_better_encoder_finds_the_same_codes(
        self, fitted: Path, pcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The encoder learns its latent in another basis: the codes of the same sound have to stay."""
        (fitted / FROZEN).write_text("4")
        preset = codec.CodecPreset(batch=2, frames=6, steps=6, peak=1e-3, adversarial_from=None, warmup=2)
        codec.train(preset, fitted, pcm, Piece(0.0), CPU)
        before = load_state(fitted)
        model, step = hearing.load_hearing(tmp_path / "hearing", _FEATURES)
        turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q * 3.0
        with torch.no_grad():
            down = model.mimi.downsample.conv.inner.weight
            down.copy_(torch.einsum("ij,jkl->ikl", turn, down))
            for reading in (model.columns, model.features):
                reading.weight.copy_(reading.weight @ torch.linalg.inv(turn))
        save_state(tmp_path / "hearing", model.heard(), {"step": step + 5, "kind": "hearing"})
        _fit(tmp_path, pcm, monkeypatch)
        after = load_state(fitted)
        assert before is not None
        assert after is not None
        assert (after[1]["step"], after[1]["hearing_step"]) == (6, 9)
        audio = torch.randn(2, 12 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(3)) * 0.1
        codes = []
        for tensors, _ in (before, after):
            mimi = Mimi(TINY)
            mimi.load_state_dict({n.removeprefix("mimi."): t for n, t in tensors.items() if n.startswith("mimi.")})
            codes.append(mimi.eval().encode_sequence(audio))
        assert float((codes[0] == codes[1]).float().mean()) > 0.99
        assert not torch.equal(before[0]["mimi." + _DOWN], after[0]["mimi." + _DOWN])
        books = [name for name in before[0] if "_codebook." in name]
        assert all(torch.equal(before[0][name], after[0][name]) for name in books)
        old, new = ({n.removeprefix("mimi."): t for n, t in tensors.items()} for tensors, _ in (before, after))
        # The same codes nearly everywhere are not the same codes: what is encoded is encoded anew.
        assert codec_model.codes_digest(old) != codec_model.codes_digest(new)
        assert all(torch.equal(after[0][name], before[0][name]) for name in before[0] if "decoder" in name)

    def test_without_codebooks_says_what_to_run(self, pcm: Path, tmp_path: Path) -> None:
        preset = codec.CodecPreset(batch=2, frames=6, steps=6, peak=1e-3, adversarial_from=None)
        with pytest.raises(FileNotFoundError, match=r"training\.fit_codebooks"):
            codec.train(preset, tmp_path / "nothing", pcm, Piece(0.0), CPU)


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
