"""Where a checkpoint's files are: a folder, a Hugging Face repository, or a demo model, shipped or made."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "personaplex-serving/1"
DEMO = "demo"  # the demo model that ships with this package, where one does; else the random one
DEMO_RANDOM = "demo-random"  # always the one with random weights (models.demo_checkpoint)
SHIPPED_DEMO = Path(__file__).parent / "assets" / "demo"

# What nvidia/personaplex-7b-v1 holds and we read. Its Mimi and tokenizer carry hashes in their names.
LM_FILES = ("model.safetensors",)
MIMI_FILES = ("mimi.safetensors", "tokenizer-*.safetensors")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_spm_*.model")
VOICES_ARCHIVE = "voices.tgz"
VOICES_FOLDER = "voices"
CONFIG = "config.json"

_REPO_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

_HASH_WHOLE_BELOW = 256 << 20  # a fifth of a second; a 16 GB file is sampled instead
_SAMPLE_BLOCKS, _SAMPLE_BYTES = 256, 64 << 10


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint. A file that is not there is None; who needs it asks `need`."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    lm: Path | None
    mimi: Path | None
    tokenizer: Path | None
    voices_folder: Path | None
    voices_archive: Path | None

    def need(self, path: Path | None, what: str, names: tuple[str, ...]) -> Path:
        """`path`, or CheckpointError that says what is missing from the folder."""
        if path is None:
            raise CheckpointError(
                f"{self.folder} has no {what}: expected a file {' or '.join(names)}, as nvidia/personaplex-7b-v1 has it"
            )
        return path

    @property
    def weights_hash(self) -> str:
        """32 hex digits, equal where the weights, their shapes and the codec's constant codes are equal.

        Files up to 256 MiB are read whole; of larger ones the header and 256 blocks spread over the file, which
        tells two trainings apart without reading 16 GB.
        """
        content = hashlib.blake2b(digest_size=16)
        told = {key: self.config.get(key) for key in ("lm", "mimi", "silence_codes", "sine_codes")}
        content.update(json.dumps(told, sort_keys=True).encode())
        for path in (self.lm, self.mimi):
            if path is not None:
                _hash_file(content, path)
        return content.hexdigest()


def find_checkpoint(ref: str | Path) -> CheckpointFiles:
    """Resolves `ref` and reads its config.json.

    ref: a folder; a Hugging Face repository "owner/name" (or "owner/name@revision"), fetched into its cache with
    the token of HF_TOKEN or `hf auth login`; "demo", the model that ships with this package or, where none does, the
    random one; or "demo-random", always that one. Raises CheckpointError.
    """
    folder = _folder(ref)
    config = _config(folder / CONFIG)
    voices_folder, voices_archive = folder / VOICES_FOLDER, folder / VOICES_ARCHIVE
    # A repository's folder in the cache is named by its commit, which tells nobody anything.
    repo = _REPO_ID.fullmatch(str(ref)) if not Path(ref).is_dir() else None
    return CheckpointFiles(
        name=str(config.get("name") or (repo["repo"].rpartition("/")[2] if repo else folder.name)),
        folder=folder,
        config=config,
        lm=_one(folder, LM_FILES),
        mimi=_one(folder, MIMI_FILES),
        tokenizer=_one(folder, TOKENIZER_FILES),
        voices_folder=voices_folder if voices_folder.is_dir() else None,
        voices_archive=voices_archive if voices_archive.is_file() else None,
    )


def _folder(ref: str | Path) -> Path:
    if str(ref) == DEMO and (SHIPPED_DEMO / CONFIG).is_file():
        return SHIPPED_DEMO
    if str(ref) in (DEMO, DEMO_RANDOM):
        from models.demo_checkpoint import ensure_demo_checkpoint  # it writes what this module reads

        return ensure_demo_checkpoint()
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return folder.resolve()
    known = _REPO_ID.fullmatch(str(ref))
    if known is None:
        raise CheckpointError(
            f"there is no checkpoint {str(ref)!r}: give a folder that exists, a Hugging Face repository such as "
            f"nvidia/personaplex-7b-v1, {DEMO!r}, or {DEMO_RANDOM!r}"
        )
    return _fetch(known["repo"], known["revision"])


def _fetch(repo: str, revision: str | None) -> Path:
    """Downloads a repository's checkpoint files, or finds them in Hugging Face's cache."""
    try:
        import huggingface_hub  # a folder needs no network and no such package
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"fetching {repo} needs the package huggingface_hub (pip install huggingface_hub==2.4.0); "
            f"or download it elsewhere and give the folder"
        ) from error
    wanted = [CONFIG, *LM_FILES, *MIMI_FILES, *TOKENIZER_FILES, VOICES_ARCHIVE, f"{VOICES_FOLDER}/*"]
    page = f"https://huggingface.co/{repo}"
    token = os.environ.get("HF_TOKEN") or None  # without one, the login that `hf auth login` stored is used
    try:
        return Path(str(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, token=token)))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its licence at {page}, create a token there and set HF_TOKEN, then start again"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"Hugging Face shows no {repo}{'@' + revision if revision else ''}: check the name at {page}; "
            f"if it is private or gated, set HF_TOKEN to a token that may read it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not in the local cache and Hugging Face cannot be reached: connect once, or copy the "
            f"repository's files here and give the folder ({error})"
        ) from error
    except (OSError, ValueError) as error:  # every other error of the hub is one of these: disk full, HTTP, bad name
        raise CheckpointError(f"{repo} could not be fetched: {error}") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}, so it is no checkpoint: copy it from where the weights came from"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): copy it anew") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy it anew from where the weights came from")
    written = config.get("format", FORMAT)
    if written != FORMAT:
        raise CheckpointError(f"{path} is of format {written!r}, this version reads {FORMAT!r}: export it again")
    return config


def _one(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """The one file of that kind; an exact name goes before a pattern. Raises CheckpointError if it is ambiguous."""
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{folder} has several files {pattern}: {names}; keep one")
        if found:
            return found[0]
    return None


def _hash_file(content: Any, path: Path) -> None:
    size = path.stat().st_size
    content.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= _HASH_WHOLE_BELOW:
            while block := file.read(1 << 20):
                content.update(block)
            return
        header = int.from_bytes(file.read(8), "little")
        content.update(file.read(min(header, 64 << 20)))
        for index in range(_SAMPLE_BLOCKS):
            file.seek(8 + header + (size - 8 - header - _SAMPLE_BYTES) * index // (_SAMPLE_BLOCKS - 1))
            content.update(file.read(_SAMPLE_BYTES))
