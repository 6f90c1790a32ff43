"""Cross-entropy of many heads at once, which never holds their logits: 8 × 2,048 for every frame.

Logits, softmax and gradient of one head at a time stay in the cache; kept for all of them, as autograd would, they
are a third of a step on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _HeadsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, weights: Tensor, learning: bool, *heads: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
        states = x.to(heads[0].dtype)
        grad_x = torch.empty_like(states) if learning else None
        grads = []
        for k, head in enumerate(heads):
            logits = F.linear(states[k], head)
            index = targets[k].unsqueeze(1)
            if grad_x is None:
                losses[k] = F.cross_entropy(logits.float(), targets[k], reduction="none")
                continue
            share = logits.softmax(-1, dtype=torch.float32)
            weight = weights[k].unsqueeze(1)
            # The least share that fp32's logarithm tells from zero: a loss of 87 nats at most.
            losses[k] = share.gather(1, index).squeeze(1).clamp(min=1e-38).log().neg()
            grad = share.mul_(weight).scatter_add_(1, index, -weight).to(states.dtype)
            torch.mm(grad, head, out=grad_x[k])
            grads.append(grad.t() @ states[k])
        if grad_x is not None:
            ctx.save_for_backward(grad_x.to(x.dtype), *grads)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *grads = ctx.saved_tensors
        return grad_x * upstream[0], None, None, None, *(grad * upstream[0].to(grad.dtype) for grad in grads)


def heads_loss(x: Tensor, heads: Sequence[Tensor], targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of cross-entropies in nats, and each of them [heads, rows] fp32 without gradient.

    x [heads, rows, dim] in any precision; heads: matrices [card, dim], which decide the arithmetic's; targets
    [heads, rows] int64; weights [heads, rows] fp32.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _HeadsLoss.apply
    return apply(x, targets, weights, torch.is_grad_enabled(), *heads)
