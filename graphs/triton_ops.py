"""The step's operations as Triton kernels; see graphs.step_ops for what each one means."""

from __future__ import annotations

from torch import Tensor

from graphs import linear_triton, sampling_triton
from graphs.attention_triton import TritonAttention
from graphs.ring_cache import RingCache
from graphs.step_inputs import AUDIO, GIVEN, GIVEN_EMBEDDING, KEY, SLOT, TEXT
from graphs.step_ops import Turn, torch_linear


class TritonOps:
    """One kernel an operation, three for attention."""

    def __init__(self, cache: RingCache, heads: int, head_dim: int) -> None:
        self._attention = TritonAttention(cache, heads, head_dim)

    def embed(self, rows: Tensor, table: Tensor, starts: Tensor, given: Tensor) -> Tensor:
        return linear_triton.embed(rows, GIVEN_EMBEDDING, table, starts, given)

    def norm_of(self, x: Tensor, alpha: Tensor, index: Tensor) -> Tensor:
        return linear_triton.norm_of(x, alpha, index)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        alpha: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        return linear_triton.linear(x, weight, alpha=alpha, residual=residual, gated=gated, out=out)

    def attend(self, layer: int, packed: Tensor, rows: Tensor, blocks: Tensor, turn: Turn) -> Tensor:
        return self._attention(layer, packed, rows, SLOT, blocks, turn)

    def store(self, layer: int, packed: Tensor, rows: Tensor, turn: Turn) -> Tensor:
        """The first half of `attend`: writes keys and values, returns the rotated queries [n, dim]."""
        return self._attention.store(layer, packed, rows, SLOT, turn)

    def depth_attend(self, packed: Tensor, codebook: int, heads: int) -> Tensor:
        return linear_triton.depth_attend(packed, codebook, heads)

    def draw(
        self, logits: Tensor, asked: Tensor, stream: int, tokens: Tensor, following: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        columns = (TEXT if stream == 0 else AUDIO, KEY, GIVEN)
        return sampling_triton.draw(logits, asked, columns, stream, tokens, following)


class MixedOps(TritonOps):
    """Triton kernels around torch's own matrix products, to measure one against the other.

    Torch picks a product's kernel by the row count, so a row's bits may differ between the step with a prompt's tile
    and the one without: recovery is then exact only where both were measured equal.
    """

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        alpha: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        return torch_linear(x, weight, alpha=alpha, residual=residual, gated=gated, out=out)
