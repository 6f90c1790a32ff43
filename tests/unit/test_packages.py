"""The folders are the packages, and those that run on a bare GPU machine need torch, numpy and safetensors alone."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

# Of our dependencies, what a GPU machine without network has.
ON_A_BARE_MACHINE = {"torch", "numpy", "safetensors"}

# The CPU's compiled step, imported only where there is a numba. (Triton comes with torch's CUDA builds.)
COMPILED = re.compile(r"graphs\.(attention_cpu|compiled.*)")
# What has to run anywhere: the portable engine, and the benchmarks that compare everything with it.
PORTABLE = ("graphs.engine", "benchmarks.frame", "benchmarks.gpu")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_comes_from_this_folder(package: str) -> None:
    """An installed package of the same name (`models`, `tests`) would otherwise be found first, and run."""
    found = importlib.import_module(package).__file__
    assert found is not None
    assert Path(found).resolve() == ROOT / package / "__init__.py"


def test_every_folder_with_code_is_a_package_that_is_shipped_and_checked() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders == set(PACKAGES)
    assert set(PROJECT["tool"]["mypy"]["packages"]) == folders
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == folders


def test_models_graphs_and_benchmarks_import_with_torch_alone() -> None:
    names = [requirement.split("==")[0].split("[")[0] for requirement in PROJECT["project"]["dependencies"]]
    modules = {"opentelemetry-sdk": "opentelemetry", "opentelemetry-exporter-otlp-proto-http": "opentelemetry"}
    absent = sorted({modules.get(name, name.replace("-", "_")) for name in names} - ON_A_BARE_MACHINE)
    ours = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("models", "graphs", "benchmarks")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    ours = [name for name in ours if not COMPILED.fullmatch(name)]
    assert set(ours) >= set(PORTABLE)
    code = f"""
import sys, importlib
for name in {absent!r}:
    sys.modules[name] = None  # importing it raises ImportError
for name in {ours!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton" or name in {PORTABLE!r}:
            raise
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
