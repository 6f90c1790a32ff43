"""What the Triton kernels become on an H100, found out without one: they are compiled for it, not run.

    python -m benchmarks.kernels            # needs the package triton (extra `cuda`), no GPU
    python -m benchmarks.kernels --shape demo

For every kernel of the frame step at the model's shape: registers and spilled bytes a thread, shared memory a program,
and the instructions that say whether it will be fast: tensor-core products (HGMMA on Hopper, HMMA for small tiles) and
asynchronous copies 16 bytes wide.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.setting import shapes_of
from graphs import attention_triton, linear_triton, sampling_triton
from graphs.kv_cache import KEY_BLOCK, round_up
from graphs.ring_cache import FP8_EXPONENT
from graphs.slot_engine import DEFAULT_TILE
from graphs.step_inputs import DRAW_WIDTH, GIVEN, GIVEN_EMBEDDING, KEY, QUERY_ROWS, ROW_WIDTH, SLOT, TEXT
from graphs.triton_jit import power_of_two
from models.config import AUDIO_CODEBOOKS, STREAMS, LMConfig
from models.layers import RMS_EPS

H100 = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 << 10
BF16, FP32, FP8, INT = "*bf16", "*fp32", "*fp8e4nv", "*i32"
GENERATED = 1 + AUDIO_CODEBOOKS


class Launch(NamedTuple):
    """A kernel with the types and constants that the step launches it with."""

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3


class Compiled(NamedTuple):
    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: int  # tensor-core instructions
    wide_copies: int  # asynchronous, 16 bytes a thread


def launches(config: LMConfig) -> Iterator[Launch]:
    """Every kernel of a bf16 step, and the attention over an fp8 ring."""
    dim, depth, hidden = config.dim, config.depformer_dim, config.depformer_hidden
    yield linear("in_proj", 3 * dim, dim, normed=True)
    yield linear("out_proj", dim, dim, added=True)
    yield linear("gate_in", config.ffn_hidden, dim, normed=True, gated=True)
    yield linear("gate_out", dim, config.ffn_hidden, added=True)
    yield linear("text head", config.text_card, dim, out=FP32)
    yield linear("depth inputs", AUDIO_CODEBOOKS * depth, dim)
    yield linear("depth in_proj", 3 * depth, depth, normed=True)
    yield linear("depth out_proj", depth, depth, added=True)
    yield linear("depth gate_in", hidden, depth, normed=True, gated=True)
    yield linear("depth gate_out", depth, hidden, added=True)
    yield linear("depth head", config.card, depth, out=FP32)
    yield from attention(config, BF16)
    yield from attention(config, FP8)
    yield from attention(config, BF16, page=KEY_BLOCK)
    yield from attention(config, FP8, page=KEY_BLOCK)
    yield draw("draw text", config.text_card, depth)
    yield draw("draw audio", config.card, depth)
    yield Launch(
        "embed",
        linear_triton._embed,
        {"meta": INT, "table": BF16, "starts": "*i64", "given": BF16, "out": BF16},
        {
            "meta_stride": ROW_WIDTH, "streams": STREAMS, "given_column": GIVEN_EMBEDDING, "dim": dim,
            "block": min(1024, power_of_two(dim)),
        },
    )  # fmt: skip
    yield Launch(
        "out_norm",
        linear_triton._norm,
        {"x": BF16, "alpha": FP32, "index": INT, "out": BF16},
        {"index_stride": DRAW_WIDTH, "dim": dim, "block": power_of_two(dim), "eps": RMS_EPS},
        warps=8,
    )
    heads = config.depformer_num_heads
    yield Launch(
        "depth attend",
        linear_triton._depth_attend,
        {"packed": BF16, "out": BF16, "rows": "i32", "codebook": "i32", "softmax_scale": "fp32"},
        {
            "heads": heads, "head_dim": depth // heads, "dim_block": power_of_two(depth // heads),
            "codebooks": AUDIO_CODEBOOKS,
        },
        warps=1,
    )  # fmt: skip


def linear(
    name: str, outputs: int, inputs: int, *, normed: bool = False, gated: bool = False, added: bool = False,
    out: str = BF16,
) -> Launch:  # fmt: skip
    tile = linear_triton.tile_of(outputs, inputs, 2, gated)
    types = {"x": BF16, "weight": BF16, "alpha": FP32 if normed else BF16, "residual": BF16, "out": out}
    constants: dict[str, object] = {
        "outputs": outputs, "inputs": inputs, "normed": normed, "gated": gated, "added": added, "eps": RMS_EPS,
        "row_block": linear_triton.ROWS, "output_block": tile.outputs, "input_block": tile.inputs, "precision": "tf32",
    }  # fmt: skip
    types |= {"rows": "i32", "out_stride": "i32"}
    return Launch(name, linear_triton._linear, types, constants, stages=tile.stages)


def attention(config: LMConfig, stored: str, page: int = 0) -> Iterator[Launch]:
    """page: positions of a page, 0 for rings in one piece."""
    capacity, scaled = round_up(config.window + DEFAULT_TILE, KEY_BLOCK), stored == FP8
    splits = -(-capacity // attention_triton.SPLIT_KEYS)
    heads, head_dim = config.num_heads, config.head_dim
    rings = {
        "keys": stored, "values": stored, "scales": BF16 if scaled else stored, "scales_half": "i32", "table": INT
    }  # fmt: skip
    kind = f"{stored[1:]}{' in pages' if page else ''}"
    meta: dict[str, object] = {"meta_stride": ROW_WIDTH, "slot_column": SLOT, "heads": heads, "head_dim": head_dim}
    common: dict[str, object] = {"capacity": capacity, "page": page, "scaled": scaled}
    dim_block = max(16, power_of_two(head_dim))
    yield Launch(
        f"rope_store {kind}",
        attention_triton._rope_store,
        {"packed": BF16, "meta": INT, "cosine": FP32, "sine": FP32, "query": BF16, **rings},
        {**meta, **common, "half": power_of_two(head_dim // 2), "exponent": FP8_EXPONENT},
        warps=1,
    )
    partials = {"partial": FP32, "largest": FP32, "total": FP32}
    yield Launch(
        f"attend {kind}",
        attention_triton._attend,
        {"query": BF16, **rings, "blocks": INT, **partials, "softmax_scale": "fp32"},
        {
            **common, "window": config.window, "heads": heads, "head_dim": head_dim, "dim_block": dim_block,
            "splits": splits, "split_keys": attention_triton.SPLIT_KEYS, "query_rows": QUERY_ROWS,
            "key_rows": attention_triton.KEYS_AT_ONCE, "precision": "tf32",
        },
        stages=4 if page else 3,
    )  # fmt: skip
    if not scaled and not page:
        yield Launch(
            "combine",
            attention_triton._combine,
            {**partials, "meta": INT, "out": BF16},
            {**meta, "dim_block": dim_block, "splits": splits, "split_block": power_of_two(splits)},
        )


def draw(name: str, card: int, dim: int) -> Launch:
    types = {"logits": FP32, "asked": INT, "tokens": INT, "addend": BF16, "table": BF16, "start": BF16}
    constants: dict[str, object] = {
        "asked_stride": DRAW_WIDTH, "parameters": TEXT, "key_column": KEY, "given_column": GIVEN, "streams": GENERATED,
        "card": card, "card_block": power_of_two(card), "dim": dim, "dim_block": power_of_two(dim),
    }  # fmt: skip
    types |= {"logits_stride": "i32", "addend_stride": "i32", "stream": "i32"}
    return Launch(name, sampling_triton._draw, types, constants, warps=sampling_triton.warps_of(card))


def compile_for_h100(launch: Launch) -> Compiled:
    """Raises triton's CompilationError for a kernel that its interpreter may well have accepted."""
    names = launch.function.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in launch.types.items() if kind[0] == "*"}
    source = ASTSource(launch.function, signature, constants, aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=H100, options=options)
    usage, code = _dump(made.asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        launch.name,
        numbers.get("REG", 0),
        numbers.get("STACK", 0) + numbers.get("LOCAL", 0),
        made.metadata.shared,
        len(re.findall(r"\bH(?:G|)MMA\b", code)),
        len(re.findall(r"\bLDGSTS[.A-Z0-9]*\.128\b", code)),
    )


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly, by the cuobjdump that comes with triton."""
    tool = next(path for path in Path(triton.__file__).parent.rglob("cuobjdump*") if path.is_file())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(option: str) -> str:
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        return run("--dump-resource-usage"), run("-sass")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="7b", help="7b, demo, or a checkpoint's folder")
    arguments = parser.parse_args(argv)
    fits = True
    for launch in launches(shapes_of(arguments.shape)[0]):
        made = compile_for_h100(launch)
        fits = fits and made.shared_bytes <= SHARED_LIMIT
        print(
            f"{made.name:30s} registers {made.registers:3d}  spilled {made.spilled_bytes:4d} B  "
            f"shared {made.shared_bytes / 1024:6.1f} KiB  tensor-core products {made.products:3d}  "
            f"16-byte copies {made.wide_copies:3d}",
            flush=True,
        )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
