"""The items that `personaplex evaluate --suite own` plays: held-out dialogues with a user who reacts.

`python -m training.evaluation_items OUT --items 24` writes `OUT/items/NAME/` (what the user says, and when) and
`OUT/references/` (the agent voices' own recordings). The scripts are the plan's held-out ones: held-out phrasings and
fillings, and a user voice nobody was trained on. The agent's turns are left to the agent. A seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.duplex.items import ITEM, NOISE, USER_AUDIO, Cue, Item, Line, Piece, to_json, write_json
from evaluation.duplex.recording import CONVERSATION, RECORDING, Recording
from evaluation.duplex.user import Spoken
from evaluation.duplex.verdicts import ABOUT_REFERENCES, REFERENCES
from training.augment import Audio, coloured_noise, convolve, decibels, limited, rms, room_response
from training.bank import Bank, speed_of
from training.folders import state_folder
from training.kokoro import RATE, Kokoro, Utterance
from training.plans import HELD_OUT_DIALOGUES, PLANS, to_judge
from training.roles import load_common
from training.script import AGENT_VOICES, DIALOGUES_PER_INSTANCE, VOICE_NAMES, Fact, Plan, Script, Turn, write_script
from training.timeline import FADE_S, agent_words, lay_out

MODELS = "personaplex-demo"  # how the names of the checkpoints begin whose voices these are

_WORDS_PER_S = 2.6  # as the scripts reckon
_FLOOR_S = 0.8  # an agent silent for so long has said what it had to say
_PATIENCE_S = 4.0
_LATEST_S = 3.0  # of an answer, when it is broken into: shorter ones than the script's can still be interrupted
_NOISE_S = 8.0
_REFERENCE_LINES = 3  # of the enrolment's: some ten seconds of a voice
_QUIET = decibels(-40.0)  # of the peak: where an utterance's speech begins and ends


def script_indices(items: int, seed: int) -> list[int]:
    """Which held-out dialogues: as many roles, facts and voices as there are come first. Each seed has its own."""
    indices: list[int] = []
    block = 0
    while len(indices) < items:
        first = (block + seed * 1_000) * HELD_OUT_DIALOGUES
        steps = range(DIALOGUES_PER_INSTANCE)
        indices += [first + n for step in steps for n in range(step, HELD_OUT_DIALOGUES, DIALOGUES_PER_INSTANCE)]
        block += 1
    return indices[:items]


def lines_of(script: Script, lookup: Callable[[str, str], Utterance]) -> tuple[tuple[Line, ...], list[Audio]]:
    """The user's lines of a script, and the sound of their pieces, one after the other."""
    facts = list(script.facts)
    floor = [turn for turn in script.turns if turn.kind != "backchannel" and turn.speaker != "aside"]
    lines: list[Line] = []
    sounds: list[Audio] = []
    at = 0
    for turn in script.turns:
        if turn.speaker != "user":
            continue
        pieces: list[Piece] = []
        for text in turn.parts:
            sound = lookup(script.user_voice, text).pcm.astype(np.float32) / np.float32(32768.0)
            pieces.append(Piece(text, at, at + len(sound), _speech(sound)))
            sounds.append(sound)
            at += len(sound)
        before, after = _neighbours(turn, script.turns, floor)
        answered = after is not None and turn.kind in ("turn", "interruption") and _is_answer(after)
        fact = _fact(turn, facts)
        lines.append(
            Line(
                kind=turn.kind,
                cue=_cue(turn, before),
                pieces=tuple(pieces),
                pauses_s=turn.pauses_s,
                answer=answered,
                asks=fact is not None,
                expected=fact.expected if fact and not _interrupted(after, floor) else (),
                unjudged=_why_unjudged(fact, after, floor),
                script=" ".join(after.parts) if answered and after else "",
            )
        )
    return tuple(lines), sounds


def _neighbours(turn: Turn, turns: Sequence[Turn], floor: Sequence[Turn]) -> tuple[Turn | None, Turn | None]:
    """Who had the floor before a turn, and who has it next; murmurs do not take it."""
    place = next((n for n, other in enumerate(floor) if other is turn), None)
    if place is None:  # a backchannel: into what was said before it
        earlier = turns[: next(n for n, other in enumerate(turns) if other is turn)]
        return next((other for other in reversed(earlier) if any(other is kept for kept in floor)), None), None
    return (floor[place - 1] if place else None), (floor[place + 1] if place + 1 < len(floor) else None)


def _is_answer(turn: Turn) -> bool:
    """Whether the agent is to speak. A "sure" to somebody who interrupts or comes back may as well be left out."""
    agent = load_common().agent
    return turn.speaker == "agent" and turn.parts[0] not in (*agent["yielded"], *agent["resumed"])


def _cue(turn: Turn, before: Turn | None) -> Cue:
    if turn.kind in ("interruption", "backchannel"):
        # The script says where in the agent's answer; the agent's own may be shorter or longer.
        answer_s = len(" ".join(before.parts).split()) / _WORDS_PER_S if before else 3.0
        return Cue("agent_speaks", round(min(max(turn.at * answer_s, 0.8), _LATEST_S), 2), _PATIENCE_S)
    if before is not None and before.kind == "aside":
        return Cue("user", turn.gap_s)
    if before is not None and before.speaker == "agent":
        return Cue("agent", max(_FLOOR_S, turn.gap_s), _PATIENCE_S)
    # The call's first words, or those after an interruption: unless the agent says something first, to its end.
    return Cue("agent", _FLOOR_S if before is None else 0.4, max(turn.gap_s, 0.6))


def _fact(turn: Turn, facts: list[Fact]) -> Fact | None:
    """The fact that a turn asks for, taken out of the list."""
    question = " ".join(turn.parts)
    if turn.kind == "turn" and facts and facts[0].question == question:
        return facts.pop(0)
    return None


def _interrupted(answer: Turn | None, floor: Sequence[Turn]) -> bool:
    place = next((n for n, other in enumerate(floor) if other is answer), None)
    return place is not None and place + 1 < len(floor) and floor[place + 1].kind == "interruption"


def _why_unjudged(fact: Fact | None, answer: Turn | None, floor: Sequence[Turn]) -> str:
    if fact is None:
        return ""
    if _interrupted(answer, floor):
        return "the answer is interrupted"
    return "" if fact.expected else "the prompt does not have the answer; it is to say so, in whatever words"


def _speech(sound: Audio) -> tuple[float, float]:
    loud = np.flatnonzero(np.abs(sound) > _QUIET * float(np.abs(sound).max()))
    return round(float(loud[0]) / RATE, 3), round(float(loud[-1] + 1) / RATE, 3)


def write_item(folder: Path, script: Script, lookup: Callable[[str, str], Utterance], seed: int) -> None:
    """One item's folder; item.json comes last, so that an item that has one is whole."""
    rng = np.random.default_rng([seed, script.index, 4])
    lines, sounds = lines_of(script, lookup)
    room = room_response(rng) if rng.random() < 0.4 else None
    gain = np.float32(decibels(float(rng.uniform(-10, 3))))
    heard = [convolve(sound, room) if room is not None else sound for sound in sounds]
    speech = limited(np.concatenate(heard) * gain)
    noisy = bool(rng.random() < 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / USER_AUDIO, speech)
    if noisy:
        # Shaped by a Fourier transform, so its end goes over into its beginning: it can be looped.
        level = rms(speech[np.abs(speech) > 1e-3]) * decibels(-float(rng.uniform(20, 45)))
        slope = float(rng.choice([0.0, 1.0, 1.0, 2.0]))
        _write(folder / NOISE, coloured_noise(round(_NOISE_S * RATE), slope, rng) * np.float32(level))
    voice = VOICE_NAMES[script.agent_voice]
    item = Item(folder.name, script.role, script.prompt, voice, 1_000 + script.index, lines, noisy)
    write_json(folder / ITEM, to_json(item))


def write_conversation(folder: Path, script: Script, lookup: Callable[[str, str], Utterance]) -> None:
    """The script as the item's conversation, the agent's part as written: what the best agent would get."""
    timeline = lay_out(script, lookup)
    heard = [item for item in timeline.placed if item.speaker != "aside"]
    sound = np.zeros((timeline.samples, 2), dtype=np.float32)
    for item in heard:
        pcm = lookup(item.voice, item.text).pcm[: item.samples].astype(np.float32) / np.float32(32768.0)
        fade = min(round(FADE_S * RATE), len(pcm))
        pcm[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
        sound[item.start : item.stop, 0 if item.speaker == "user" else 1] += pcm
    pieces = iter([item.start / RATE for item in heard if item.speaker == "user"])
    starts = [min([next(pieces) for _ in turn.parts]) for turn in script.turns if turn.speaker == "user"]
    recording = Recording(
        spoken=tuple(Spoken(line, "said", round(start_s, 3)) for line, start_s in enumerate(starts)),
        text=tuple((word.start_s, f" {word.text}") for word in agent_words(timeline)),
        seconds=timeline.seconds,
        lag_s=0.0,
        metadata={"lm_model_file": f"{MODELS} as scripted"},
    )
    _write(folder / CONVERSATION, sound)
    write_json(folder / RECORDING, recording.to_json())


def write_references(folder: Path, plan: Plan, lookup: Callable[[str, str], Utterance]) -> None:
    """How each agent voice of a plan sounds, for the judge of voices."""
    texts = load_common().enrolment[:_REFERENCE_LINES]
    folder.mkdir(parents=True, exist_ok=True)
    for voice in AGENT_VOICES[: plan.agent_voices]:
        path = folder / f"{VOICE_NAMES[voice]}.flac"
        if not path.exists():
            pcm = np.concatenate([lookup(voice, text).pcm for text in texts])
            _write(path, pcm.astype(np.float32) / np.float32(32768.0))
    write_json(folder / ABOUT_REFERENCES, {"models": MODELS})


class Speech:
    """Utterances from the bank; what it lacks is spoken now and kept apart, for the codec is trained on all of it."""

    def __init__(self) -> None:
        self._bank, self._own = Bank(), Bank(state_folder() / "evaluation" / "speech")
        self._kokoro: Kokoro | None = None

    def __call__(self, voice: str, text: str) -> Utterance:
        """Raises RuntimeError if the synthesiser is needed and not installed."""
        for bank in (self._bank, self._own):
            if bank.has(voice, text):
                return bank.load(voice, text)
        self._kokoro = self._kokoro or Kokoro()
        self._own.store(voice, text, self._kokoro.say(text, voice, speed_of(voice, text)))
        return self._own.load(voice, text)


def _write(path: Path, sound: Audio) -> None:
    soundfile: Any = importlib.import_module("soundfile")
    temporary = path.with_suffix(".part")
    soundfile.write(temporary, sound, RATE, format="FLAC", subtype="PCM_16")
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", choices=to_judge(), default="first")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scripted", action="store_true", help="also the conversations, held as written: what the judges make of those"
    )
    arguments = parser.parse_args()
    plan, speech = PLANS[arguments.plan], Speech()
    try:
        write_references(arguments.out / REFERENCES, plan, speech)
        for index in script_indices(arguments.items, arguments.seed):
            script = write_script(plan, "held_out", index)
            folder = arguments.out / "items" / f"{index:05d}-{script.role}"
            if not (folder / ITEM).exists():
                write_item(folder, script, speech, plan.seed)
            if arguments.scripted and not (folder / RECORDING).exists():
                write_conversation(folder, script, speech)
            print(json.dumps({"item": folder.name}), flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
