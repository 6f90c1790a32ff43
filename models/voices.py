"""Voice prompts: Mimi codes, or the summed embeddings and token cache of a published `.pt`; and where they lie."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from models.config import AUDIO_CODEBOOKS, FRAMES_PER_S, STREAMS

if TYPE_CHECKING:
    from models.mimi import Mimi

CACHE_COLUMNS = 4  # the published token ring: column c stands at index c % 4
MAX_FRAMES = 2_048  # the longest prompt anybody trained on; a published voice has about a hundred frames
MAX_FILE_BYTES = 64 << 20
MAX_ARCHIVE_BYTES = 512 << 20  # unpacked, so that a small archive cannot fill the memory
MAX_ARCHIVE_FILES = 1_024

SUFFIXES = (".safetensors", ".pt", ".wav")  # in order of preference where a voice exists in several forms


_Source = Path | bytes  # a file, or the content of an archive's member


class VoiceError(ValueError):
    """A voice prompt cannot be used; the message names it and says why and what to do."""


@dataclass(frozen=True)
class VoicePrompt:
    """The voice part of a system prompt, in one of two forms.

    codes: [T, 8] int64, Mimi's codes of the recording; or
    embeddings: [T', dim] float, the summed input embeddings of columns 0 … T'-1, with
    cache: [17, 4] int64, the token ring after them. There column T' is complete (the next input), and column
    T'+1 holds the delayed streams' codes alone.
    """

    name: str
    codes: Tensor | None = None
    embeddings: Tensor | None = None
    cache: Tensor | None = None

    @property
    def frames(self) -> int:
        """How many 80 ms frames of recording it stands for, within one."""
        known = self.codes if self.codes is not None else self.embeddings
        return 0 if known is None else int(known.shape[0])

    @property
    def seconds(self) -> float:
        return self.frames / FRAMES_PER_S

    @property
    def digest(self) -> str:
        """Hash of the content, not of the name: 32 hex digits."""
        content = hashlib.blake2b(digest_size=16)
        for kind, tensor in (("codes", self.codes), ("embeddings", self.embeddings), ("cache", self.cache)):
            if tensor is not None:
                content.update(f"{kind} {tensor.dtype} {tuple(tensor.shape)}".encode())
                content.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()


def read_codes(name: str, content: bytes, *, card: int) -> VoicePrompt:
    """A voice stored as codes: safetensors with `codes` [T, 8] of integers in 0 … card-1. Raises VoiceError."""
    try:
        tensors = load_safetensors(content)
    except SafetensorError as error:
        raise VoiceError(f"voice {name}: not a safetensors file ({error})") from error
    codes = tensors.get("codes")
    if codes is None or len(tensors) != 1:
        raise VoiceError(f"voice {name}: expected one tensor `codes`, found {sorted(tensors)}")
    if codes.dim() != 2 or codes.shape[1] != AUDIO_CODEBOOKS or codes.is_floating_point():
        raise VoiceError(f"voice {name}: `codes` must be integers [frames, {AUDIO_CODEBOOKS}], not {_shape(codes)}")
    _check_frames(name, codes.shape[0])
    codes = codes.to(torch.int64)
    if bool(((codes < 0) | (codes >= card)).any()):
        raise VoiceError(f"voice {name}: a code is outside 0 … {card - 1}; it was made with another codec")
    return VoicePrompt(name, codes=codes)


def write_codes(codes: Tensor) -> bytes:
    """The file form that read_codes reads. codes: [T, 8]."""
    return save_safetensors({"codes": codes.to(torch.int16).contiguous()})


def read_published(name: str, content: bytes, *, dim: int, card: int, text_card: int) -> VoicePrompt:
    """A published `.pt`: `embeddings` [T', 1, 1, dim] and `cache` [1, 17, 4].

    It is a pickle, so it is read with weights_only=True: tensors and plain containers, nothing that runs code.
    Raises VoiceError for anything else, and for a voice made for a model of another shape.
    """
    try:
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle makes its reader raise anything
        raise VoiceError(
            f"voice {name}: refused, this .pt is damaged or holds more than tensors; "
            f"convert it to codes (.safetensors) or give the recording as .wav"
        ) from error
    if not isinstance(stored, dict) or not {"embeddings", "cache"} <= stored.keys():
        held = sorted(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
        raise VoiceError(f"voice {name}: a published voice holds `embeddings` and `cache`, this file holds {held}")
    embeddings, cache = stored["embeddings"], stored["cache"]
    if not isinstance(embeddings, Tensor) or not isinstance(cache, Tensor):
        raise VoiceError(f"voice {name}: `embeddings` and `cache` must be tensors")
    if embeddings.dim() != 4 or embeddings.shape[1:3] != (1, 1) or not embeddings.is_floating_point():
        raise VoiceError(f"voice {name}: `embeddings` must be floats [frames, 1, 1, {dim}], not {_shape(embeddings)}")
    if embeddings.shape[3] != dim:
        raise VoiceError(
            f"voice {name}: made for a model of width {embeddings.shape[3]}, this one has {dim}; "
            f"give the recording as .wav instead"
        )
    if tuple(cache.shape) != (1, STREAMS, CACHE_COLUMNS) or cache.is_floating_point():
        raise VoiceError(f"voice {name}: `cache` must be integers [1, {STREAMS}, {CACHE_COLUMNS}], not {_shape(cache)}")
    _check_frames(name, embeddings.shape[0])
    if not bool(torch.isfinite(embeddings).all()):
        raise VoiceError(f"voice {name}: `embeddings` holds values that are not finite")
    ring = cache[0].to(torch.int64)
    # An initial token is one past the vocabulary; -1 and -2 are "no input" and "to be generated".
    limit = torch.tensor([text_card] + [card] * (STREAMS - 1)).unsqueeze(1)
    if bool(((ring < -2) | (ring > limit)).any()):
        raise VoiceError(f"voice {name}: `cache` holds tokens this model does not have")
    if bool((ring[:, embeddings.shape[0] % CACHE_COLUMNS] < 0).any()):
        raise VoiceError(f"voice {name}: `cache` has no complete column {embeddings.shape[0]}, the next input")
    return VoicePrompt(name, embeddings=embeddings[:, 0, 0].clone(), cache=ring)


def _check_frames(name: str, frames: int) -> None:
    if not 1 <= frames <= MAX_FRAMES:
        raise VoiceError(f"voice {name}: {frames} frames; a voice prompt has 1 to {MAX_FRAMES} (3 to 10 s is usual)")


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


@dataclass(frozen=True)
class VoiceShapes:
    """What a voice has to fit: the language model's width and vocabularies."""

    dim: int
    card: int
    text_card: int


class VoiceLibrary:
    """The voices of one checkpoint: what lies in `voices/` and in `voices.tgz`.

    A name that a client sent is only ever looked up among the names found there; no path is built from it, and
    an archive is read in memory, so a member's path is never followed either.
    """

    def __init__(self, folder: Path | None, archive: Path | None, shapes: VoiceShapes, codec: Callable[[], Mimi]):
        """`codec` gives the Mimi that recordings (.wav) are encoded with; called only when there is one to encode."""
        self._folder, self._archive = folder, archive
        self._shapes, self._codec = shapes, codec
        self._sources: Mapping[str, tuple[str, _Source]] | None = None
        self._loaded: dict[str, VoicePrompt] = {}

    def names(self) -> list[str]:
        """Names without suffix, sorted. Raises VoiceError if the archive cannot be read."""
        return sorted(self._index())

    def has(self, name: str) -> bool:
        """Whether there is such a voice; the name may carry the published suffix `.pt`."""
        return name.removesuffix(".pt") in self._index()

    def load(self, name: str) -> VoicePrompt:
        """Reads a voice (once; the next call gives the same object).

        Raises VoiceError if there is none of that name or its file cannot be used.
        """
        key = name.removesuffix(".pt")
        if key not in self._loaded:
            if key not in self._index():
                shown = key if len(key) <= 64 else key[:61] + "..."
                known = ", ".join(self.names()) or "none: the checkpoint has neither voices/ nor voices.tgz"
                raise VoiceError(f"there is no voice {shown!r} here; known voices: {known}")
            suffix, source = self._index()[key]
            content = source if isinstance(source, bytes) else _read_file(source)
            self._loaded[key] = self._parse(key, suffix, content)
        return self._loaded[key]

    def _parse(self, name: str, suffix: str, content: bytes) -> VoicePrompt:
        shapes = self._shapes
        if suffix == ".safetensors":
            return read_codes(name, content, card=shapes.card)
        if suffix == ".pt":
            return read_published(name, content, dim=shapes.dim, card=shapes.card, text_card=shapes.text_card)
        from models.voice_recording import read_recording, voice_from_wav  # audio packages only where a wav is used

        samples, rate = read_recording(name, content)
        return voice_from_wav(samples, rate, self._codec(), name=name)

    def _index(self) -> Mapping[str, tuple[str, _Source]]:
        """Name → (suffix, where its content is); built on first use."""
        if self._sources is None:
            files: list[tuple[str, _Source]] = []
            if self._archive is not None:
                files += _archive_members(self._archive).items()
            if self._folder is not None:
                files += [(path.name, path) for path in sorted(self._folder.iterdir()) if path.is_file()]
            forms: dict[str, dict[str, _Source]] = {}
            for file, source in files:  # the folder comes last: what an operator put there wins
                path = PurePosixPath(file)
                if path.suffix in SUFFIXES and not path.name.startswith("."):
                    forms.setdefault(path.stem, {})[path.suffix] = source
            self._sources = {
                name: next((suffix, known[suffix]) for suffix in SUFFIXES if suffix in known)
                for name, known in forms.items()
            }
        return self._sources


def _read_file(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise VoiceError(f"voice {path.stem}: {path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    return path.read_bytes()


def _archive_members(archive: Path) -> dict[str, bytes]:
    """File name (without folders) → content of every regular file in voices.tgz. Raises VoiceError."""
    members: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                # Links and devices are passed over: a voice is a plain file.
                if not member.isfile() or PurePosixPath(member.name).suffix not in SUFFIXES:
                    continue
                total += member.size
                if member.size > MAX_FILE_BYTES or total > MAX_ARCHIVE_BYTES or len(members) >= MAX_ARCHIVE_FILES:
                    raise VoiceError(f"{archive} unpacks to more than a set of voices does; is it the right file?")
                file = tar.extractfile(member)
                if file is not None:
                    members[PurePosixPath(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise VoiceError(f"{archive} cannot be read as an archive of voices: {error}") from error
    return members
