"""One language model, trained by several threads: each learns parts of a batch against shared weights.

A thread takes the next part whenever it is free, so a step lasts as long as all cores together need for it, whatever
else runs on them: OpenMP's threads wait for the slowest in every operation, these once a step. What is learnt is the
same for any number of threads, but for the order in which gradients are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import torch
from torch import Tensor, nn

from models.config import AUDIO_CODEBOOKS, TEXT_PAD
from models.lm import LanguageModel
from training.lm_data import NEAR, LMBatch, LMPart
from training.lm_forward import heads, states
from training.lm_loss import heads_loss
from training.optim import adamw, pack_moments, set_rate, unpack_moments

FIGURES = ("text", "words", "semantic", "near", "far")
Named = list[tuple[str, nn.Parameter]]


def loss_of(model: LanguageModel, part: LMPart, totals: Tensor) -> tuple[Tensor, Tensor]:
    """A part's share of its batch's loss, and what the batch's figures are made of: [5, 2], sums in nats and counts.

    Each kind of loss is averaged over its own weight in the whole batch (`totals`: of the text; frames), so that
    a batch's mix of padding and words does not move the others.
    """
    following = part.columns.reshape(-1, part.columns.shape[-1])[part.rows + 1][:, : 1 + AUDIO_CODEBOOKS]
    voiced = (part.weights[:, 1:] > 0).any(dim=1)
    read = states(model, part.inputs, part.rows, following, voiced, part.chosen)
    text_heads, code_heads = heads(model)
    targets, weights = following.t().contiguous(), part.weights.t().contiguous()  # [9, rows]
    text_loss, text = heads_loss(read.text, text_heads, targets[:1], weights[:1])
    # The first live column's delayed codes still belong to the prompt: they count nothing and may be -1.
    codes, told, chosen = targets[1:, voiced].clamp(min=0), weights[1:, voiced], part.chosen[voiced]
    near_loss, near = heads_loss(read.near, code_heads[:NEAR], codes[:NEAR], told[:NEAR])
    # Chosen rows stand for all: their far codes count for those of the others, too.
    share = chosen.float().sum() / max(1, len(chosen))
    far_told = told[NEAR:, chosen]
    far_loss, far = heads_loss(read.far, code_heads[NEAR:], codes[NEAR:, chosen], far_told / share.clamp(min=1e-6))
    counted, word = weights[0] > 0, (weights[0] > 0) & (targets[0] != TEXT_PAD)
    kinds = [
        (text[0], counted), (text[0], word),
        (near[0], told[0] > 0), (near[1:], told[1:NEAR] > 0), (far, far_told > 0),
    ]  # fmt: skip
    figures = torch.stack([torch.stack([loss[which].sum(), which.sum()]) for loss, which in kinds])
    return text_loss / totals[0] + (near_loss + far_loss) / totals[1], figures


class Team:
    """The model, its optimizer and the threads that share both. On a GPU it is one thread."""

    def __init__(self, model: LanguageModel, workers: int) -> None:
        """The model's own parameters stay fp32; threads calculate with a bf16 copy of its matrices."""
        self._model = model
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lm")
        self._shards = _shards(list(model.named_parameters()), workers)
        self._optimizers = [adamw(shard, betas=(0.9, 0.95), weight_decay=0.05, fused=True) for shard in self._shards]
        self._low = {n: p.detach().bfloat16() for n, p in model.named_parameters() if _is_matrix(n)}
        self._replicas = [self._replica() for _ in range(workers)]
        self._own = [dict(replica.named_parameters()) for replica in self._replicas]

    def _replica(self) -> LanguageModel:
        """The model again, on the same storage, with gradients of its own."""
        replica = LanguageModel(self._model.config, device="meta")
        for name, parameter in self._model.named_parameters():
            path, _, leaf = name.rpartition(".")
            shared = self._low.get(name, parameter.detach())
            setattr(replica.get_submodule(path), leaf, nn.Parameter(shared))
        return replica

    def learn(self, batch: LMBatch, rate: float, clip: float) -> tuple[dict[str, float], float]:
        """One step. Returns the batch's mean losses in nats and the gradient's norm before it was clipped to `clip`."""
        parts: SimpleQueue[LMPart] = SimpleQueue()
        for part in sorted(batch.parts, key=lambda part: -part.columns.numel()):
            parts.put(part)
        learnt = self._pool.map(lambda replica: self._learn(replica, parts, batch.totals), self._replicas)
        figures = means(sum(learnt, torch.zeros(len(FIGURES), 2)))
        squares = self._pool.map(self._gather, self._shards)
        norm = float(sum(squares)) ** 0.5
        share = min(1.0, clip / (norm + 1e-6))
        list(self._pool.map(lambda shard: self._move(shard, rate, share), range(len(self._shards))))
        return figures, norm

    def _learn(self, replica: LanguageModel, parts: SimpleQueue[LMPart], totals: Tensor) -> Tensor:
        figures = torch.zeros(len(FIGURES), 2)
        for part in _taken(parts):
            loss, own = loss_of(replica, part.to(self._model.device), totals)
            torch.autograd.backward(loss)
            figures += own.cpu()
        return figures

    @torch.no_grad()
    def _gather(self, shard: Named) -> float:
        """Adds up the threads' gradients of some parameters; returns their squared norm."""
        square = 0.0
        for name, parameter in shard:
            grads = [own[name].grad for own in self._own]
            total = torch.zeros_like(parameter)
            for own, grad in zip(self._own, grads, strict=True):
                if grad is not None:
                    total += grad
                    own[name].grad = None
            parameter.grad = total
            square += float(total.square().sum())
        return square

    @torch.no_grad()
    def _move(self, number: int, rate: float, share: float) -> None:
        for _, parameter in self._shards[number]:
            assert parameter.grad is not None
            parameter.grad.mul_(share)
        set_rate(self._optimizers[number], rate)
        self._optimizers[number].step()
        for name, parameter in self._shards[number]:
            if name in self._low:
                self._low[name].copy_(parameter)

    @torch.no_grad()
    def validate(self, batches: Sequence[LMBatch]) -> dict[str, float]:
        """Mean losses of batches, nothing learnt."""
        parts: SimpleQueue[LMPart] = SimpleQueue()
        for batch in batches:
            for part in batch.parts:
                parts.put(part)

        def judge(replica: LanguageModel) -> Tensor:
            figures = torch.zeros(len(FIGURES), 2)
            with torch.no_grad():  # a thread's own setting
                for part in _taken(parts):
                    figures += loss_of(replica, part.to(self._model.device), torch.ones(2))[1].cpu()
            return figures

        return means(sum(self._pool.map(judge, self._replicas), torch.zeros(len(FIGURES), 2)))

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as it is kept: `training.optim.pack_moments`."""
        packed: dict[str, Tensor] = {}
        for optimizer, shard in zip(self._optimizers, self._shards, strict=True):
            packed.update(pack_moments(optimizer, shard))
        return packed

    def load_moments(self, packed: Mapping[str, Tensor], step: int) -> None:
        for optimizer, shard in zip(self._optimizers, self._shards, strict=True):
            unpack_moments(optimizer, shard, packed, step)

    def close(self) -> None:
        self._pool.shutdown()


def means(figures: Tensor) -> dict[str, float]:
    """[5, 2] sums and counts → a mean for each of FIGURES."""
    sums, counts = figures.double().unbind(1)
    return dict(zip(FIGURES, (sums / counts.clamp(min=1.0)).tolist(), strict=True))


def _taken(parts: SimpleQueue[LMPart]) -> Iterator[LMPart]:
    while True:
        try:
            yield parts.get_nowait()
        except Empty:
            return


def _is_matrix(name: str) -> bool:
    """Tables of embeddings stay fp32, for common tokens add up hundreds of gradients; so do the norms' scales."""
    return not ("emb." in name or name.endswith("alpha"))


def _shards(named: Named, count: int) -> list[Named]:
    """The parameters in `count` heaps of about the same size."""
    shards: list[Named] = [[] for _ in range(count)]
    sizes = [0] * count
    for name, parameter in sorted(named, key=lambda pair: -pair[1].numel()):
        smallest = sizes.index(min(sizes))
        shards[smallest].append((name, parameter))
        sizes[smallest] += parameter.numel()
    return shards
