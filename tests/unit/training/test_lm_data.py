"""Sequences: words on frames, dialogues behind prompts with delays and masks, and a model that learns from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import NO_INPUT, TEXT_END_OF_PAD, TEXT_PAD, LMConfig
from models.lm import LanguageModel
from models.prompt import build_prompt
from models.voices import VoicePrompt
from training import lm
from training.folders import Log
from training.kokoro import Word
from training.lm_data import Drawing, EncodedDialogues, Item, LMPart, Weights, begun_late, collate, columns_of, draw
from training.lm_forward import initialise
from training.piece import Piece
from training.state import load_state
from training.text_stream import text_stream

TINY = LMConfig(
    dim=16, text_card=30, dep_q=8, card=20, num_heads=2, num_layers=1, hidden_scale=4.0, context=64,
    depformer_dim=8, depformer_dim_feedforward=24, depformer_num_heads=2, depformer_num_layers=1,
)  # fmt: skip
SILENCE, SINE = (1,) * 8, (2,) * 8
VOICE = torch.arange(24).view(3, 8) % 20


def item(frames: int = 5, seed: int = 0) -> Item:
    rng = np.random.default_rng(seed)
    table = np.concatenate([rng.integers(4, 30, (frames, 1)), rng.integers(3, 20, (frames, 16))], axis=1)
    table[1::2, 0] = TEXT_PAD
    return Item(table.astype(np.int16), np.array([7, 8], dtype=np.int16), 0)


def collated(*frames: int, longest: int = 100, hide: float = 0.0, **how: float) -> LMPart:
    pairs = [columns_of(TINY, item(n), VOICE, SILENCE, SINE, Weights()) for n in frames]
    return collate(pairs, TINY, Drawing(len(frames), len(frames), longest, hide, **how), np.random.default_rng(3))


class TestTextStream:
    def test_words_begin_in_their_frame_behind_an_end_of_padding(self) -> None:
        words = [Word("ab", 0.16, 0.4), Word("c", 0.60, 0.8)]
        assert text_stream(words, 10, lambda w: [ord(c) for c in w]).tolist() == [3, 0, 97, 98, 3, 3, 0, 99, 3, 3]

    def test_a_word_still_being_written_pushes_the_next_back(self) -> None:
        words = [Word("abc", 0.0, 0.1), Word("d", 0.08, 0.2), Word("e", 0.16, 0.2)]
        assert text_stream(words, 6, lambda w: [ord(c) for c in w]).tolist() == [97, 98, 99, 100, 101, 3]

    def test_the_last_moment_of_a_frame_is_the_next_one(self) -> None:
        words = [Word("a", 0.165, 0.3), Word("b", 0.345, 0.4), Word("c", 0.625, 0.7)]  # frames 2, 4 and 8
        assert text_stream(words, 10, lambda w: [ord(c) for c in w]).tolist() == [3, 0, 97, 0, 98, 3, 3, 0, 99, 3]

    def test_what_does_not_fit_is_dropped(self) -> None:
        words = [Word("abc", 0.16, 0.3), Word("d", 0.5, 0.6)]
        assert text_stream(words, 4, lambda w: [ord(c) for c in w]).tolist() == [3, 0, 97, 98]


class TestColumns:
    def test_streams_are_delayed_and_the_prompt_counts_nothing(self) -> None:
        dialogue, weights = item(), Weights(text=1.0, padding=0.3, semantic=1.0, near=0.4, far=0.1)
        columns, counted = columns_of(TINY, dialogue, VOICE, SILENCE, SINE, weights)
        prompt = len(columns) - 5
        assert prompt == 3 + 6 + 2 + 6
        assert not counted[:prompt].any()
        live = columns[prompt:]
        assert (live[:, 0] == dialogue.frames[:, 0]).all()
        assert (live[:, [1, 9]] == dialogue.frames[:, [1, 9]]).all()
        assert (live[1:, 2:9] == dialogue.frames[:-1, 2:9]).all()
        assert (live[0, 2:9] == 1).all()  # the prompt's last silence
        assert (live[0, 10:] == 2).all()  # and its sine
        assert counted[prompt, 1] == 1.0
        assert not counted[prompt, 2:].any()
        assert counted[prompt + 1, 0] == pytest.approx(0.3)  # padding
        assert counted[prompt + 2].tolist() == pytest.approx([1.0, 1.0, *[0.4] * 3, *[0.1] * 4])

    def test_the_words_of_a_reading_are_not_learnt_as_text(self) -> None:
        dialogue = item()
        _, counted = columns_of(TINY, dialogue, VOICE, SILENCE, SINE, Weights())
        _, read = columns_of(TINY, dataclasses.replace(dialogue, reading=True), VOICE, SILENCE, SINE, Weights())
        text, words = dialogue.frames[:, 0], ~np.isin(dialogue.frames[:, 0], [TEXT_PAD, TEXT_END_OF_PAD])
        assert words.any()
        assert not words.all()
        assert not read[-len(text) :, 0][words].any()
        assert np.array_equal(read[-len(text) :, 0][~words], counted[-len(text) :, 0][~words])
        assert np.array_equal(read[:, 1:], counted[:, 1:])

    def test_what_is_not_to_be_learnt_counts_nothing_and_its_delayed_codes_a_frame_later(self) -> None:
        learnt = np.array([True, True, False, True, True])
        columns, counted = columns_of(TINY, dataclasses.replace(item(), learnt=learnt), VOICE, SILENCE, SINE, Weights())
        live = counted[len(columns) - 5 :]
        assert (live[:, :2] > 0).all(axis=1).tolist() == learnt.tolist()
        assert (live[1:, 2:] > 0).all(axis=1).tolist() == [True, True, False, True]

    def test_codes_that_are_not_there_are_not_learnt(self) -> None:
        dialogue = item()
        dialogue.frames[2, 1:9] = NO_INPUT
        columns, counted = columns_of(TINY, dialogue, VOICE, SILENCE, SINE, Weights())
        live = len(columns) - 5
        assert (columns[live + 2, 1], *columns[live + 3, 2:9]) == (NO_INPUT,) * 8
        assert (counted[live:, 1] > 0).tolist() == [True, True, False, True, True]
        assert (counted[live + 1 :, 2:] > 0).all(axis=1).tolist() == [True, True, False, True]
        assert counted[live:, 0].all(), "what is written there counts"

    def test_a_batch_is_padded_and_counts_one_position_earlier(self) -> None:
        batch = collated(5, 2)
        time = batch.columns.shape[1]
        assert batch.columns.shape == (2, 22, 17)
        assert batch.rows.tolist() == [16, 17, 18, 19, 20, time + 16, time + 17]
        assert (batch.columns[1, 19:, 1:] == -1).all()

    def test_long_sequences_are_cut(self) -> None:
        batch = collated(9, longest=20)
        assert batch.columns.shape[1] == 20
        assert batch.rows.tolist() == [16, 17, 18]

    def test_live_codes_are_hidden_from_the_input_alone(self) -> None:
        part = collated(200, longest=400, hide=0.25)
        changed = part.inputs != part.columns
        assert (part.inputs[changed] == -1).all()
        assert not changed[:, :17].any()  # the prompt
        assert 0.2 < float(changed[:, 18:, 1:].float().mean()) < 0.3
        assert not changed[:, :, 0].any()  # the text
        assert (collated(200, longest=400).inputs == collated(200, longest=400).columns).all()

    def test_its_own_voice_is_hidden_for_spells(self) -> None:
        part = collated(2000, longest=4000, deaf=0.5)
        unheard = (part.inputs != part.columns)[0]
        live = unheard[18:2016]
        assert not unheard[:17].any()
        assert not live[:, [0, *range(9, 17)]].any(), "text and user are shown"
        assert (live[:, 1:9].all(dim=1) == live[:, 1:9].any(dim=1)).all(), "all codes or none"
        assert 0.3 < float(live[:, 1].float().mean()) < 0.7
        assert int((live[1:, 1] != live[:-1, 1]).sum()) < 2000 / 20, "spells, not frames"

    def test_some_begin_behind_no_prompt_and_listen_first(self) -> None:
        columns, counted = columns_of(TINY, item(200), VOICE, SILENCE, SINE, Weights())
        for seed in range(20):
            late, counts = begun_late(columns, counted, np.random.default_rng(seed))
            assert 100 <= len(late) <= 200, "of its first half, and nothing of the prompt"
            assert (late == columns[-len(late) :]).all()
            assert not counts[:38].any()
            assert (counts[38:] == counted[-len(late) + 38 :]).all()
            assert counted[-len(late) :].any(axis=1).all(), "what was handed in stays as it was"

    def test_far_codes_are_learnt_at_some_frames(self) -> None:
        assert collated(400, longest=800).chosen.all()
        assert 0.15 < float(collated(400, longest=800, far=0.25).chosen.float().mean()) < 0.35


class TestTraining:
    @pytest.fixture(name="codes")
    def _codes(self, tmp_path: Path) -> Path:
        for side in ("train", "held_out"):
            items = [item(12, seed) for seed in range(2)]
            save_file(
                {
                    "frames": torch.from_numpy(np.concatenate([i.frames for i in items])),
                    "roles": torch.from_numpy(np.concatenate([i.role for i in items])),
                    "frame_ends": torch.tensor([12, 24]),
                    "role_ends": torch.tensor([2, 4]),
                    "voices": torch.tensor([0, 0]),
                },
                tmp_path / f"{side}-000.safetensors",
            )
        voices = {"prompt-00-0": VOICE.short(), "silence": torch.tensor(SILENCE), "sine": torch.tensor(SINE)}
        save_file(voices, tmp_path / "voices.safetensors")
        return tmp_path

    def test_shards_come_back_as_dialogues(self, codes: Path) -> None:
        data = EncodedDialogues(codes, "train")
        assert data.frames == 24
        assert (data.items[1].frames == item(12, 1).frames).all()
        batch = draw(data, TINY, Drawing(batch=3, part=2, longest=64), np.random.default_rng(0))
        assert [part.columns.shape for part in batch.parts] == [(2, 29, 17), (1, 29, 17)]
        assert batch.totals.tolist() == pytest.approx([3 * (6 + 6 * 0.3), 3 * 12])

    def test_readings_are_a_share_of_what_is_drawn(self, codes: Path) -> None:
        shard = load_file(codes / "train-000.safetensors")
        save_file({**shard, "readings": torch.tensor([True, False])}, codes / "train-001.safetensors")
        data = EncodedDialogues(codes, "train")
        assert (len(data.dialogues), len(data.readings)) == (3, 1)

        def share(readings: float) -> float:
            batch = draw(data, TINY, Drawing(400, 400, 64, readings=readings), np.random.default_rng(0))
            # Of a reading the words are not learnt as text: it counts less.
            counts = batch.parts[0].weights[:, 0].view(400, -1).sum(1)
            return float((counts < counts.max() - 1).float().mean())

        assert share(0.0) == 0.0
        assert 0.2 < share(0.3) < 0.4

    def test_lessons_in_listening_are_a_share_and_their_text_alone_is_learnt(self, codes: Path) -> None:
        shard = load_file(codes / "train-000.safetensors")
        shard["frames"][:12, 1:9] = NO_INPUT
        save_file(shard, codes / "train-001.safetensors")
        data = EncodedDialogues(codes, "train")
        assert (len(data.dialogues), len(data.lessons)) == (3, 1)

        def share(lessons: float) -> float:
            [part] = draw(data, TINY, Drawing(400, 400, 64, lessons=lessons), np.random.default_rng(0)).parts
            voiced = part.weights[:, 1:].reshape(400, -1).any(dim=1)
            assert part.weights[:, 0].reshape(400, -1).any(dim=1).all()
            return 1.0 - float(voiced.float().mean())

        assert share(0.0) == 0.0
        assert 0.2 < share(0.3) < 0.4

    def test_two_dialogues_are_learnt_by_heart(
        self, codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lm, "CONFIG", TINY)
        drawing = Drawing(batch=4, part=2, longest=64)
        preset = lm.LMPreset(drawing, steps=120, peak=2e-2, warmup=10, validate_every=60)
        folder = tmp_path / "run"
        cpu = torch.device("cpu")
        lm.train(dataclasses.replace(preset, steps=60), folder, codes, Piece(0.0), cpu)
        lm.train(preset, folder, codes, Piece(0.0), cpu, workers=2)
        saved = load_state(folder)
        assert saved is not None
        assert saved[1]["step"] == 120
        rows = [row for row in Log(folder / "log.jsonl").read() if "text" in row]
        assert rows[-1]["text"] < 0.5 * rows[0]["text"]
        assert rows[-1]["semantic"] < 0.5 * rows[0]["semantic"]


class TestServing:
    def test_a_served_conversation_is_laid_out_as_in_training(self) -> None:
        """What the engine read, live, is what training would make of the same conversation."""
        model = LanguageModel(TINY)
        initialise(model, torch.Generator().manual_seed(1))
        role = np.array([7, 8, 9], dtype=np.int16)
        prompt = build_prompt(
            TINY, VoicePrompt("v", codes=VOICE), role.tolist(), silence_codes=SILENCE, sine_codes=SINE
        )
        engine = SlotEngine(model.eval(), 1, tile=16)
        engine.open(0, prompt, Sampling(), seed=3)
        user = np.random.default_rng(5).integers(0, 20, (12, 8)).astype(np.int16)
        while not engine.step([], np.zeros((0, 8), dtype=np.int16)).ready:
            pass
        steps = [engine.step([0], user[n : n + 1]) for n in range(len(user))]
        read = np.concatenate([step.journal for step in steps])
        said = np.concatenate([step.tokens for step in steps])

        frames = np.concatenate([said, user], axis=1).astype(np.int16)
        columns, _ = columns_of(TINY, Item(frames, role, 0), VOICE, SILENCE, SINE, Weights())
        assert (columns[: prompt.frames] == prompt.columns).all()
        assert (columns[prompt.frames :] == read).all()
