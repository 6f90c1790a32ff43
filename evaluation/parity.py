"""Parity with the published code: `python -m evaluation.parity FOLDER [--modes] [--live] [--device cpu|cuda]`.

Repeats every golden run of FOLDER in fp32, alone and in slot 3 of 5 beside neighbours that join, talk, leave and
reset, and prints how far it was off; with --modes also in every other way that the device has to compute and to store.
Exits with 1 if a tolerance or a bound is missed, with 2 if FOLDER cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.golden import Golden, GoldenError, LmGolden, read_goldens, write_checkpoint
from evaluation.modes import measure_all, report_modes
from evaluation.play import play_lm, play_mimi
from evaluation.verdict import Row, compare_lm, compare_mimi, report
from models.checkpoint import CheckpointError, load_checkpoint
from models.checkpoint_tensors import check_shapes, lm_shapes, module_shapes
from models.config import LMConfig, MimiConfig
from models.lm import LanguageModel
from models.mimi import Mimi

SLOTS, SLOT = 5, 3


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="golden runs: *_golden.safetensors with weights and configs")
    parser.add_argument("--modes", action="store_true", help="in every mode: step, dtype, backend, with their bounds")
    parser.add_argument("--live", action="store_true", help="once more through the Ray actors that serve")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; 1 (default) is what a stage is served with"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
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
    met = all(row.met for row in rows)
    if options.modes:
        found = []
        for row in measure_all([golden for golden in goldens if isinstance(golden, LmGolden)], options.device):
            print(f"{row.mode.name}: {'not run' if row.not_run else 'done'}", file=sys.stderr, flush=True)
            found.append(row)
        print(f"\n{report_modes(found)}")
        met = met and all(row.met for row in found)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
