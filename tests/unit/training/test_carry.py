"""Speech that travelled: as long as it was, much the same, and a tenth of the size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.carry import pack, unpack
from training.codec_data import PackedSpeech


class TestCarry:
    def test_comes_back_much_the_same(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        source, carried, target = (tmp_path / name for name in ("pcm", "carry", "there"))
        source.mkdir()
        hidden = rng.standard_normal((400, 20)) @ rng.standard_normal((20, 64))
        tone = np.sin(np.arange(200 * 1920) / 13) * 9000
        for number, side in enumerate(("train", "val")):
            features = hidden[number * 200 : (number + 1) * 200].astype(np.float16)
            np.save(source / f"{side}-000.npy", tone.astype(np.int16))
            np.save(source / f"{side}-000-semantic.npy", features)
        size = pack(source, carried, shards=3)
        assert size < 0.2 * sum(path.stat().st_size for path in source.iterdir())

        assert unpack(carried, target) == 200
        speech = PackedSpeech(target, "train")
        assert speech.frames == 200
        original, back = np.load(source / "train-000.npy"), np.load(target / "train-000.npy")
        assert back.dtype == np.int16
        assert len(back) == len(original)
        assert np.corrcoef(original, back)[0, 1] > 0.99
        semantic = np.load(target / "val-000-semantic.npy").astype(np.float32)
        assert np.abs(semantic - np.load(source / "val-000-semantic.npy")).max() < 0.05 * np.abs(semantic).max()

    def test_nothing_packed_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"training\.pack"):
            pack(tmp_path, tmp_path / "carry", shards=1)
