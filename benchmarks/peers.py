"""Our frame step beside its peers', in one process, turn by turn, so that a machine's moods cancel in the ratio.

    python -m benchmarks.peers --setup          # once: an environment of its own in .venv-peers
    .venv-peers/bin/python -m benchmarks.peers --slots 1 16

The peer is moshi's batched LMGen at the same shape (dep_q = 8, fp32, no cfg: its most favourable reading), beside ours
as it is served (bf16 weights and KV). All weights are random, sampling is the default on both sides, and the context is
filled by real steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.frame import SHAPES, random_lm
from graphs.backends import default_dtype
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import AUDIO_CODEBOOKS, LMConfig
from models.prompt import Prompt

ENVIRONMENT = Path(".venv-peers")
ROUNDS = 40


def set_up() -> None:
    """Creates the peers' environment; their own pins would pull in an older torch, hence --no-deps."""
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "-q"]
    subprocess.run(
        [*pip, "torch==2.13.0", "numpy", "numba==0.68.1", "safetensors", "sentencepiece", "huggingface_hub"], check=True
    )
    subprocess.run([*pip, "--no-deps", "moshi==0.2.13", "einops==0.8.1"], check=True)


def moshi_step(config: LMConfig, slots: int) -> Callable[[], object]:
    """One call is one frame of all slots through moshi's LMGen."""
    from moshi.models.lm import LMGen, LMModel  # type: ignore[import-not-found]  # lives in .venv-peers only

    model = LMModel(
        delays=list(config.delays),
        n_q=config.n_q,
        dep_q=AUDIO_CODEBOOKS,
        card=config.card,
        text_card=config.text_card,
        dim=config.dim,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        hidden_scale=config.hidden_scale,
        norm="rms_norm_f32",
        gating="silu",
        positional_embedding="rope",
        context=config.context,
        max_period=config.max_period,
        causal=True,
        layer_scale=None,
        depformer_dim=config.depformer_dim,
        depformer_dim_feedforward=config.depformer_dim_feedforward,
        depformer_num_heads=config.depformer_num_heads,
        depformer_num_layers=config.depformer_num_layers,
        depformer_layer_scale=None,
        depformer_multi_linear=True,
        depformer_context=8,
        depformer_max_period=10_000,
        depformer_gating="silu",
        depformer_pos_emb="none",
        depformer_weights_per_step=True,
    ).eval()
    generator = LMGen(model)
    generator.streaming_forever(slots)
    codes = torch.randint(0, config.card, (slots, AUDIO_CODEBOOKS, 1))
    return lambda: generator.step(codes)


def our_engine(config: LMConfig, slots: int, dtype: torch.dtype) -> SlotEngine:
    """An engine whose every slot is live with an empty context."""
    engine = SlotEngine(random_lm(config, torch.device("cpu"), dtype), slots)
    column = np.zeros((1, 17), dtype=np.int16)
    prompt = Prompt(column, np.full(17, -2, dtype=np.int16), None, "")
    nobody = np.zeros((0, AUDIO_CODEBOOKS), dtype=np.int16)
    for slot in range(slots):
        engine.open(slot, prompt, Sampling(), slot)
    while engine.step([], nobody).pending:
        pass
    return engine


def our_step(engine: SlotEngine) -> Callable[[], object]:
    codes = np.random.default_rng(0).integers(0, 2048, (engine.slots, AUDIO_CODEBOOKS)).astype(np.int16)
    slots = list(range(engine.slots))
    return lambda: engine.step(slots, codes)


def fill(step: Callable[[], object], frames: int) -> None:
    for _ in range(frames):
        step()


def turn_by_turn(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Median milliseconds of each, and the median of the ratios pair by pair."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e3)
    ratios = [peer / own for own, peer in zip(*times, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--setup", action="store_true", help="create .venv-peers and stop")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of our weights and KV; default: as served")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.setup:
        set_up()
        return
    torch.set_num_threads(arguments.threads)
    config = SHAPES["demo"][0]
    cpu = torch.device("cpu")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(cpu)
    rows = []
    with torch.inference_mode():
        for slots in arguments.slots:
            ours, theirs = our_step(our_engine(config, slots, dtype)), moshi_step(config, slots)
            held = 0
            for context in (config.window // 4, config.window):
                fill(ours, context - held)
                fill(theirs, context - held)
                held = context + ROUNDS
                own_ms, peer_ms, ratio = turn_by_turn(ours, theirs)
                rows.append(
                    {"slots": slots, "context_frames": context, "ours_ms": own_ms, "moshi_ms": peer_ms, "ratio": ratio}
                )
                if not arguments.json:
                    print(
                        f"{slots:3d} slots, {context:4d} frames held: ours {own_ms:6.1f} ms, "
                        f"moshi {peer_ms:6.1f} ms, {ratio:4.1f} times faster",
                        flush=True,
                    )
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
