"""Voice prompts in their three forms, hostile files, and names that clients make up."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyloudnorm
import pytest
import soundfile
import torch
from torch import Tensor

from models import voices as voices_module
from models.config import FRAME_SAMPLES, SAMPLE_RATE
from models.demo_checkpoint import random_mimi
from models.lm import LanguageModel
from models.mimi import Mimi
from models.prompt import build_prompt
from models.voice_recording import encode, normalise, voice_from_wav
from models.voices import (
    VoiceError,
    VoiceLibrary,
    VoicePrompt,
    VoiceShapes,
    read_codes,
    read_published,
    write_codes,
)
from tests.small_checkpoint import LM, MIMI, write_archive

SHAPES = VoiceShapes(LM.dim, LM.card, LM.text_card)
CODES = torch.randint(LM.card, (12, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    codec = Mimi(MIMI).eval()
    codec.load_state_dict(random_mimi(MIMI))
    return codec


def library(folder: Path | None = None, archive: Path | None = None, codec: Callable[[], Mimi] | None = None) -> Any:
    def no_codec() -> Mimi:
        raise AssertionError("no recording here")

    return VoiceLibrary(folder, archive, SHAPES, codec or no_codec)


def saved(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def published(**changes: Any) -> dict[str, Any]:
    """A voice as the published code saves one, of 5 frames."""
    cache = torch.randint(LM.card, (1, 17, 4), generator=torch.Generator().manual_seed(4))
    return {"embeddings": torch.randn(5, 1, 1, LM.dim).bfloat16(), "cache": cache, **changes}


def read(content: bytes) -> VoicePrompt:
    return read_published("X", content, dim=LM.dim, card=LM.card, text_card=LM.text_card)


# Codes


def test_codes_come_back_as_they_were_written() -> None:
    voice = read_codes("X", write_codes(CODES), card=LM.card)
    assert voice.codes is not None
    assert torch.equal(voice.codes, CODES)
    assert (voice.frames, voice.seconds) == (12, 0.96)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, 7, dtype=torch.int16), r"integers \[frames, 8\]"),
        (torch.zeros(3, 8), "float32"),
        (torch.zeros(0, 8, dtype=torch.int16), "0 frames"),
        (torch.full((3, 8), LM.card), "outside 0 … 63"),
        (torch.full((3, 8), -1), "outside 0 … 63"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: Tensor, message: str) -> None:
    content = voices_module.save_safetensors({"codes": codes})
    with pytest.raises(VoiceError, match=message):
        read_codes("X", content, card=LM.card)


def test_a_file_of_something_else_is_refused() -> None:
    with pytest.raises(VoiceError, match="not a safetensors file"):
        read_codes("X", b"RIFF", card=LM.card)
    with pytest.raises(VoiceError, match="one tensor `codes`"):
        read_codes("X", voices_module.save_safetensors({"code": CODES}), card=LM.card)


# The published form


def test_a_published_voice_gives_embeddings_and_cache() -> None:
    content = published()
    voice = read(saved(content))
    assert voice.embeddings is not None
    assert voice.cache is not None
    assert voice.codes is None
    assert torch.equal(voice.embeddings, content["embeddings"][:, 0, 0])
    assert torch.equal(voice.cache, content["cache"][0])
    assert voice.frames == 5


def test_a_published_voice_and_its_recording_make_the_same_prompt() -> None:
    """Records a voice as the published code does, and lays both out."""
    model = LanguageModel(LM)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(generator=torch.Generator().manual_seed(6))

    def laid_out(voice: VoicePrompt) -> Any:
        return build_prompt(LM, voice, [5, 6, 7], silence_codes=range(8), sine_codes=range(8, 16))

    plain = laid_out(VoicePrompt("X", codes=CODES))
    frames = len(CODES)
    columns = torch.from_numpy(plain.columns[: frames + 1].astype(np.int64))
    ring = torch.full((17, 4), -1)
    for column in range(frames - 3, frames + 1):
        ring[:, column % 4] = columns[column]
    # The ring's newest column holds the delayed streams alone: the others' next frame has not come yet.
    ring[torch.tensor(LM.delays) == 0, frames % 4] = -2
    embeddings = model.embed(columns[: frames - 1]).detach()
    recorded = read(saved({"embeddings": embeddings[:, None, None], "cache": ring[None]}))
    prompt = laid_out(recorded)
    assert np.array_equal(prompt.columns[frames - 1 :], plain.columns[frames - 1 :])
    assert np.array_equal(prompt.given, plain.given)
    assert prompt.embeddings is not None
    assert torch.equal(prompt.embeddings, embeddings)


class Attack:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "attacked"
    with pytest.raises(VoiceError, match="X: refused"):
        read(saved({**published(), "more": Attack(target)}))
    assert not target.exists()


@pytest.mark.parametrize("cut", [0, 1, 10, 200, 900])
def test_a_truncated_pt_is_refused(cut: int) -> None:
    with pytest.raises(VoiceError, match="X: refused"):
        read(saved(published())[:cut])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds list"),
        ({"embeddings": torch.zeros(1)}, r"holds \['embeddings'\]"),
        (published(embeddings=[1.0]), "must be tensors"),
        (published(embeddings=torch.zeros(5, LM.dim)), r"floats \[frames, 1, 1, 16\]"),
        (published(embeddings=torch.zeros(5, 1, 1, 4096)), "width 4096, this one has 16"),
        (published(embeddings=torch.zeros(0, 1, 1, LM.dim)), "0 frames"),
        (published(embeddings=torch.full((5, 1, 1, LM.dim), torch.nan)), "not finite"),
        (published(cache=torch.zeros(1, 17, 3, dtype=torch.int64)), r"integers \[1, 17, 4\]"),
        (published(cache=torch.zeros(1, 17, 4)), "float32"),
        (published(cache=torch.full((1, 17, 4), 5000)), "tokens this model does not have"),
        (published(cache=torch.full((1, 17, 4), -2)), "no complete column 5"),
    ],
)
def test_a_pt_of_another_shape_is_refused(content: Any, message: str) -> None:
    with pytest.raises(VoiceError, match=message):
        read(saved(content))


# Recordings


def recording(seconds: float = 3.0, rate: int = SAMPLE_RATE) -> npt.NDArray[np.float64]:
    time = np.arange(int(seconds * rate)) / rate
    return 0.1 * np.sin(2 * np.pi * 180 * time) * (1.2 + np.sin(2 * np.pi * 3 * time))


def test_a_recording_becomes_the_codes_of_its_normalised_samples(mimi: Mimi) -> None:
    samples = recording(3.01)
    voice = voice_from_wav(samples, SAMPLE_RATE, mimi)
    assert voice.codes is not None
    assert voice.frames == 38  # 37.6: the last frame is filled up
    pcm = normalise("X", samples, SAMPLE_RATE)
    padded = torch.zeros(38 * FRAME_SAMPLES)
    padded[: len(pcm)] = torch.from_numpy(pcm)
    with torch.inference_mode():
        assert torch.equal(voice.codes, mimi.encode_sequence(padded[None])[0])


def test_loudness_is_what_voices_are_trained_at() -> None:
    for gain in (0.01, 1.0, 5.0):
        pcm = normalise("X", recording() * gain, SAMPLE_RATE)
        assert pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(pcm.astype(np.float64)) == pytest.approx(-24, abs=0.01)


def test_rate_channels_and_sample_format_do_not_matter_much() -> None:
    expected = normalise("X", recording(), SAMPLE_RATE)
    stereo = normalise("X", np.stack([recording(), recording()], axis=1), SAMPLE_RATE)
    assert np.allclose(stereo, expected, atol=1e-6)
    resampled = normalise("X", recording(rate=16_000), 16_000)
    assert resampled.shape == expected.shape
    assert np.abs(resampled[2400:-2400] - expected[2400:-2400]).max() < 1e-3


def test_a_file_is_read_whatever_its_sample_format(mimi: Mimi, tmp_path: Path) -> None:
    samples = (recording() * 32_767).round().astype(np.int16)
    soundfile.write(tmp_path / "mine.wav", samples, SAMPLE_RATE)
    voice = voice_from_wav(tmp_path / "mine.wav", None, mimi)
    assert voice.name == "mine"
    assert voice.digest == voice_from_wav(samples, SAMPLE_RATE, mimi).digest


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (recording(2.9), SAMPLE_RATE, r"lasts 2\.9 s; a voice prompt has 3 to 10 s"),
        (recording(10.1), SAMPLE_RATE, r"lasts 10\.1 s"),
        (np.zeros(4 * SAMPLE_RATE), SAMPLE_RATE, "is silent"),
        (np.full(4 * SAMPLE_RATE, np.nan), SAMPLE_RATE, "finite"),
        (recording(), 0, "sample rate of 0 Hz"),
        (recording(), None, "their rate"),
        (recording().astype(np.int32), SAMPLE_RATE, "int32"),
    ],
)
def test_a_recording_that_is_no_voice_prompt_is_refused(
    samples: Any, rate: int | None, message: str, mimi: Mimi
) -> None:
    with pytest.raises(VoiceError, match=message):
        voice_from_wav(samples, rate, mimi)


def test_a_file_that_is_no_recording_is_refused(mimi: Mimi, tmp_path: Path) -> None:
    with pytest.raises(VoiceError, match="cannot be read"):
        voice_from_wav(tmp_path / "missing.wav", None, mimi)
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(VoiceError, match="not a sound file"):
        voice_from_wav(tmp_path / "text.wav", None, mimi)


def test_encoding_leaves_the_codec_as_it_was(mimi: Mimi) -> None:
    pcm = normalise("X", recording(), SAMPLE_RATE)
    assert torch.equal(encode(mimi, pcm), encode(mimi, pcm))


# The library


def test_voices_are_found_in_folder_and_archive(tmp_path: Path, mimi: Mimi) -> None:
    folder = tmp_path / "voices"
    folder.mkdir()
    (folder / "B.pt").write_bytes(saved(published()))
    (folder / "C.safetensors").write_bytes(write_codes(CODES))
    (folder / "notes.txt").write_text("no voice")
    soundfile.write(folder / "D.wav", recording(), SAMPLE_RATE)
    write_archive(tmp_path / "voices.tgz", {"voices/A.pt": saved(published()), "voices/._A.pt": b"mac"})
    found = library(folder, tmp_path / "voices.tgz", lambda: mimi)
    assert found.names() == ["A", "B", "C", "D"]
    assert found.has("A.pt")
    assert found.has("A")
    assert found.load("A.pt") is found.load("A")
    assert found.load("B").embeddings is not None
    assert torch.equal(found.load("C").codes, CODES)
    assert found.load("D").frames == 38
    assert found.load("D").name == "D"


def test_a_folder_goes_before_the_archive_and_codes_before_the_published_form(tmp_path: Path) -> None:
    write_archive(tmp_path / "voices.tgz", {"A.safetensors": write_codes(CODES), "A.pt": b"never read"})
    folder = tmp_path / "voices"
    folder.mkdir()
    (folder / "A.safetensors").write_bytes(write_codes(CODES[:4]))
    assert library(None, tmp_path / "voices.tgz").load("A").frames == 12
    assert library(folder, tmp_path / "voices.tgz").load("A").frames == 4


@pytest.mark.parametrize(
    "name", ["../secret", "../secret.pt", "/etc/passwd", "", ".", "A/../A", "a", "A.pt.pt", "x" * 9999]
)
def test_a_made_up_name_reads_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(write_codes(CODES))
    folder = tmp_path / "voices"
    folder.mkdir()
    (folder / "A.safetensors").write_bytes(write_codes(CODES))
    found = library(folder)
    assert not found.has(name)
    with pytest.raises(VoiceError, match="known voices: A") as raised:
        found.load(name)
    assert len(str(raised.value)) < 200


def test_an_archive_writes_nowhere_and_its_links_lead_nowhere(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.pt").write_bytes(saved(published()))
    with tarfile.open(inside / "voices.tgz", "w:gz") as archive:
        link = tarfile.TarInfo("voices/L.pt")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.pt")
        archive.addfile(link)
        for path in ("../../escaped.safetensors", "/absolute.safetensors"):
            entry = tarfile.TarInfo(path)
            entry.size = len(write_codes(CODES))
            archive.addfile(entry, io.BytesIO(write_codes(CODES)))
    before = sorted(tmp_path.rglob("*"))
    found = library(None, inside / "voices.tgz")
    assert found.names() == ["absolute", "escaped"]
    assert found.load("escaped").frames == 12
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_that_is_none_or_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "voices.tgz"
    path.write_bytes(b"no archive")
    with pytest.raises(VoiceError, match="cannot be read as an archive"):
        library(None, path).names()
    write_archive(path, {"A.pt": bytes(10_000)})
    monkeypatch.setattr(voices_module, "MAX_ARCHIVE_BYTES", 9_999)
    with pytest.raises(VoiceError, match="unpacks to more"):
        library(None, path).names()
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(VoiceError, match="cannot be read as an archive"):
        library(None, path).names()


def test_a_checkpoint_without_voices_says_so() -> None:
    assert library().names() == []
    with pytest.raises(VoiceError, match=r"neither voices/ nor voices\.tgz"):
        library().load("A")


def test_a_digest_follows_the_content_and_not_the_name() -> None:
    assert VoicePrompt("A", codes=CODES).digest == VoicePrompt("B", codes=CODES.clone()).digest
    assert VoicePrompt("A", codes=CODES).digest != VoicePrompt("A", codes=CODES + 1).digest
    first, second = (VoicePrompt("A", embeddings=torch.full((2, 4), x), cache=CODES) for x in (0.0, 1.0))
    assert first.digest != second.digest
