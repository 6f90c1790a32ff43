"""PersonaPlex's language model: a temporal transformer over frames, a depth transformer over a frame's codebooks.

Plain torch over *rows*. A row is one frame of one conversation; rows know nothing of each other, and what they
share (keys and values) is reached through the attention that the caller passes in. Parameter names are the
published ones (Moshi, Défossez et al. 2024; PersonaPlex), so a checkpoint loads by name.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import AUDIO_CODEBOOKS, LMConfig
from models.layers import AttentionWeights, Embedding, Gating, Linear, RMSNorm, apply_rope, rope_rotation


class RowAttention(Protocol):
    """Writes the rows' keys and values of one layer where they belong, then attends.

    q, k, v: [rows, heads, head_dim], rotated. Returns [rows, heads, head_dim].
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class TemporalLayer(nn.Module):
    def __init__(self, config: LMConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, device)
        self.norm2 = RMSNorm(config.dim, device)
        self.self_attn = AttentionWeights(config.dim, 1, device, dtype)
        self.gating = Gating(config.dim, config.ffn_hidden, device, dtype)


class DepthLayer(nn.Module):
    """One layer of the depth transformer; each codebook has its own weights in it."""

    def __init__(self, config: LMConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        dim = config.depformer_dim
        self.norm1 = RMSNorm(dim, device)
        self.norm2 = RMSNorm(dim, device)
        self.self_attn = AttentionWeights(dim, AUDIO_CODEBOOKS, device, dtype)
        self.gating = nn.ModuleList(Gating(dim, config.depformer_hidden, device, dtype) for _ in range(AUDIO_CODEBOOKS))


class Layers(nn.Module):
    """Holds `layers`, as the published names have it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class LanguageModel(nn.Module):
    """The weights and the arithmetic. It has no state of its own: caches are the caller's.

    The user half of the depth transformer (codebooks 8-15) is not allocated: the user's codes are always
    given in a live call, so those steps never run.
    """

    def __init__(
        self, config: LMConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        dim, depth_dim = config.dim, config.depformer_dim
        audio_entries, text_entries = config.card + 1, config.text_card + 1  # one more: the initial token
        self.emb = nn.ModuleList(Embedding(audio_entries, dim, device, dtype) for _ in range(config.n_q))
        self.text_emb = Embedding(text_entries, dim, device, dtype)
        self.text_linear = Linear(dim, config.text_card, device, dtype)
        self.transformer = Layers([TemporalLayer(config, device, dtype) for _ in range(config.num_layers)])
        self.out_norm = RMSNorm(dim, device)
        self.depformer_in = nn.ModuleList(Linear(dim, depth_dim, device, dtype) for _ in range(AUDIO_CODEBOOKS))
        self.depformer_emb = nn.ModuleList(
            Embedding(audio_entries, depth_dim, device, dtype) for _ in range(AUDIO_CODEBOOKS - 1)
        )
        self.depformer_text_emb = Embedding(text_entries, depth_dim, device, dtype)
        self.depformer = Layers([DepthLayer(config, device, dtype) for _ in range(config.depformer_num_layers)])
        self.linears = nn.ModuleList(Linear(depth_dim, config.card, device, dtype) for _ in range(AUDIO_CODEBOOKS))
        self._table: Tensor | None = None
        audio_starts = [1 + text_entries + stream * audio_entries for stream in range(config.n_q)]
        self.table_starts = torch.tensor([1, *audio_starts])  # see joined_table

    @property
    def device(self) -> torch.device:
        return self.text_linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text_linear.weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Sums the embeddings of a frame's 17 tokens, unscaled; token -1 ("no input") contributes zero.

        tokens: [rows, 17] int64 → [rows, dim].
        """
        tables = [self.text_emb, *self.emb]
        if self.training:  # gradients go to the parameters, table by table
            given = (tokens >= 0).unsqueeze(-1)
            looked_up = (table(tokens[:, i].clamp(min=0)) for i, table in enumerate(tables))
            return torch.stack([torch.where(given[:, i], x, 0) for i, x in enumerate(looked_up)]).sum(0)
        index = torch.where(tokens >= 0, tokens + self.table_starts.to(tokens.device), 0)
        return F.embedding_bag(index, self.joined_table(), mode="sum")

    def joined_table(self) -> Tensor:
        """One table [entries, dim] of all 17 streams behind a row of zeros, so that a frame is embedded by one look-up.

        Stream i's token t stands in row table_starts[i] + t. The parameters become views of it: nothing is held twice.
        """
        if self._table is not None and self._table[1:].data_ptr() == self.text_emb.weight.data_ptr():
            return self._table  # else it is the first time, or the weights have moved since
        tables = [self.text_emb, *self.emb]
        joined = torch.cat([self.text_emb.weight.new_zeros(1, self.config.dim), *(t.weight for t in tables)]).detach()
        start = 1
        for table in tables:
            entries = table.weight.shape[0]
            table.weight.data = joined[start : start + entries]
            start += entries
        self._table = joined
        return joined

    def temporal(self, x: Tensor, positions: Tensor, attend: RowAttention) -> Tensor:
        """Runs the temporal transformer and its output norm.

        x: [rows, dim], positions: [rows] int64 (frames since the conversation's first column) → [rows, dim].
        """
        config = self.config
        rows = x.shape[0]
        rotation = rope_rotation(positions, config.head_dim, config.max_period).unsqueeze(1)
        for index, layer in enumerate(self.transformer.layers):
            assert isinstance(layer, TemporalLayer)
            packed = F.linear(layer.norm1(x), layer.self_attn.in_proj_weight)
            packed = packed.view(rows, 3, config.num_heads, config.head_dim)
            q, k = apply_rope(packed[:, :2], rotation).unbind(1)
            mixed = attend(index, q, k, packed[:, 2])
            x = x + layer.self_attn.out_proj(mixed.reshape(rows, config.dim))
            x = x + layer.gating(layer.norm2(x))
        normed: Tensor = self.out_norm(x)
        return normed

    def text_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, dim] from `temporal` → [rows, text_card] fp32."""
        logits: Tensor = self.text_linear(hidden)
        return logits.float()


class DepthPass:
    """One frame's walk through the agent's eight codebooks, for many rows at once.

    Codebook k sees its own k + 1 positions and nothing else, so the cache lives and dies with the frame.
    There is no positional embedding and no norm before the heads (as published).
    """

    def __init__(self, model: LanguageModel, hidden: Tensor) -> None:
        """hidden: [rows, dim], the temporal output."""
        self._model = model
        self._hidden = hidden
        config = model.config
        rows, heads = hidden.shape[0], config.depformer_num_heads
        shape = (config.depformer_num_layers, rows, heads, AUDIO_CODEBOOKS, config.depformer_dim // heads)
        self._keys = hidden.new_empty(shape)
        self._values = hidden.new_empty(shape)

    def logits(self, codebook: int, previous: Tensor) -> Tensor:
        """The logits of codebook `codebook` given the token before it (the text token for codebook 0).

        previous: [rows] int64 → [rows, card] fp32. Must be called for codebooks 0, 1, 2, … in turn.
        """
        model, config = self._model, self._model.config
        rows, dim = self._hidden.shape[0], config.depformer_dim
        heads = config.depformer_num_heads
        table = model.depformer_text_emb if codebook == 0 else model.depformer_emb[codebook - 1]
        x = model.depformer_in[codebook](self._hidden) + table(previous)
        for index, layer in enumerate(model.depformer.layers):
            assert isinstance(layer, DepthLayer)
            weights = layer.self_attn
            in_proj = weights.in_proj_weight[codebook * 3 * dim : (codebook + 1) * 3 * dim]
            out_proj = weights.out_proj.weight[codebook * dim : (codebook + 1) * dim]
            q, k, v = F.linear(layer.norm1(x), in_proj).view(rows, 3, heads, 1, dim // heads).unbind(1)
            keys, values = self._keys[index], self._values[index]
            keys[:, :, codebook : codebook + 1] = k
            values[:, :, codebook : codebook + 1] = v
            seen = slice(0, codebook + 1)
            mixed = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])
            x = x + F.linear(mixed.reshape(rows, dim), out_proj)
            x = x + layer.gating[codebook](layer.norm2(x))
        out: Tensor = model.linears[codebook](x)
        return out.float()
