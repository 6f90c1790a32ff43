"""The language model over whole sequences, with gradients: the served weights, teacher-forced.

models/lm.py walks rows against a cache; here the same arithmetic runs over [batch, time] at once, and the depth
transformer over all eight codebooks at once, in bf16 where the matrices are. `tests/unit/training/test_lm_forward.py`
holds the two equal.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import AUDIO_CODEBOOKS, LMConfig
from models.layers import Embedding, Gating, Linear, apply_rope, rope_rotation
from models.lm import DepthLayer, LanguageModel, TemporalLayer
from training.lm_data import NEAR


class Logits(NamedTuple):
    text: Tensor  # [rows, text_card] fp32
    audio: Tensor  # [codebooks, rows, card] fp32


def initialise(model: LanguageModel, generator: torch.Generator) -> None:
    """Normal weights of 1/sqrt(fan-in); what branches add to the residual stream is scaled down by depth."""
    config = model.config
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("alpha"):
                parameter.fill_(1.0)
                continue
            deviation = 0.02 if "emb." in name else parameter.shape[1] ** -0.5
            if name.endswith(("out_proj.weight", "linear_out.weight")):
                layers = config.depformer_num_layers if name.startswith("depformer") else config.num_layers
                deviation /= math.sqrt(2.0 * layers)
            if name.startswith(("text_linear", "linears")):
                deviation *= 0.5  # starts near the uniform guess
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


def embed(model: LanguageModel, tokens: Tensor) -> Tensor:
    """tokens [rows, 17] int64 → [rows, dim]: the sum of the tables' entries; token -1 contributes nothing.

    Table by table, so that each parameter gets its gradient; the served model joins them into one look-up.
    """
    total = tokens.new_zeros(1, dtype=torch.float32)
    for stream, table in enumerate([model.text_emb, *model.emb]):
        given = (tokens[:, stream] >= 0).unsqueeze(-1)
        total = total + torch.where(given, table(tokens[:, stream].clamp(min=0)), 0.0)
    return total


def temporal(model: LanguageModel, columns: Tensor) -> Tensor:
    """columns [batch, time, 17] int64, from position 0 on → [batch, time, dim] fp32."""
    config = model.config
    batch, time, streams = columns.shape
    x = embed(model, columns.reshape(-1, streams))
    positions = torch.arange(time, device=columns.device).repeat(batch)
    rotation = rope_rotation(positions, config.head_dim, config.max_period)
    low = model.text_linear.weight.dtype
    mask = _causal(time, config.window, columns.device, low)
    for module in model.transformer.layers:
        layer = cast(TemporalLayer, module)
        packed = F.linear(layer.norm1(x).to(low), layer.self_attn.in_proj_weight)
        q, k, v = packed.view(batch * time, 3, config.num_heads, config.head_dim).unbind(1)
        q, k, v = (
            t.reshape(batch, time, config.num_heads, config.head_dim).transpose(1, 2)
            for t in (apply_rope(q, rotation), apply_rope(k, rotation), v)
        )
        mixed = _attend(q, k, v, mask)
        x = x + layer.self_attn.out_proj(mixed.transpose(1, 2).reshape(batch * time, config.dim))
        x = x + layer.gating(layer.norm2(x).to(low))
    hidden: Tensor = model.out_norm(x)
    return hidden.view(batch, time, config.dim)


def _causal(time: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[time, time], added to scores: 0 where a position sees itself and the `window - 1` before it, else -inf."""
    distance = torch.arange(time, device=device).unsqueeze(1) - torch.arange(time, device=device)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(time, time, device=device, dtype=dtype).masked_fill(hidden, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of [batch, heads, positions, head_dim] under an added mask.

    Two products and a softmax: on a CPU that is 2.4 times as fast as torch's fused kernel over 690 positions, and
    three times over the eight of a depth step.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v).view(shape)


def depth(model: LanguageModel, hidden: Tensor, tokens: Tensor, books: int = AUDIO_CODEBOOKS) -> Tensor:
    """What the first `books` codebooks' heads read, of rows whose tokens are known.

    hidden [rows, dim]; tokens [rows, 9] int64, the next column's text and agent codes (the last is not read)
    → [books, rows, depformer_dim] fp32.
    """
    config = model.config
    rows, dim = hidden.shape[0], config.depformer_dim
    heads, size = config.depformer_num_heads, config.depformer_dim // config.depformer_num_heads
    entry = _stacked(model.depformer_in, books)  # [books, D, dim]
    low = entry.dtype
    tables = [model.depformer_text_emb, *(cast(Embedding, module) for module in model.depformer_emb)][:books]
    x = torch.stack([table(tokens[:, k].clamp(min=0)) for k, table in enumerate(tables)])
    x = x + torch.einsum("nd,kod->kno", hidden.to(low), entry)
    mask = _causal(books, books, x.device, low)
    for module in model.depformer.layers:
        layer = cast(DepthLayer, module)
        in_proj = layer.self_attn.in_proj_weight.view(AUDIO_CODEBOOKS, 3 * dim, dim)[:books]
        out_proj = layer.self_attn.out_proj.weight.view(AUDIO_CODEBOOKS, dim, dim)[:books]
        packed = torch.bmm(layer.norm1(x).to(low), in_proj.transpose(1, 2))
        q, k, v = packed.view(books, rows, 3, heads, size).permute(2, 1, 3, 0, 4).unbind(0)
        mixed = _attend(q, k, v, mask)  # [rows, heads, books, size]
        x = x + torch.bmm(mixed.permute(2, 0, 1, 3).reshape(books, rows, dim), out_proj.transpose(1, 2))
        gates = [cast(Gating, gate) for gate in layer.gating][:books]
        packed = torch.bmm(layer.norm2(x).to(low), torch.stack([g.linear_in.weight for g in gates]).transpose(1, 2))
        gate, value = packed.chunk(2, dim=-1)
        out = torch.stack([g.linear_out.weight for g in gates])
        x = x + torch.bmm(F.silu(gate) * value, out.transpose(1, 2))
    return x


def _stacked(modules: nn.ModuleList, count: int = AUDIO_CODEBOOKS) -> Tensor:
    return torch.stack([cast(Linear, module).weight for module in list(modules)[:count]])


class States(NamedTuple):
    """What the heads read, fp32."""

    text: Tensor  # [1, rows, dim]
    near: Tensor  # [NEAR, voiced rows, depformer_dim]
    far: Tensor  # [8 - NEAR, chosen rows among them, depformer_dim]


def states(
    model: LanguageModel, inputs: Tensor, rows: Tensor, following: Tensor, voiced: Tensor, chosen: Tensor
) -> States:
    """inputs [batch, time, 17] int64; rows [n] int64: flat indices b * time + t of columns whose successor is to be
    predicted, none of them a sequence's last; following [n, 9]: those successors' text and agent codes; voiced [n]
    bool: where codes are predicted, and not the text alone; chosen [n] bool: where these are all eight, and not the
    first NEAR. Matrices may be bf16 while embeddings and norms are fp32; the residual streams always are.
    """
    batch, time, _ = inputs.shape
    hidden = temporal(model, inputs).reshape(batch * time, -1)[rows]
    spoken, following, chosen = hidden[voiced], following[voiced], chosen[voiced]
    whole = depth(model, spoken[chosen], following[chosen])
    others = depth(model, spoken[~chosen], following[~chosen], books=NEAR)
    # Rows in their order again: the first codes of both kinds.
    order = torch.cat([chosen.nonzero(), (~chosen).nonzero()]).squeeze(1).argsort()
    return States(hidden.unsqueeze(0), torch.cat([whole[:NEAR], others], dim=1)[:, order], whole[NEAR:])


def heads(model: LanguageModel) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices that make logits of `states`: the text's [text_card, dim], the codes' eight [card, depth dim]."""
    return [model.text_linear.weight], [cast(Linear, module).weight for module in model.linears]


def forward(model: LanguageModel, columns: Tensor, rows: Tensor) -> Logits:
    """Predictions of the columns after the chosen ones, of which `states` knows more."""
    following = columns.reshape(-1, columns.shape[-1])[rows + 1][:, : 1 + AUDIO_CODEBOOKS]
    every = torch.ones_like(rows, dtype=torch.bool)
    read = states(model, columns, rows, following, every, every)
    low = model.text_linear.weight.dtype
    logits = torch.bmm(torch.cat([read.near, read.far]).to(low), _stacked(model.linears).transpose(1, 2))
    return Logits(model.text_logits(read.text[0].to(low)), logits.float())


def parameters_of(config: LMConfig) -> int:
    """How many weights a model of this shape has."""
    return sum(p.numel() for p in LanguageModel(config, device="meta").parameters())
