"""Parity in every mode: each way to compute and to store, against the published code's golden run, with its bound.

    python -m evaluation.parity tests/data --modes [--device cuda]

A mode is exact, or its error has a bound. Where it rounds, tokens may differ from the published ones (the golden run's
closest choice is decided by 2e-4), and after the first that differs the two hold different conversations. So errors are
measured with every token given: all logits of all columns, beside the published ones. Within a mode nothing may differ:
the same conversation in other company, and in a paged cache, has to come out in the same bits.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.golden import LmGolden, write_checkpoint
from evaluation.play import GREEDY, LmOutcome, golden_prompt, play_lm
from evaluation.verdict import LOGITS_TOLERANCE, largest
from graphs.backends import Backends, make_cache
from graphs.frame_step import GENERATED, Emit, FrameStep
from graphs.kv_cache import KVCache, Span
from graphs.sampling import HAS_NUMBA
from graphs.slot_engine import DEFAULT_TILE
from models.checkpoint import load_checkpoint
from models.lm import LanguageModel
from models.prompt import next_column

SLOTS, SLOT = 5, 3
PAGED = 1.5  # contexts promised for each that there is memory for
FP32, BF16 = torch.float32, torch.bfloat16
# Relative errors of the logits, each about twice what was measured.
BF16_BOUND = 0.011  # weights, activations and sums between kernels in bf16: 5.3e-3
BF16_READ_BOUND = 0.006  # weights and KV read as bf16, all arithmetic in fp32: 2.8e-3
BF16_KV_BOUND = 1e-4  # keys and values alone: 4.4e-5
FP8_KV_BOUND = 1.5e-3  # 6.5e-4
INT8_BOUND = 0.012  # all weights: 6.4e-3


@dataclass(frozen=True)
class Mode:
    """One way to compute. bound: of the logits' relative error; 0 is exact: all tokens, all logits within 2e-5."""

    name: str
    dtype: torch.dtype
    backends: Backends
    bound: float = 0.0
    needs: str = ""  # a package, or onednn, that a machine may lack

    def missing(self) -> str:
        """Why this machine cannot run it; empty if it can."""
        if self.needs == "onednn":
            if not HAS_NUMBA:
                return "the package numba is not installed"
            from graphs.products import onednn_available  # which needs it

            return "" if onednn_available() else "this torch has no prepacked oneDNN products"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"the package {self.needs} is not installed"
        return ""


def modes(device: str = "cpu") -> list[Mode]:
    """Every mode that a device has, installed here or not."""
    static = [
        Mode("static fp32", FP32, Backends(step="static")),
        Mode("static fp32, KV fp8", FP32, Backends(step="static", kv_dtype="fp8"), FP8_KV_BOUND),
        Mode("static bf16", BF16, Backends(step="static"), BF16_BOUND),
        Mode("static bf16, KV fp8", BF16, Backends(step="static", kv_dtype="fp8"), BF16_BOUND),
    ]
    portable = [
        Mode("torch fp32", FP32, Backends(step="torch")),
        Mode("torch bf16", BF16, Backends(step="torch"), BF16_BOUND),
    ]
    if device.startswith("cuda"):
        static = [replace(mode, needs="triton") for mode in static]
        attention = Backends(step="static", attention="vllm")
        return [*static, *portable, Mode("static bf16, vLLM's attention", BF16, attention, BF16_BOUND, "vllm")]
    compiled, numba = Backends(step="compiled"), "numba"
    return [
        *portable,
        Mode("compiled fp32", FP32, compiled, 0.0, numba),
        Mode("compiled fp32, KV bf16", FP32, replace(compiled, kv_dtype="bfloat16"), BF16_KV_BOUND, numba),
        Mode("compiled bf16", BF16, compiled, BF16_READ_BOUND, numba),
        Mode("compiled fp32, weights int8", FP32, replace(compiled, linear="int8"), INT8_BOUND, numba),
        Mode("compiled bf16, weights int8", BF16, replace(compiled, linear="int8"), INT8_BOUND, numba),
        Mode("compiled bf16, oneDNN bf16", BF16, replace(compiled, linear="onednn"), BF16_READ_BOUND, "onednn"),
        Mode("compiled bf16, vLLM bf16", BF16, replace(compiled, linear="vllm"), BF16_READ_BOUND, "vllm"),
        Mode("compiled bf16, vLLM int8", BF16, replace(compiled, linear="vllm-int8"), INT8_BOUND, "vllm"),
        Mode("compiled bf16, vLLM's attention", BF16, replace(compiled, attention="vllm"), BF16_BOUND, "vllm"),
        *static,
    ]


@dataclass(frozen=True)
class ModeRow:
    """What a golden run came to in one mode. Errors are relative (norm over norm) and over all columns, tokens given;
    chosen: of those columns' most likely tokens, how many are the published ones."""

    mode: Mode
    text_error: float = 0.0
    audio_error: float = 0.0
    chosen: float = 0.0
    largest_error: float = 0.0  # of any logit
    steps: str = ""  # that a greedy run spoke as published, before it said something else
    same_in_company: bool = False
    same_in_pages: bool = False
    not_run: str = ""

    @property
    def met(self) -> bool:
        if self.not_run:
            return True
        if self.mode.bound:
            near = max(self.text_error, self.audio_error) <= self.mode.bound
        else:
            said, of = self.steps.split("/")
            near = self.largest_error <= LOGITS_TOLERANCE and said == of
        return near and self.same_in_company and self.same_in_pages


def measure(golden: LmGolden, mode: Mode, device: str = "cpu") -> ModeRow:
    """Repeats a golden run in one mode: with its tokens given, freely, in company, and in pages."""
    missing = mode.missing()
    if missing:
        return ModeRow(mode, not_run=missing)
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        folder = write_checkpoint(golden, Path(scratch))
        model = load_checkpoint(folder, device=device, dtype=mode.dtype, parts=frozenset({"lm"})).lm
    assert model is not None
    tile, place = DEFAULT_TILE, model.device
    try:
        cache = make_cache(model.config, 1, tile, device=place, dtype=mode.dtype, backend=mode.backends)
    except ValueError as error:  # heads that a library has no kernel for
        return ModeRow(mode, not_run=str(error))
    text, audio = forced_logits(golden, model, cache, mode.backends)
    wanted_text = golden.text_logits[: len(text)]
    wanted_audio = golden.audio_logits[: -(-len(audio) // golden.every)]
    audio = audio[:: golden.every]
    # In engines of one shape: on CUDA the number of slots decides how rows are padded.
    slots = SLOTS if place.type == "cuda" else 1
    alone = play_lm(model, golden, slots, 0, mode.backends, neighbours=False)
    company = play_lm(model, golden, SLOTS, SLOT, mode.backends)
    paged = play_lm(model, golden, slots, 0, replace(mode.backends, kv_overcommit=PAGED), neighbours=False)
    same = (alone.tokens == golden.tokens).all(1).long().cumprod(0).sum()
    likeliest = [(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in ((text, wanted_text), (audio, wanted_audio))]
    return ModeRow(
        mode,
        text_error=relative(text, wanted_text),
        audio_error=relative(audio, wanted_audio),
        chosen=float(torch.cat(likeliest).float().mean()),
        largest_error=max(largest(text - wanted_text), largest(audio - wanted_audio)),
        steps=f"{int(same)}/{len(golden.tokens)}",
        same_in_company=same_bits(alone, company),
        same_in_pages=same_bits(alone, paged),
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """The error's norm over that of what was wanted; a NaN is infinitely wrong."""
    return float(torch.nan_to_num((found - wanted).norm() / wanted.norm(), nan=torch.inf))


def same_bits(one: LmOutcome, other: LmOutcome) -> bool:
    pairs = ((one.tokens, other.tokens), (one.text_logits, other.text_logits), (one.audio_logits, other.audio_logits))
    return all(torch.equal(a, b) for a, b in pairs)


def forced_columns(golden: LmGolden, model: LanguageModel) -> npt.NDArray[np.int16]:
    """[prompt + N - 1, 17]: the golden run's input columns, each complete: the prompt's, then those as published."""
    prompt = golden_prompt(model.config, golden)
    expected, user = golden.tokens.numpy(), golden.user.numpy().astype(np.int16)
    pending = np.full(expected.shape[1], -2, dtype=np.int16)
    delayed = np.array(model.config.delays[:GENERATED]) > 0
    columns, before = list(prompt.columns), prompt.given[GENERATED:].astype(np.int16)
    for frame in range(len(expected) - 2):
        pending[:GENERATED] = np.where(delayed, expected[frame, :GENERATED], expected[frame + 1, :GENERATED])
        columns.append(next_column(model.config, pending, user[frame], before))
        before = user[frame]
    return np.stack(columns).astype(np.int16)


@torch.inference_mode()
def forced_logits(
    golden: LmGolden, model: LanguageModel, cache: KVCache, backends: Backends | None = None
) -> tuple[Tensor, Tensor]:
    """Text [N - 2, card] and audio [N - 2, 8, card] logits with every token given, those of the depth steps too; rows
    as in the golden run."""
    step = FrameStep(model, cache, backends=backends)
    text: list[Tensor] = []
    audio: list[Tensor] = []

    def probe(text_logits: Tensor, audio_logits: Tensor) -> None:
        text.append(text_logits[0].float().cpu())
        audio.append(audio_logits[0].float().cpu())

    step.probe = probe
    columns = forced_columns(golden, model)
    for first in range(len(columns) - 1):
        given = columns[first + 1][:GENERATED].clip(min=0)
        step.run(columns[first : first + 1], [Span(0, 1, 0, first)], [Emit(0, first + 1, given, GREEDY, 0)])
    start = len(columns) - (len(golden.tokens) - 2) - 1  # the prompt's last row
    return torch.stack(text[start:]), torch.stack(audio[start:])


def measure_all(goldens: Sequence[LmGolden], device: str) -> Iterator[ModeRow]:
    """Row after row; an exact mode's place in the table is the same wherever it runs."""
    for golden in goldens:
        for mode in modes(device):
            yield measure(golden, mode, device)


HEAD = ("mode", "text", "audio", "bound", "likeliest kept", "greedy, as published", "company", "pages")


def cells(row: ModeRow) -> tuple[str, ...]:
    """A row as the table shows it."""
    if row.not_run:
        return (row.mode.name, f"not run: {row.not_run}")
    bound = f"{row.mode.bound:.1e}" if row.mode.bound else f"{LOGITS_TOLERANCE:.0e} each"
    same = ("same bits" if same else "OTHER BITS" for same in (row.same_in_company, row.same_in_pages))
    errors = (row.text_error, row.audio_error)
    return (row.mode.name, *(f"{error:.1e}" for error in errors), bound, f"{row.chosen:.1%}", row.steps, *same)


def report_modes(rows: Sequence[ModeRow]) -> str:
    """The table in plain text."""
    table = [HEAD, *(cells(row) for row in rows)]
    full = [line for line in table if len(line) == len(HEAD)]
    widths = [max(len(line[column]) for line in full) for column in range(len(HEAD))]
    widths[0] = max(len(line[0]) for line in table)
    marks = ["", *("" if row.not_run else "ok" if row.met else "MISSED" for row in rows)]
    lines = [
        ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) + f"  {mark}").rstrip()
        for line, mark in zip(table, marks, strict=True)
    ]
    run = [row for row in rows if not row.not_run]
    missed = sum(not row.met for row in run)
    verdict = f"{missed} of {len(run)} modes missed" if missed else f"all {len(run)} modes that ran hold"
    return "\n".join([*lines, verdict])
