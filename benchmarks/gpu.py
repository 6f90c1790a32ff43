"""What `make gpu` runs: the GPU tests, then the frame at the 7B shape, on a machine with CUDA and torch alone.

    PYTHONPATH=. python3 -m benchmarks.gpu --out out

Writes OUT/gpu.json after every measurement, so that an interrupted run keeps what it has, and OUT/gpu-frame.png.
Ten minutes at most: it stops adding measurements when its time is up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.frame import KV_BACKENDS, FrameBench, FrameRow, line, pick_device, shapes_of
from graphs.backends import default_dtype

NO_DEVICE = 2
TESTS_LIMIT_S = 240.0  # most of it compiles kernels, a second each
WHOLE_LIMIT_S = 540.0  # of the ten minutes; the rest is for starting and the plot

SLOTS = (1, 8, 16, 32)
FP8_SLOTS = (32, 72)  # with keys and values in fp8, at a full context: the same load, and what they are for
CONTEXTS = (128, 1_000, 2_000, 2_999)  # just after the prompt … a full window

# The machine has pytest, but none of the plugins that pyproject.toml configures.
PYTEST_INI = "[pytest]\nmarkers =\n    gpu: needs a CUDA device\n    full: takes long\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--shape", default="7b", help="7b, demo, or a checkpoint's folder")
    parser.add_argument("--slots", type=int, nargs="+", default=list(SLOTS))
    parser.add_argument("--context", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--device", default="cuda", help="cpu only tries the script itself")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        device = pick_device(arguments.device)
        lm, mimi = shapes_of(arguments.shape)
    except ValueError as error:
        print(f"make gpu needs a CUDA GPU and a torch built for it: {error}", file=sys.stderr)
        return NO_DEVICE
    torch.set_num_threads(1)  # only matters where --device cpu tries the script
    begun_s = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = _Report(arguments.out / "gpu.json", {"shape": arguments.shape, **machine(device)})
    tests_ok = True
    if not arguments.skip_tests:
        results = run_tests(arguments.out)
        tests_ok = results.get("failed", 0) == 0
        report.add("tests", results)
    print("building the model with random weights", flush=True)
    bench = FrameBench(lm, mimi, device, default_dtype(device))
    rows: list[FrameRow] = []
    contexts = sorted({min(context, lm.window) for context in arguments.context})
    plans = [(slots, contexts, "model") for slots in arguments.slots]
    if device.type == "cuda":
        plans += [(slots, contexts[-1:], "fp8") for slots in FP8_SLOTS]
    for slots, fills, kv in plans:
        if time.monotonic() - begun_s > WHOLE_LIMIT_S:
            report.add("stopped", f"out of time before {slots} slots, kv {kv}")
            break
        try:
            for row in bench.measure(slots, fills, KV_BACKENDS[kv]):
                rows.append(row)
                print(line(row), flush=True)
                report.add("frames", [dataclasses.asdict(each) for each in rows])
        except torch.OutOfMemoryError:
            report.add("stopped", f"this device has no memory for {slots} slots of full context, kv {kv}")
    computed = [row for row in rows if not row.kv.startswith("float8")]
    if computed:
        plot(computed, arguments.out / "gpu-frame.png")
    print(f"{report.path} and {arguments.out / 'gpu-frame.png'} after {time.monotonic() - begun_s:.0f} s")
    return 0 if tests_ok else 1


class _Report:
    """A JSON file that is whole after every addition."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self._content = content

    def add(self, name: str, value: object) -> None:
        self._content[name] = value
        self.path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def machine(device: torch.device) -> dict[str, object]:
    """What the figures were measured on."""
    about: dict[str, object] = {"torch": torch.__version__, "python": platform.python_version(), "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return about


def run_tests(out: Path) -> dict[str, Any]:
    """Runs the tests marked gpu with what this machine has; returns their counts and the end of the output."""
    root = Path(__file__).resolve().parents[1]
    files = [str(path) for path in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        return {"passed": 0, "failed": 0, "note": "there are no tests marked gpu"}
    xml = out / "gpu-tests.xml"
    with tempfile.TemporaryDirectory() as folder:
        ini = Path(folder) / "pytest.ini"
        ini.write_text(PYTEST_INI)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-c", str(ini), "--rootdir", str(root)]
        command += ["--import-mode=importlib", "-p", "no:cacheprovider", f"--junitxml={xml}", *files]
        try:
            done = subprocess.run(command, cwd=root, timeout=TESTS_LIMIT_S, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"passed": 0, "failed": 1, "note": f"the tests took more than {TESTS_LIMIT_S:.0f} s"}
    print(done.stdout[-4_000:], flush=True)
    if not xml.exists():
        return {"passed": 0, "failed": 1, "note": (done.stdout + done.stderr)[-2_000:]}
    return _counts(xml)


def _counts(xml: Path) -> dict[str, Any]:
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert suite is not None  # pytest always writes one
    number = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {"passed": number["tests"] - failed - number["skipped"], "failed": failed, "skipped": number["skipped"]}


def plot(rows: Sequence[FrameRow], path: Path) -> None:
    """Frame time over slots, a line per context fill, with the step's roofline dashed and the budget in red."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib here, no plot; the JSON has all figures")
        return
    figure = Figure(figsize=(8, 5), dpi=130)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for context in sorted({row.context_frames for row in rows}):
        chosen = [row for row in rows if row.context_frames == context]
        slots = [row.slots for row in chosen]
        (drawn,) = axis.plot(slots, [row.frame_ms for row in chosen], "o-", label=f"{context} frames held")
        axis.plot(slots, [row.roofline_ms for row in chosen], ":", color=drawn.get_color())
    axis.axhline(80, color="#c0392b", linewidth=1)
    axis.text(rows[0].slots, 80.8, "80 ms, the budget", color="#c0392b", fontsize=8)
    axis.set_xlabel("conversations at once")
    axis.set_ylabel("encode + step + decode, ms (dotted: roofline of the step)")
    axis.set_title(f"One frame on {rows[0].device}, {rows[0].dtype}", loc="left")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
