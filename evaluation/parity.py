"""Parity with the published code: `python -m evaluation.parity FOLDER [--live] [--device cpu|cuda]`.

Repeats every golden run of FOLDER in fp32, alone and in slot 3 of 5 beside neighbours that join, talk, leave and
reset, and prints how far it was off. Exits with 1 if a tolerance is missed, with 2 if FOLDER cannot be read.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.crowd import Crowd
from evaluation.golden import Golden, GoldenError, LmGolden, MimiGolden, read_goldens, write_checkpoint
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.checkpoint import CheckpointError, load_checkpoint
from models.checkpoint_tensors import check_shapes, lm_shapes, module_shapes
from models.config import (
    AUDIO_CODEBOOKS,
    FRAME_SAMPLES,
    PUBLISHED_SILENCE_CODES,
    PUBLISHED_SINE_CODES,
    LMConfig,
    MimiConfig,
)
from models.lm import LanguageModel
from models.mimi import Mimi
from models.prompt import Prompt, build_prompt
from models.voices import VoicePrompt

LOGITS_TOLERANCE = 2e-5
PCM_TOLERANCE = 2e-5
CODES_EQUAL = 0.99

SLOTS, SLOT = 5, 3
GREEDY = Sampling(text_temperature=0.0, text_top_k=1, audio_temperature=0.0, audio_top_k=1)


@dataclass(frozen=True)
class Row:
    """One line of the verdict."""

    run: str
    measure: str
    value: str
    limit: str
    met: bool


class UnboundedEngine(SlotEngine):
    """A golden prompt may be longer than a small model's window; a server would refuse it, the arithmetic does not."""

    @property
    def prompt_limit(self) -> int:
        return sys.maxsize


@dataclass(frozen=True)
class LmOutcome:
    """What our engine made of a golden run, in the golden run's alignment."""

    tokens: Tensor  # [N, 17] int64
    text_logits: Tensor  # [N, text_card]
    audio_logits: Tensor  # [N, 8, card]


def play_lm(model: LanguageModel, golden: LmGolden, slots: int, slot: int) -> LmOutcome:
    """Runs a golden conversation in `slot` of an engine of `slots`; all other slots belong to a crowd."""
    engine = UnboundedEngine(model, slots)
    crowd = Crowd(engine, model.config, [other for other in range(slots) if other != slot])
    pauses = random.Random(1)
    probed: list[tuple[Tensor, Tensor]] = []
    engine.frame_step.probe = lambda text, audio: probed.append((text.cpu(), audio.cpu()))
    text_logits: list[Tensor] = []
    audio_logits: list[Tensor] = []
    prompt = golden_prompt(model.config, golden)
    tokens = [last_prompt_frame(model.config, prompt)]
    engine.open(slot, prompt, GREEDY, seed=0)
    live = False
    while len(text_logits) < len(golden.user):
        talking, codes = crowd.tick()
        # With neighbours the golden conversation sits out some steps: time passes per slot, not per step.
        if live and (slots == 1 or pauses.random() < 0.8):
            place = pauses.randrange(len(talking) + 1)
            heard = golden.user[len(text_logits) - 1].numpy().astype(np.int16)
            talking.insert(place, slot)
            codes = np.insert(codes, place, heard, axis=0)
        probed.clear()
        out = engine.step(talking, codes)
        crowd.ready(out.ready)
        drawn = [*talking, *out.ready]
        if slot not in drawn:
            continue
        text, audio = probed[0]
        text_logits.append(text[drawn.index(slot)])
        audio_logits.append(audio[drawn.index(slot)])
        if live:
            heard = codes[talking.index(slot)]
            tokens.append(np.concatenate([out.tokens[talking.index(slot)], heard]))
        live = True
    return LmOutcome(
        torch.from_numpy(np.stack(tokens).astype(np.int64)), torch.stack(text_logits), torch.stack(audio_logits)
    )


def golden_prompt(config: LMConfig, golden: LmGolden) -> Prompt:
    """The golden run's system prompt. Silence and sine are the published codec's, as in the published code."""
    return build_prompt(
        config,
        VoicePrompt("golden", codes=golden.voice),
        golden.role_tokens,
        silence_codes=PUBLISHED_SILENCE_CODES,
        sine_codes=PUBLISHED_SINE_CODES,
    )


def last_prompt_frame(config: LMConfig, prompt: Prompt) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    """The frame that the prompt ends with, de-delayed: [17]."""
    delayed = np.array(config.delays) > 0
    return np.where(delayed, prompt.given, prompt.columns[-1]).astype(np.int16)


def compare_lm(run: str, golden: LmGolden, outcome: LmOutcome) -> list[Row]:
    """The verdict on a language model's run."""
    steps = len(golden.tokens)
    equal = int((outcome.tokens == golden.tokens).all(1).sum())
    text_error = largest(outcome.text_logits - golden.text_logits)
    audio_error = largest(outcome.audio_logits[:: golden.every] - golden.audio_logits)
    return [
        Row(run, "steps with equal tokens", f"{equal}/{steps}", f"{steps}", equal == steps),
        Row(run, "text logits, largest error", f"{text_error:.1e}", f"{LOGITS_TOLERANCE:.0e}", within(text_error)),
        Row(run, "audio logits, largest error", f"{audio_error:.1e}", f"{LOGITS_TOLERANCE:.0e}", within(audio_error)),
    ]


@torch.inference_mode()
def play_mimi(mimi: Mimi, golden: MimiGolden, slots: int, slot: int) -> tuple[Tensor, Tensor]:
    """Streams a golden run in one of `slots` → codes [N, 8] of its PCM, and PCM [N, 1920] of its expected codes.

    The other slots stream noise, pause and start afresh; with neighbours, this one pauses too.
    """
    device = next(mimi.parameters()).device
    encoder, decoder = mimi.init_encoder_state(slots, device=device), mimi.init_decoder_state(slots, device=device)
    noise = torch.Generator().manual_seed(11)
    chance = random.Random(13)
    codes: list[Tensor] = []
    pcm: list[Tensor] = []
    while len(codes) < len(golden.codes):
        frame = len(codes)
        heard = torch.randn(slots, FRAME_SAMPLES, generator=noise)
        said = torch.randint(mimi.config.quantizer.bins, (slots, AUDIO_CODEBOOKS), generator=noise)
        heard[slot], said[slot] = golden.pcm_in[frame], golden.codes[frame]
        active = torch.tensor([slots == 1 or chance.random() < 0.8 for _ in range(slots)])
        for other in range(slots):
            if other != slot and chance.random() < 0.1:
                encoder.reset(other)
                decoder.reset(other)
        new_codes = mimi.encode_frame(heard.to(device), encoder, active.to(device))
        new_pcm = mimi.decode_frame(said.to(device), decoder, active.to(device))
        if active[slot]:
            codes.append(new_codes[slot].cpu())
            pcm.append(new_pcm[slot].cpu())
    return torch.stack(codes), torch.stack(pcm)


def compare_mimi(run: str, golden: MimiGolden, codes: Tensor, pcm: Tensor) -> list[Row]:
    """The verdict on a codec's run. The PCM was decoded from the expected codes, so it is comparable throughout."""
    equal, total = int((codes == golden.codes).sum()), golden.codes.numel()
    error = largest(pcm - golden.pcm_out)
    return [
        Row(run, "equal codes", f"{equal}/{total}", f"{CODES_EQUAL:.0%}", equal >= CODES_EQUAL * total),
        Row(run, "PCM, largest error", f"{error:.1e}", f"{PCM_TOLERANCE:.0e}", error <= PCM_TOLERANCE),
    ]


def largest(difference: Tensor) -> float:
    """The largest magnitude; a NaN anywhere is infinitely wrong."""
    return float(torch.nan_to_num(difference.abs(), nan=torch.inf).max())


def within(error: float) -> bool:
    return error <= LOGITS_TOLERANCE


def run_golden(golden: Golden, device: str) -> list[Row]:
    """One golden run, alone and in slot 3 of 5."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        folder = write_checkpoint(golden, Path(scratch))
        part = "lm" if isinstance(golden, LmGolden) else "mimi"
        checkpoint = load_checkpoint(folder, device=device, dtype=torch.float32, parts=frozenset({part}))
    for where, slots, slot in (("alone", 1, 0), (f"slot {SLOT} of {SLOTS}", SLOTS, SLOT)):
        run = f"{golden.name}, {where}"
        if isinstance(golden, LmGolden):
            assert checkpoint.lm is not None
            rows += compare_lm(run, golden, play_lm(checkpoint.lm, golden, slots, slot))
        else:
            assert checkpoint.mimi is not None
            rows += compare_mimi(run, golden, *play_mimi(checkpoint.mimi, golden, slots, slot))
    return rows


def check_manifests(folder: Path) -> list[Row]:
    """Whether our modules have exactly the published tensors, for each manifest that lies in the folder."""
    rows: list[Row] = []
    for name in ("lm_7b_state_dict.json", "mimi_state_dict.json"):
        path = folder / name
        if not path.is_file():
            continue
        stored = {key: tuple(shape) for key, (shape, _) in json.loads(path.read_text(encoding="utf-8")).items()}
        if name.startswith("lm"):
            expected = lm_shapes(LanguageModel(LMConfig(), device="meta"), LMConfig().dep_q)
        else:
            with torch.device("meta"):
                expected = module_shapes(Mimi(MimiConfig()))
        try:
            check_shapes(stored, expected, name)
            rows.append(Row(name, "tensors by name and shape", f"{len(stored)}/{len(expected)}", "all", True))
        except CheckpointError as error:
            rows.append(Row(name, "tensors by name and shape", str(error), "all", False))
    return rows


def report(rows: Sequence[Row]) -> str:
    """The verdict as a table of plain text."""
    head = Row("run", "measure", "found", "tolerance", True)
    lines = [(row.run, row.measure, row.value, row.limit) for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    marks = ["", *("ok" if row.met else "MISSED" for row in rows)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    missed = sum(not row.met for row in rows)
    verdict = f"{missed} of {len(rows)} tolerances missed" if missed else f"all {len(rows)} tolerances met"
    return "\n".join([*(f"{line}  {mark}".rstrip() for line, mark in zip(table, marks, strict=True)), verdict])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="golden runs: *_golden.safetensors with weights and configs")
    parser.add_argument("--live", action="store_true", help="once more through the Ray actors that serve")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args(arguments)
    # TF32 would round products to 10 bits; parity is about fp32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        goldens = read_goldens(options.folder)
        rows = check_manifests(options.folder)
        for golden in goldens:
            rows += run_golden(golden, options.device)
        if options.live:
            from evaluation.parity_live import run_live  # Ray is only needed here

            rows += run_live(goldens, options.device)
    except (GoldenError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report(rows))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
