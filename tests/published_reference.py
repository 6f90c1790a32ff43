"""The language model written down from its description, slowly: whole sequences, no cache, one conversation.

It shares no code with models/ or graphs/, so that golden runs of any size can be made to hold them against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SILENCE = [948, 243, 1178, 546, 1736, 1030, 1978, 2008]
SINE = [430, 1268, 381, 1611, 1095, 1495, 56, 472]
Frame = list[int | None]


def norm(x: Tensor, alpha: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-8) * alpha.flatten()


def gated(x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    packed = x @ weights[f"{prefix}.linear_in.weight"].T
    half = packed.shape[-1] // 2
    return (F.silu(packed[..., :half]) * packed[..., half:]) @ weights[f"{prefix}.linear_out.weight"].T


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    """q, k, v [time, dim], mask [time, time] bool → [time, dim]."""
    parts = []
    width = q.shape[1] // heads
    for head in range(heads):
        span = slice(head * width, (head + 1) * width)
        scores = q[:, span] @ k[:, span].T / math.sqrt(width)
        parts.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, span])
    return torch.cat(parts, dim=1)


def turned(x: Tensor, heads: int, period: float) -> Tensor:
    """Rotary embedding of x [time, dim], pairs (2i, 2i + 1) of each head."""
    out = x.clone()
    width = x.shape[1] // heads
    time = torch.arange(x.shape[0], dtype=torch.float32)
    for head in range(heads):
        for pair in range(width // 2):
            angle = time * period ** (-2 * pair / width)
            even, odd = head * width + 2 * pair, head * width + 2 * pair + 1
            out[:, even] = x[:, even] * angle.cos() - x[:, odd] * angle.sin()
            out[:, odd] = x[:, even] * angle.sin() + x[:, odd] * angle.cos()
    return out


def temporal(columns: Sequence[Sequence[int]], weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """The output for the last of the columns: [dim]."""
    tokens = torch.tensor(columns)
    x = weights["text_emb.weight"][tokens[:, 0]]
    for stream in range(16):
        x = x + weights[f"emb.{stream}.weight"][tokens[:, stream + 1]]
    time = torch.arange(len(columns))
    distance = time[:, None] - time[None, :]
    mask = (distance >= 0) & (distance < config["context"] - 1)
    heads = config["num_heads"]
    for layer in range(config["num_layers"]):
        prefix = f"transformer.layers.{layer}"
        packed = norm(x, weights[f"{prefix}.norm1.alpha"]) @ weights[f"{prefix}.self_attn.in_proj_weight"].T
        q, k, v = packed.chunk(3, dim=1)
        q, k = (turned(part, heads, config["max_period"]) for part in (q, k))
        x = x + attention(q, k, v, heads, mask) @ weights[f"{prefix}.self_attn.out_proj.weight"].T
        x = x + gated(norm(x, weights[f"{prefix}.norm2.alpha"]), weights, f"{prefix}.gating")
    return norm(x[-1], weights["out_norm.alpha"])


def depth(
    hidden: Tensor, text: int, known: Frame, weights: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[list[int], Tensor]:
    """The agent's eight codes, greedily but for those known, and the logits they were taken from: [8, card]."""
    dim, heads = config["depformer_dim"], config["depformer_num_heads"]
    inputs: list[Tensor] = []
    codes: list[int] = []
    logits: list[Tensor] = []
    for step in range(8):
        table, token = ("depformer_text_emb", text) if step == 0 else (f"depformer_emb.{step - 1}", codes[-1])
        inputs.append(weights[f"depformer_in.{step}.weight"] @ hidden + weights[f"{table}.weight"][token])
        x = torch.stack(inputs)
        mask = torch.ones(step + 1, step + 1).tril().bool()
        for layer in range(config["depformer_num_layers"]):
            prefix = f"depformer.layers.{layer}"
            ins = weights[f"{prefix}.self_attn.in_proj_weight"].view(16, 3 * dim, dim)[: step + 1]
            outs = weights[f"{prefix}.self_attn.out_proj.weight"].view(16, dim, dim)[: step + 1]
            packed = torch.einsum("skd,sd->sk", ins, norm(x, weights[f"{prefix}.norm1.alpha"]))
            x = x + torch.einsum("skd,sd->sk", outs, attention(*packed.chunk(3, dim=1), heads, mask))
            normed = norm(x, weights[f"{prefix}.norm2.alpha"])
            x = x + torch.stack([gated(normed[k], weights, f"{prefix}.gating.{k}") for k in range(step + 1)])
        logits.append(weights[f"linears.{step}.weight"] @ x[-1])
        given = known[step]
        codes.append(int(logits[-1].argmax()) if given is None else given)
    return codes, torch.stack(logits)


def golden_run(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], voice: Tensor, role: Tensor, user: Tensor
) -> dict[str, Tensor]:
    """A golden run in its published form. voice [T, 8], role [R], user [N, 8] int64."""
    delays = config["delays"]
    silent: Frame = [3, *SILENCE, *SINE]
    calls: list[Frame] = [[3, *frame, *SINE] for frame in voice.tolist()]
    calls += [silent] * 6 + [[token, *SILENCE, *SINE] for token in role.tolist()] + [silent] * 6
    prompt = len(calls)
    calls += [[None] * 9 + frame for frame in user.tolist()]
    initial = [config["text_card"]] + [config["card"]] * 16
    # Column c is filled by call c; what the calls bring lands `delay` columns later. The first call is dropped.
    columns: list[list[int]] = [list(initial)]
    tokens, text_logits, audio_logits = [], [], []
    for call in range(1, len(calls)):
        brought: Frame = [initial[k] if call - delays[k] < 1 else calls[call - delays[k]][k] for k in range(17)]
        hidden = temporal(columns, weights, config)
        text = weights["text_linear.weight"] @ hidden
        first = brought[0] if brought[0] is not None else int(text.argmax())
        codes, audio = depth(hidden, first, brought[1:9], weights, config)
        columns.append([first, *codes, *(token for token in brought[9:] if token is not None)])
        if call >= prompt:
            tokens.append([columns[call - 1 + delays[k]][k] for k in range(17)])
            text_logits.append(text)
            audio_logits.append(audio)
    return {
        "voice_prompt_codes": voice,
        "text_prompt_tokens": role,
        "user_codes": user,
        "expected_tokens": torch.tensor(tokens),
        "expected_text_logits": torch.stack(text_logits),
        "expected_audio_logits_every_10": torch.stack(audio_logits[::10]),
    }
