"""Where training keeps what it makes, and the small files every stage writes. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
FROZEN = (
    "frozen"  # a file of this name in the codec's folder says with which step of the encoder its codes became final
)


def state_folder() -> Path:
    """`.state/` of the checkout, or PERSONAPLEX_TRAINING_STATE; ignored by git."""
    return Path(os.environ.get("PERSONAPLEX_TRAINING_STATE", REPOSITORY / ".state"))


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(path)


class Log:
    """Figures of a run, one JSON object a line; appended to by every piece of the run."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def write(self, **figures: float | int | str) -> None:
        line = {"time": round(time.time(), 1), **figures}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
