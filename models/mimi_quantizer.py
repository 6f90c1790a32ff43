"""The codec's split residual quantizer: one semantic codebook, then acoustic ones on the same latent."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import QuantizerConfig
from models.mimi_conv import PackedModule

_MIN_USAGE = 1e-5  # an entry nobody used yet has no mean to divide by


class Quantized(NamedTuple):
    """What training needs of one pass."""

    latent: Tensor  # [batch, dim, frames], straight-through: its gradient is the input's
    codes: Tensor  # [batch, frames, codebooks] int64
    inputs: tuple[Tensor, ...]  # per codebook [batch * frames, codebook dim]: what it had to match, with gradient
    entries: tuple[Tensor, ...]  # per codebook, the same shape: what it chose, without


class Codebook(nn.Module):
    """An EMA codebook as stored: sums and usages, whose quotient are the entries.

    Buffers `_initialized` [1], `cluster_usage` [bins], `embedding_sum` [bins, dim].
    """

    _initialized: Tensor
    cluster_usage: Tensor
    embedding_sum: Tensor

    def __init__(self, bins: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("_initialized", torch.zeros(1))
        self.register_buffer("cluster_usage", torch.ones(bins))
        self.register_buffer("embedding_sum", torch.zeros(bins, dim))

    def entries(self) -> Tensor:
        """[bins, dim]."""
        return self.embedding_sum / self.cluster_usage.clamp(min=_MIN_USAGE).unsqueeze(1)


class CodebookLayer(nn.Module):
    """Holds a codebook at `_codebook`, the path under which it is stored."""

    def __init__(self, bins: int, dim: int) -> None:
        super().__init__()
        self._codebook = Codebook(bins, dim)

    @property
    def codebook(self) -> Codebook:
        return self._codebook


class ResidualQuantizer(nn.Module):
    """Codebooks each of which quantizes what those before left over.

    Parameters `input_proj.weight` [dim, latent, 1], `output_proj.weight` [latent, dim, 1], `vq.layers.<n>`.
    """

    def __init__(self, latent_dim: int, config: QuantizerConfig, codebooks: int) -> None:
        super().__init__()
        self.input_proj = nn.Conv1d(latent_dim, config.dimension, 1, bias=False)
        self.output_proj = nn.Conv1d(config.dimension, latent_dim, 1, bias=False)
        layers = nn.ModuleList(CodebookLayer(config.bins, config.dimension) for _ in range(codebooks))
        self.vq = nn.ModuleDict({"layers": layers})

    def codebooks(self) -> list[Codebook]:
        return [cast(CodebookLayer, layer).codebook for layer in cast(nn.ModuleList, self.vq["layers"])]


class Tables(NamedTuple):
    """All that encoding and decoding read, laid out for it."""

    project_in: Tensor  # [2 * dim, latent]: semantic rows, then acoustic ones
    project_out: Tensor  # [latent, 2 * dim]
    entries: Tensor  # [codebooks, bins, dim]
    norms: Tensor  # [codebooks, bins], squared
    offsets: Tensor  # [codebooks] int64: where a codebook begins in entries.view(-1, dim)


def nearest(rows: Tensor, entries: Tensor, norms: Tensor) -> Tensor:
    """Index [rows] int64 of the entry nearest by L2 to each of rows [rows, dim]; the lowest index of equals.

    |x - e|² without |x|², which is the same for all entries.
    """
    return torch.addmm(norms, rows, entries.t(), alpha=-2.0).argmin(dim=1)


class SplitQuantizer(PackedModule):
    """The published split quantizer; `rvq_first` is semantic, `rvq_rest` acoustic.

    More codebooks may be stored than are used: `used` of them are, the first is the semantic one.
    """

    def __init__(self, latent_dim: int, config: QuantizerConfig, used: int) -> None:
        super().__init__()
        if not 2 <= used <= config.n_q:
            raise ValueError(f"the codec stores {config.n_q} codebooks, so {used} of them can't be used")
        self.used = used
        self.rvq_first = ResidualQuantizer(latent_dim, config, 1)
        self.rvq_rest = ResidualQuantizer(latent_dim, config, config.n_q - 1)

    def codebooks(self) -> list[Codebook]:
        """Those in use, in the order of the codes."""
        return (self.rvq_first.codebooks() + self.rvq_rest.codebooks())[: self.used]

    def tables(self) -> Tables:
        if self.training or not isinstance(self._derived, Tables):
            with torch.no_grad():
                self._derived = self._build_tables()
        assert isinstance(self._derived, Tables)
        return self._derived

    def _build_tables(self) -> Tables:
        splits = (self.rvq_first, self.rvq_rest)
        entries = torch.stack([codebook.entries() for codebook in self.codebooks()])
        return Tables(
            project_in=torch.cat([split.input_proj.weight[..., 0] for split in splits]),
            project_out=torch.cat([split.output_proj.weight[..., 0] for split in splits], dim=1),
            entries=entries,
            norms=entries.square().sum(-1),
            offsets=torch.arange(self.used, device=entries.device) * entries.shape[1],
        )

    def encode(self, latent: Tensor) -> Tensor:
        """[rows, latent] → codes [rows, used] int64."""
        tables = self.tables()
        semantic, residual = F.linear(latent, tables.project_in).chunk(2, dim=1)
        codes = [nearest(semantic, tables.entries[0], tables.norms[0])]
        for index in range(1, self.used):
            entries = tables.entries[index]
            code = nearest(residual, entries, tables.norms[index])
            codes.append(code)
            if index + 1 < self.used:
                residual = residual - entries.index_select(0, code)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [rows, used] int64 → [rows, latent]."""
        tables = self.tables()
        entries = F.embedding(codes + tables.offsets, tables.entries.flatten(0, 1))
        return F.linear(torch.cat([entries[:, 0], entries[:, 1:].sum(1)], dim=1), tables.project_out)

    def forward(self, latent: Tensor) -> Quantized:
        """[batch, latent, frames] → the quantized latent and what the codebooks saw; differentiable.

        Reads the codebooks as they are now; whoever trains them updates the sums and usages.
        """
        batch, _, frames = latent.shape
        codes: list[Tensor] = []
        inputs: list[Tensor] = []
        chosen: list[Tensor] = []
        outputs: list[Tensor] = []
        for split, codebooks in (
            (self.rvq_first, self.rvq_first.codebooks()),
            (self.rvq_rest, self.rvq_rest.codebooks()[: self.used - 1]),
        ):
            projected = split.input_proj(latent)
            target = projected.transpose(1, 2).flatten(0, 1)
            residual, total = target, torch.zeros_like(target)
            for codebook in codebooks:
                table = codebook.entries().detach()
                code = nearest(residual.detach(), table, table.square().sum(-1))
                entry = table.index_select(0, code)
                codes.append(code.view(batch, frames))
                inputs.append(residual)
                chosen.append(entry)
                residual, total = residual - entry, total + entry
            # Straight through: the value of the entries, the gradient of what they stand for.
            passed = target + (total - target).detach()
            outputs.append(split.output_proj(passed.view(batch, frames, -1).transpose(1, 2)))
        return Quantized(outputs[0] + outputs[1], torch.stack(codes, dim=-1), tuple(inputs), tuple(chosen))
