"""The language model as the frame step sees it, and the implementation in torch operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.backends import Backends
from graphs.cuda_step import StaticStep, default_ops
from graphs.kv_cache import KVCache, Span
from graphs.ring_cache import RingCache
from graphs.step_inputs import Draws
from graphs.step_ops import StepOps
from models.lm import DepthPass, LanguageModel

LogitsProbe = Callable[[Tensor, Tensor], None]  # text [emits, card] and audio [emits, 8, card], fp32


class DepthLogits(Protocol):
    """One frame's walk through the agent's codebooks; see models.lm.DepthPass."""

    def logits(self, codebook: int, previous: Tensor) -> Tensor: ...


class StepModel(Protocol):
    """Weights and arithmetic over rows, beside the cache that they read and write."""

    @property
    def device(self) -> torch.device: ...

    def hidden(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        spans: Sequence[Span],
        overrides: Sequence[tuple[int, Tensor]],
    ) -> Tensor:
        """Input columns tokens [rows, 17] at positions [rows] → the temporal transformer's output [rows, dim].

        Spans lie end to end from row 0 on, rows behind them are padding. Each override replaces the summed input
        embeddings of rows start … by its own [n, dim].
        """
        ...

    def text_logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, dim] → [rows, text_card] fp32."""
        ...

    def depth(self, hidden: Tensor) -> DepthLogits: ...


@runtime_checkable
class WholeStep(Protocol):
    """A model that runs a frame in one piece, sampling included (see graphs.cuda_step)."""

    def frame(
        self,
        tokens: npt.NDArray[np.int16],
        spans: Sequence[Span],
        draws: Draws,
        overrides: Sequence[tuple[int, Tensor]],
        probe: LogitsProbe | None,
    ) -> npt.NDArray[np.int16]:
        """Input columns tokens [rows, 17] → the tokens drawn, [draws, 9]; spans and overrides as in StepModel."""
        ...


class TorchModel:
    """Torch operators, for any device."""

    def __init__(self, model: LanguageModel, cache: KVCache) -> None:
        self._model = model.eval()
        self._cache = cache

    @property
    def device(self) -> torch.device:
        return self._model.device

    def hidden(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        spans: Sequence[Span],
        overrides: Sequence[tuple[int, Tensor]],
    ) -> Tensor:
        """See StepModel."""
        model = self._model
        x = model.embed(torch.from_numpy(tokens).to(model.device))
        for start, embeddings in overrides:
            x[start : start + embeddings.shape[0]] = embeddings.to(x)
        return model.temporal(x, torch.from_numpy(positions).to(model.device), self._cache.attention(spans))

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self._model.text_logits(hidden)

    def depth(self, hidden: Tensor) -> DepthPass:
        return DepthPass(self._model, hidden)


def step_model(model: LanguageModel, cache: KVCache, backends: Backends | None = None) -> StepModel | WholeStep:
    """The implementation that goes with a cache's layout and the chosen products (see graphs.backends).

    Raises ValueError for products that there are not, ImportError for a library that is not there.
    """
    attention, linear = ("ours", "ours") if backends is None else (backends.attention, backends.linear)
    if isinstance(cache, RingCache):
        return StaticStep(model, cache, _other_ops(model, cache, attention, linear))
    layout = type(cache).__name__  # by name: their modules need numba, which may not be there
    if layout == "VllmBlockCache" or (layout == "CompiledCache" and linear not in ("ours", "int8")):
        from graphs.mixed_step import MixedModel

        return MixedModel(model, cache, linear)
    if layout == "CompiledCache":
        from graphs.attention_cpu import CompiledCache
        from graphs.compiled_step import CompiledModel

        assert isinstance(cache, CompiledCache)
        return CompiledModel(model, cache, small=linear == "int8")
    return TorchModel(model, cache)


def _other_ops(model: LanguageModel, cache: RingCache, attention: str, linear: str) -> StepOps | None:
    """vLLM's kernels around ours, None where nobody has chosen them."""
    if attention != "vllm" and linear != "vllm-fp8":
        return None
    from graphs.vllm_cuda import VllmOps, kernels

    base = default_ops(model, cache)
    found = kernels(model.device)
    return VllmOps(
        base, cache, model.config.num_heads, found, attention=attention == "vllm", linear=linear == "vllm-fp8"
    )
