"""`personaplex serve` as a user has it: it says where to talk, is talked to, and leaves nothing behind on Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

PERSONAPLEX = (sys.executable, "-m", "serving.cli.main")
START_S, STOP_S = 120, 60


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL that `serve` prints; at the end, its answer to Ctrl-C is checked."""
    with subprocess.Popen(
        [*PERSONAPLEX, "serve", "--port", "0", "--checkpoint", "demo-random"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("Talk at http://127.0.0.1:"), process.communicate(timeout=START_S)
            # By lines to the last one: communicate() would lose what was read along with the first.
            told = ""
            while "Ctrl-C stops it" not in told:
                line = process.stdout.readline()
                assert line, process.communicate(timeout=STOP_S)
                told += line
            yield said.removeprefix("Talk at ").strip()
            process.send_signal(signal.SIGINT)
            _, complaints = process.communicate(timeout=STOP_S)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, complaints
    assert "random weights" in told
    assert "Traceback" not in complaints


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "question.wav"
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 220 * np.arange(int(16_000 * 1.5)) / 16_000), 16_000)
    return path


def talk(server: str, question: Path, answer: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*PERSONAPLEX, "talk", str(question), str(answer), "--server", server, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_same_seed_gives_the_same_answer_alone_and_in_company(server: str, question: Path, tmp_path: Path) -> None:
    options = ("--seed", "7", "--voice", "NATM1", "--role", "You enjoy having a good conversation.")
    alone = talk(server, question, tmp_path / "alone.wav", *options, "--text", str(tmp_path / "alone.json"))
    assert alone.returncode == 0, alone.stderr
    assert "random weights" in alone.stderr
    others = [
        subprocess.Popen(
            [*PERSONAPLEX, "talk", str(question), str(tmp_path / f"other-{i}.wav"), "--server", server],
            stderr=subprocess.DEVNULL,
        )
        for i in range(3)
    ]
    try:
        company = talk(server, question, tmp_path / "company.wav", *options, "--text", str(tmp_path / "company.json"))
    finally:
        codes = [other.wait(timeout=120) for other in others]
    assert company.returncode == 0, company.stderr
    assert codes == [0, 0, 0]
    pcm, rate = soundfile.read(tmp_path / "alone.wav", dtype="int16")
    assert (len(pcm), rate) == (int(24_000 * 1.5), 24_000)
    assert np.array_equal(pcm, soundfile.read(tmp_path / "company.wav", dtype="int16")[0])
    assert (tmp_path / "alone.json").read_text() == (tmp_path / "company.json").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--voice", "../../etc/passwd"), "voice"),
        (("--role", "word " * 1_000), "role"),
    ],
)
def test_what_the_server_refuses_is_one_sentence(
    server: str, question: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    refused = talk(server, question, tmp_path / "refused.wav", *options)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert said in refused.stderr
    assert not (tmp_path / "refused.wav").exists()


def test_a_second_server_on_the_same_port_says_so(server: str) -> None:
    port = server.rsplit(":", 1)[1]
    second = subprocess.run(
        [*PERSONAPLEX, "serve", "--port", port], capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 1
    assert port in second.stderr
    assert "--port" in second.stderr
