"""What `make gpu` runs on a machine with CUDA and torch alone: benchmarks at the 7B shape, then the tests marked gpu.

    PYTHONPATH=. python3 -m benchmarks.gpu --out out
    PYTHONPATH=. python3 -m benchmarks.gpu --only step capacity --limit-s 560    # a machine lent for ten minutes
    PYTHONPATH=. python3 -m benchmarks.gpu --resume                              # what is not in OUT/gpu.json yet
    PYTHONPATH=. python3 -m benchmarks.gpu --dry                                 # all of it on a CPU, on a tiny shape

Every part is a process of its own (benchmarks.gpu_parts); each figure is in OUT/gpu.json as soon as it is measured, so
that neither a time limit nor a crash loses one. At the end: what the figures had to reach, and whether they did.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from benchmarks.frame_plot import plot
from benchmarks.gpu_parts import PARTS, part_options
from benchmarks.gpu_report import Report, targets
from benchmarks.setting import pick_device, shapes_of

NO_DEVICE = 2
TESTS = "tests"
TESTS_LIMIT_S = 400.0  # most of it compiles kernels, a second each

# The machine has pytest, but none of the plugins that pyproject.toml configures.
PYTEST_INI = "[pytest]\nmarkers =\n    gpu: needs a CUDA device\n    full: takes long\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = part_options()
    parser.description = (__doc__ or "").split("\n")[0]
    parser.set_defaults(device="cuda")
    names = (*PARTS, TESTS)
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), help="these parts, in this order")
    parser.add_argument("--skip-tests", action="store_true", help="all parts but the tests")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="stop when so many seconds are over")
    parser.add_argument("--dry", action="store_true", help="on a CPU and a tiny shape, to try all of it out")
    arguments = parser.parse_args(argv)
    if arguments.dry:
        arguments.device, arguments.shape = "cpu", "tiny"
    try:
        device, (lm, _) = pick_device(arguments.device), shapes_of(arguments.shape)
    except ValueError as error:
        print(f"make gpu needs a CUDA GPU and a torch built for it: {error}", file=sys.stderr)
        return NO_DEVICE
    begun_s = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out / "gpu.json")
    if not arguments.resume:
        report.path.unlink(missing_ok=True)
    report.add("machine", {"shape": arguments.shape, **machine(device)})
    ended: dict[str, str] = dict(report.read().get("ended", {})) if arguments.resume else {}
    for name in arguments.only:
        left_s = arguments.limit_s - (time.monotonic() - begun_s)
        if ended.get(name) == "done" or (name == TESTS and arguments.skip_tests):
            continue
        if left_s <= 0:
            ended[name] = "no time was left for it"
        elif name == TESTS:
            results = run_tests(arguments.out, min(left_s, TESTS_LIMIT_S))
            report.add(TESTS, results)
            ended[name] = "done" if results["failed"] == 0 else "failed"
        else:
            ended[name] = _run_part(name, arguments, left_s)
        report.add("ended", ended)
        print(f"{name}: {ended[name]}, {time.monotonic() - begun_s:.0f} s since the beginning", flush=True)
    _conclude(report, lm.window)
    return 0 if all(how == "done" for how in ended.values()) else 1


def _run_part(name: str, arguments: argparse.Namespace, limit_s: float) -> str:
    """Runs one part in a process of its own; returns how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--out", str(arguments.out), "--resume"]
    command += ["--shape", arguments.shape, "--device", arguments.device, "--threads", str(arguments.threads)]
    command += ["--wheel", str(arguments.wheel)] if arguments.wheel else []
    try:
        done = subprocess.run(command, timeout=None if limit_s == float("inf") else limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    return "done" if done.returncode == 0 else f"failed with status {done.returncode}"


def _conclude(report: Report, window: int) -> None:
    """Prints what was to be reached, and draws the picture of the frames."""
    found = targets(report.read(), window)
    report.add("targets", [dataclasses.asdict(target) for target in found])
    for target in found:
        measured = "not measured" if target.measured is None else f"{target.measured:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[target.met]
        print(f"{target.what:58s} {target.must:>8s}  {measured:>12s}  {verdict}")
    rows = [row for row in report.read().get("step", []) if not row["kv"].startswith("float8")]
    if rows:
        plot(rows, report.path.with_name("gpu-frame.png"))
    print(f"all figures: {report.path}")


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


def run_tests(out: Path, limit_s: float = TESTS_LIMIT_S) -> dict[str, Any]:
    """Runs the tests marked gpu with what this machine has; returns their counts and the end of the output."""
    root = Path(__file__).resolve().parents[1]
    files = files_with_gpu_tests(root)
    if not files:
        return {"passed": 0, "failed": 0, "note": "there are no tests marked gpu"}
    xml = out / "gpu-tests.xml"
    with tempfile.TemporaryDirectory() as folder:
        ini = Path(folder) / "pytest.ini"
        ini.write_text(PYTEST_INI)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-c", str(ini), "--rootdir", str(root)]
        command += ["--import-mode=importlib", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += [f"--junitxml={xml}", *files]
        try:
            done = subprocess.run(command, cwd=root, timeout=limit_s, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"passed": 0, "failed": 1, "note": f"the tests took more than {limit_s:.0f} s"}
    print(done.stdout[-4_000:], flush=True)
    if not xml.exists():
        return {"passed": 0, "failed": 1, "note": (done.stdout + done.stderr)[-2_000:]}
    return _counts(xml)


def files_with_gpu_tests(root: Path) -> list[str]:
    """Those of the project's test modules that have tests for a GPU."""
    return [str(path) for path in sorted((root / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def _counts(xml: Path) -> dict[str, Any]:
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    assert suite is not None  # pytest always writes one
    number = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {"passed": number["tests"] - failed - number["skipped"], "failed": failed, "skipped": number["skipped"]}


if __name__ == "__main__":
    sys.exit(main())
