"""The query of `/api/chat`: every parameter the known clients send, checked before anything is reserved for them.

What is applied is a field of ChatRequest. What Kyutai's clients send and this model has no use for is accepted and
listed in `not_applied`, which the conversation's metadata carries back: nothing is ignored in silence.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from actors.errors import BadRequest, RoleTooLong
from graphs.stages import Sampling, SessionSpec
from models.config import MAX_TOP_K

N = TypeVar("N", int, float)

MAX_SEED = 2**63 - 1
MAX_TEMPERATURE = 2.0  # above it nobody wants to listen; a step could draw at 10
PUBLISHED_SAMPLING = Sampling()
LOWEST_PCM_HZ, HIGHEST_PCM_HZ = 8_000, 96_000
_LONGEST_NAME = 200  # characters of a voice's name; shipped ones have 5
_LONGEST_TOKEN = 200  # characters of a resume token; ours have 80
MAX_FRAMES = 1 << 40
_LONGEST_SHOWN = 40  # characters of a wrong value that its error repeats

_APPLIED = frozenset(
    {
        "voice_prompt", "text_prompt", "seed", "text_temperature", "text_topk", "audio_temperature", "audio_topk",
        "api_key", "audio", "audio_rate", "silence_gate", "resume", "missed", "have",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked query. `voice` None means the server's default; whether a named one exists, the checkpoint knows."""

    voice: str | None
    role: str
    seed: int  # the client's, or drawn here
    sampling: Sampling
    audio: Literal["opus", "pcm"] = "opus"
    pcm_rate_hz: int = 24_000  # of the PCM that the client sends; what it gets is always 24 kHz
    silence_gate: bool = False
    api_key: str | None = field(default=None, repr=False)  # for clients that cannot set a header
    resumable: bool = False  # wants a resume token
    resume_token: str | None = field(default=None, repr=False)  # comes back with one
    have: int | None = None  # frames it has had of that conversation; None: it does not say
    replay: bool = True  # whether it wants to hear those it missed
    not_applied: tuple[str, ...] = ()

    def spec(self, default_voice: str) -> SessionSpec:
        return SessionSpec(self.voice or default_voice, self.role, self.seed, self.sampling)


def parse_query(
    query: Mapping[str, str],
    *,
    role_max_chars: int,
    sampling: Sampling = PUBLISHED_SAMPLING,
    draw_seed: Callable[[], int] | None = None,
) -> ChatRequest:
    """sampling: what holds where the query names no other, each of the four by itself.

    Raises BadRequest, or RoleTooLong, with a sentence that names the parameter and what it may be.

    Empty values count as absent: forms send them. A parameter nobody knows counts as not applied.
    """
    given = {name: value for name, value in query.items() if value.strip()}
    role = given.get("text_prompt", "")
    if len(role) > role_max_chars:
        raise RoleTooLong(f"The role (text_prompt) has {len(role)} characters; {role_max_chars} are allowed.")
    wanted, token = _resume(given)
    wished = Sampling(
        text_temperature=_number(given, "text_temperature", float, sampling.text_temperature, 0.0, MAX_TEMPERATURE),
        text_top_k=_number(given, "text_topk", int, sampling.text_top_k, 1, MAX_TOP_K),
        audio_temperature=_number(given, "audio_temperature", float, sampling.audio_temperature, 0.0, MAX_TEMPERATURE),
        audio_top_k=_number(given, "audio_topk", int, sampling.audio_top_k, 1, MAX_TOP_K),
    )
    return ChatRequest(
        voice=_voice(given),
        role=role,
        seed=_seed(given, draw_seed or _random_seed),
        sampling=wished,
        audio=_audio(given),
        pcm_rate_hz=_number(given, "audio_rate", int, 24_000, LOWEST_PCM_HZ, HIGHEST_PCM_HZ),
        silence_gate=_flag(given, "silence_gate"),
        api_key=given.get("api_key"),
        resumable=wanted,
        resume_token=token,
        have=_number(given, "have", int, 0, 0, MAX_FRAMES) if "have" in given else None,
        replay=_replay(given),
        not_applied=tuple(sorted(name[:_LONGEST_NAME] for name in given if name not in _APPLIED)),
    )


def _voice(given: Mapping[str, str]) -> str | None:
    """Names a voice, never a file: the checkpoint looks it up among its own, with or without ".pt"."""
    name = given.get("voice_prompt")
    if name is not None and len(name) > _LONGEST_NAME:
        raise BadRequest(f"voice_prompt is no voice's name: it has {len(name)} characters.")
    return name


def _seed(given: Mapping[str, str], draw_seed: Callable[[], int]) -> int:
    """Minus one is what some clients say for "any"."""
    if given.get("seed", "-1").strip() == "-1":
        return draw_seed()
    return _number(given, "seed", int, 0, 0, MAX_SEED)


def _random_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)


def _audio(given: Mapping[str, str]) -> Literal["opus", "pcm"]:
    match given.get("audio", "opus"):
        case "opus":
            return "opus"
        case "pcm":
            return "pcm"
        case other:
            raise BadRequest(f"audio is opus or pcm, not {_shown(other)}.")


def _resume(given: Mapping[str, str]) -> tuple[bool, str | None]:
    """`resume=1` asks for a token, `resume=TOKEN` uses one, and asks for the next. A token has full stops in it."""
    value = given.get("resume", "")
    if "." not in value:
        return _flag(given, "resume"), None
    if len(value) > _LONGEST_TOKEN:
        raise BadRequest(f"resume is 1, or a resume token: not {len(value)} characters.")
    return True, value


def _replay(given: Mapping[str, str]) -> bool:
    match given.get("missed", "replay"):
        case "replay":
            return True
        case "skip":
            return False
        case other:
            raise BadRequest(f"missed is replay or skip, not {_shown(other)}.")


def _flag(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "false").strip().lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"0", "false", "no", "off"}:
        return False
    raise BadRequest(f"{name} is true or false, not {_shown(value)}.")


def _number(given: Mapping[str, str], name: str, kind: Callable[[str], N], default: N, lowest: N, highest: N) -> N:
    raw = given.get(name)
    if raw is None:
        return default
    what = "a whole number" if kind is int else "a number"
    try:
        if len(raw) > _LONGEST_SHOWN:  # int() of a long string is slow, and no number here has so many digits
            raise ValueError
        value = kind(raw)
    except ValueError:
        raise BadRequest(f"{name} is {what} from {lowest} to {highest}, not {_shown(raw)}.") from None
    if not math.isfinite(value) or not lowest <= value <= highest:
        raise BadRequest(f"{name} is {what} from {lowest} to {highest}, not {_shown(raw)}.")
    return value


def _shown(value: str) -> str:
    return repr(value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "…")
