"""How codebooks learn: exponential moving averages of what chose an entry, and new life for entries nobody chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from models.mimi_quantizer import Codebook, Quantized, SplitQuantizer

# Frames an average remembers: twenty for each of 2,048 entries, whatever the batch (moving averages instead of
# gradients: van den Oord et al. 2017, appendix).
MEMORY_FRAMES = 40_000
_DEAD = 0.15  # of a fair share; an entry chosen less often is given to somebody who needs it


@torch.no_grad()
def initialise(quantizer: SplitQuantizer, latent: Tensor, generator: torch.Generator) -> None:
    """Projections become the latent's principal axes, entries random inputs of their codebook.

    Each codebook sees what those before leave over. latent [batch, dim, frames]: the more frames the better; with
    fewer than entries they repeat, slightly moved.
    """
    points = latent.transpose(1, 2).flatten(0, 1).float()
    axes = torch.linalg.eigh(torch.cov(points.t())).eigenvectors.flip(1)  # largest first
    for split in (quantizer.rvq_first, quantizer.rvq_rest):
        directions = axes[:, : split.input_proj.weight.shape[0]]
        split.input_proj.weight.copy_(directions.t().unsqueeze(2))
        # Half each: the two splits' outputs are added.
        split.output_proj.weight.copy_(0.5 * directions.unsqueeze(2))
    for index, codebook in enumerate(quantizer.codebooks()):
        inputs = quantizer(latent).inputs[index].detach().float()
        choice = torch.randint(len(inputs), (len(codebook.cluster_usage),), generator=generator)
        spread = inputs.std() * 0.02
        noise = torch.randn(len(choice), inputs.shape[1], generator=generator).to(inputs.device) * spread
        # A usage below a fair share of any batch: the first real inputs soon outweigh this guess.
        usage = 0.02
        codebook.embedding_sum.copy_((inputs[choice.to(inputs.device)] + noise) * usage)
        codebook.cluster_usage.fill_(usage)
        codebook._initialized.fill_(1.0)


@torch.no_grad()
def update(quantizer: SplitQuantizer, seen: Quantized, generator: torch.Generator) -> int:
    """One step of every codebook towards what it saw. Returns how many dead entries were replaced."""
    codes = seen.codes.flatten(0, 1)
    replaced = 0
    for index, codebook in enumerate(quantizer.codebooks()):
        replaced += _update_one(codebook, seen.inputs[index].detach().float(), codes[:, index], generator)
    return replaced


def _update_one(codebook: Codebook, inputs: Tensor, codes: Tensor, generator: torch.Generator) -> int:
    counts = torch.zeros_like(codebook.cluster_usage)
    counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
    sums = torch.zeros_like(codebook.embedding_sum).index_add_(0, codes, inputs)
    decay = max(0.9, 1.0 - len(inputs) / MEMORY_FRAMES)
    codebook.cluster_usage.mul_(decay).add_(counts, alpha=1 - decay)
    codebook.embedding_sum.mul_(decay).add_(sums, alpha=1 - decay)
    fair = len(inputs) / len(counts)  # choices per entry and batch if all were equally liked
    dead = (codebook.cluster_usage < _DEAD * fair).nonzero()[:, 0]
    # A few at a time: replacing all at once from one batch would put many entries at the same sound.
    limit = max(1, len(inputs) // 16)
    if len(dead) > limit:
        dead = dead[torch.randperm(len(dead), generator=generator)[:limit].to(dead.device)]
    if len(dead):
        choice = torch.randint(len(inputs), (len(dead),), generator=generator).to(inputs.device)
        # Half a fair share lets it live for about one memory's length without being chosen.
        codebook.embedding_sum[dead] = inputs[choice] * (0.5 * fair)
        codebook.cluster_usage[dead] = 0.5 * fair
    return len(dead)


def use_of(codes: Tensor, entries: int) -> list[float]:
    """Share of each codebook's entries that occur in codes [rows, codebooks]."""
    return [len(torch.unique(codes[:, index])) / entries for index in range(codes.shape[1])]
