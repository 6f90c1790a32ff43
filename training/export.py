"""Writes what was trained as a checkpoint folder the server loads: `python -m training.export --out FOLDER`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import load_checkpoint
from models.checkpoint_files import CONFIG as CONFIG_FILE
from models.checkpoint_files import FORMAT, VOICES_FOLDER
from models.checkpoint_int8 import compact
from models.config import Sampling
from models.demo_checkpoint import TOKENIZER, VOICES
from models.voices import write_codes
from training import codec_model, lm
from training.codes import load_codec
from training.folders import state_folder
from training.roles import fill, load_role
from training.script import AGENT_VOICES, VOICE_NAMES

# Shown by every page and command that shows this model.
NOTICE = (
    "This is a small demonstration model, not NVIDIA's PersonaPlex: the same architecture with a two-hundredth of its "
    "weights, trained from scratch on a few hours of synthetic speech. It can talk as a teacher and as a friend, of "
    "little, and makes many mistakes. None of PersonaPlex's published figures holds for it."
)

# What a client gets that names no other. The less its codes are left to chance, the better its words are understood: of
# a café's 52, 46, 37 and 31 % were misheard at audio temperatures of .8, .6, .4 and .25 (step 12,082). With text at .6
# no more were than at .4. Top-k stays as published.
SAMPLING = Sampling(text_temperature=0.6, audio_temperature=0.3)
# What a chooser offers. It has learnt a café's counter as well, and tells other prices than its prompt's.
ROLES = {"teacher": "Teacher", "friend": "Good conversation"}
CARD = Path(__file__).with_name("model_card.md")
README = "README.md"


def export(lm_folder: Path, codec_folder: Path, codes: Path, out: Path, card: Path | None = CARD) -> dict[str, float]:
    """Writes the folder and loads it once to be sure. Returns its size and the steps it comes from.

    card: a model card that becomes the folder's README.md where it has none: one that somebody has filled in stays.
    Raises FileNotFoundError if a part is not trained, ValueError if the codes are not this codec's.
    """
    weights, step = lm.trained_weights(lm_folder)
    mimi, codec_step = load_codec(codec_folder)
    encoded_with = json.loads((codes / "about.json").read_text(encoding="utf-8"))
    if encoded_with["codebooks"] != codec_model.codes_digest(mimi.state_dict()):
        raise ValueError(f"the language model learnt other codes than those of {codec_folder}, step {codec_step}")
    voices = load_file(codes / "voices.safetensors")
    out.mkdir(parents=True, exist_ok=True)
    save_file(compact(weights), out / "model.safetensors")
    save_file(_halved(mimi.state_dict()), out / "mimi.safetensors")
    for path in out.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner alone, and this folder is to be installed
    shutil.copyfile(TOKENIZER, out / "tokenizer.model")
    folder = out / VOICES_FOLDER
    folder.mkdir(exist_ok=True)
    learnt = learnt_voices(codes)
    for name, prompt in voice_prompts(learnt, voices).items():
        (folder / f"{name}.safetensors").write_bytes(write_codes(voices[prompt].long()))
    config = {
        "format": FORMAT,
        "name": "personaplex-demo",
        "trained": True,
        "notice": NOTICE,
        "lm": dataclasses.asdict(lm.CONFIG),
        "mimi": dataclasses.asdict(codec_model.CONFIG),
        "silence_codes": voices["silence"].tolist(),
        "sine_codes": voices["sine"].tolist(),
        "sampling": dataclasses.asdict(SAMPLING),
        "roles": suggested_roles(),
        "own_voices": [VOICE_NAMES[AGENT_VOICES[number]] for number in learnt],
        "steps": {"codec": codec_step, "lm": step},
    }
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if card is not None and card.is_file() and not (out / README).exists():
        shutil.copyfile(card, out / README)
    load_checkpoint(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"mib": round(size / 2**20, 1), "codec_step": codec_step, "lm_step": float(step)}


def suggested_roles() -> list[dict[str, str]]:
    """What a chooser offers. Raises KeyError for a role whose prompt has slots: it has no one text."""
    return [{"name": name, "text": fill(load_role(role).prompt, {})} for role, name in ROLES.items()]


def learnt_voices(codes: Path) -> list[int]:
    """The agents of the dialogues it learnt from, as numbers of AGENT_VOICES."""
    found: set[int] = set()
    for path in codes.glob("train-*.safetensors"):
        with safe_open(path, "pt") as shard:
            found |= set(shard.get_tensor("voices").tolist())
    return sorted(found)


def voice_prompts(learnt: Sequence[int], stored: Iterable[str]) -> dict[str, str]:
    """Published voice name → which stored prompt stands behind it.

    Clients written for the published server ask for its voices by name. A name whose own voice was not learnt lends
    itself to a learnt one of the same sex (of any, if there is none), behind another prompt of that voice.
    """
    prompts = {n: sorted(name for name in stored if name.startswith(f"prompt-{n:02d}-")) for n in learnt}
    prompts = {number: names for number, names in prompts.items() if names}
    own = {VOICE_NAMES[AGENT_VOICES[number]]: names[0] for number, names in prompts.items()}
    lent = dict.fromkeys("FM", 0)
    for name in VOICES:
        if name in own or not prompts:
            continue
        sex = name[3]
        able = [n for n in prompts if VOICE_NAMES[AGENT_VOICES[n]][3] == sex] or list(prompts)
        turn, which = divmod(lent[sex], len(able))
        names = prompts[able[which]]
        own[name] = names[(turn + 1) % len(names)]
        lent[sex] += 1
    return own


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp16: the range of these weights fits, and it keeps three bits more than bf16."""
    return {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=state_folder() / "export")
    parser.add_argument("--lm", type=Path, default=state_folder() / "lm")
    parser.add_argument("--codec", type=Path, default=state_folder() / "codec")
    parser.add_argument("--codes", type=Path, default=state_folder() / "codes")
    parser.add_argument("--card", type=Path, default=CARD, help="becomes README.md there, unless it has one")
    arguments = parser.parse_args()
    if not arguments.card.is_file():
        parser.error(f"there is no model card {arguments.card}")
    told = export(arguments.lm, arguments.codec, arguments.codes, arguments.out, arguments.card)
    print(told, "→", arguments.out)


if __name__ == "__main__":
    main()
