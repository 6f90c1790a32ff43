"""How far a repeated run was off, against the tolerances, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.golden import LmGolden, MimiGolden
from evaluation.play import LmOutcome

LOGITS_TOLERANCE = 2e-5
PCM_TOLERANCE = 2e-5
CODES_EQUAL = 0.99


@dataclass(frozen=True)
class Row:
    """One line of the verdict."""

    run: str
    measure: str
    value: str
    limit: str
    met: bool


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
