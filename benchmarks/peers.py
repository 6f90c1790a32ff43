"""Our frame step beside its peers', in one process, turn by turn, so that a machine's moods cancel in the ratio.

    python -m benchmarks.peers --setup          # once: an environment of its own in .venv-peers
    .venv-peers/bin/python -m benchmarks.peers --slots 1 16

The peers: moshi 0.2.13's batched LMGen (dep_q = 8, no cfg: its most favourable reading) and vllm-omni 0.28.0's native
step (dep_q = 8, greedy, as its engine draws). Theirs in fp32, beside ours as it is served (bf16 weights and KV). All
weights are random, ours and moshi's sampling is the default, and the context is filled by real steps.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.frame import LINEARS
from benchmarks.peer_steps import Step, moshi_step, omni_step
from benchmarks.setting import device_name, options, random_lm, setting
from graphs.backends import Backends, default_dtype
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import AUDIO_CODEBOOKS, LMConfig
from models.prompt import Prompt

ENVIRONMENT = Path(".venv-peers")
ROUNDS = 40
PEERS = ("moshi", "vllm-omni")


def set_up() -> None:
    """Creates the peers' environment; their own pins would pull in an older torch, hence --no-deps."""
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "-q"]
    ours = ["torch==2.13.0", "numpy", "numba==0.68.1", "safetensors"]
    theirs = [
        "sentencepiece",
        "huggingface_hub<2",
        "tokenizers>=0.22,<=0.23.0",
        "regex",
        "packaging",
        "pyyaml",
        "typer",
    ]
    subprocess.run([*pip, *ours, *theirs], check=True)
    peers = ["moshi==0.2.13", "einops==0.8.1", "vllm-omni==0.28.0", "transformers==5.14.1"]
    subprocess.run([*pip, "--no-deps", *peers], check=True)


def our_engine(
    config: LMConfig, slots: int, dtype: torch.dtype, device: torch.device, linear: str = "ours"
) -> SlotEngine:
    """An engine whose every slot is live with an empty context."""
    engine = SlotEngine(random_lm(config, device, dtype), slots, backend=Backends(linear=linear))
    column = np.zeros((1, 17), dtype=np.int16)
    prompt = Prompt(column, np.full(17, -2, dtype=np.int16), None, "")
    nobody = np.zeros((0, AUDIO_CODEBOOKS), dtype=np.int16)
    for slot in range(slots):
        engine.open(slot, prompt, Sampling(), slot)
    while engine.step([], nobody).pending:
        pass
    return engine


def our_step(engine: SlotEngine) -> Step:
    codes = np.random.default_rng(0).integers(0, 2048, (engine.slots, AUDIO_CODEBOOKS)).astype(np.int16)
    slots = list(range(engine.slots))
    return lambda: engine.step(slots, codes)


def fill(step: Step, frames: int) -> None:
    for _ in range(frames):
        step()


def turn_by_turn(calls: Sequence[Step], device: torch.device) -> list[list[float]]:
    """Milliseconds of ROUNDS calls of each, one of each in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append((time.perf_counter() - start) * 1e3)
    return times


@dataclass(frozen=True)
class PeerRow:
    """One peer beside us, medians in milliseconds; the ratio is the median of the ratios turn by turn."""

    slots: int
    context_frames: int
    peer: str
    ours_ms: float
    peer_ms: float
    times_faster: float
    threads: int
    device: str


def compare(
    config: LMConfig, slots: int, contexts: Sequence[int], peers: Mapping[str, Step], ours: Step, device: torch.device
) -> Iterator[PeerRow]:
    """Rows for each of `contexts`, to which everybody's is filled by real steps."""
    calls = [ours, *peers.values()]
    held = 0
    for context in contexts:
        for call in calls:
            fill(call, context - held)
        held = context + ROUNDS
        own, *theirs = turn_by_turn(calls, device)
        for peer, taken in zip(peers, theirs, strict=True):
            yield PeerRow(
                slots=slots,
                context_frames=context,
                peer=peer,
                ours_ms=round(statistics.median(own), 2),
                peer_ms=round(statistics.median(taken), 2),
                times_faster=round(statistics.median(t / o for o, t in zip(own, taken, strict=True)), 2),
                threads=torch.get_num_threads(),
                device=device_name(device),
            )


def line(row: PeerRow) -> str:
    return (
        f"{row.slots:3d} slots, {row.context_frames:4d} frames held: ours {row.ours_ms:6.2f} ms, "
        f"{row.peer:9s} {row.peer_ms:6.2f} ms, {row.times_faster:4.1f} times faster"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("peers", __doc__)
    parser.add_argument("--setup", action="store_true", help="create .venv-peers and stop")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, nargs="+", help="frames held; default: a quarter of the window, and all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of our weights and KV; default: as served")
    parser.add_argument(
        "--linear", choices=LINEARS, default="ours", help="our weights as loaded, or in int8 (on a CPU)"
    )
    parser.add_argument(
        "--peer-dtype",
        choices=("float32", "bfloat16"),
        help="of the peers' weights and KV; default: float32 on a CPU, which is faster for them, bfloat16 on CUDA",
    )
    parser.add_argument("--wheel", type=Path, help="a folder with vllm-omni's files, where it is not installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, after each")
    arguments = parser.parse_args(argv)
    if arguments.setup:
        set_up()
        return 0
    chosen = setting(parser, arguments)
    device, config = chosen.device, chosen.lm
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(device)
    peer_dtype = getattr(torch, arguments.peer_dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    makers: dict[str, Callable[[int], Step]] = {
        "moshi": lambda slots: moshi_step(config, slots, device, peer_dtype),
        "vllm-omni": lambda slots: omni_step(config, slots, device, peer_dtype, arguments.wheel),
    }
    contexts = arguments.context or [config.window // 4, config.window]
    rows: list[PeerRow] = []
    with torch.inference_mode():
        for slots in arguments.slots:
            ours = our_step(our_engine(config, slots, dtype, device, arguments.linear))
            peers = {name: makers[name](slots) for name in arguments.peers}
            for row in compare(config, slots, contexts, peers, ours, device):
                rows.append(row)
                print(line(row), flush=True)
                if arguments.json:
                    content = json.dumps([dataclasses.asdict(each) for each in rows], indent=1)
                    arguments.json.write_text(content + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
