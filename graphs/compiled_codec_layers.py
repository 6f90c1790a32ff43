"""The codec's layers as the CPU computes them, compiled by numba, in fp32 (see graphs.compiled_codec).

Convolutions are products over windows (models.mimi_conv) whose rows overlap in memory, so nothing is copied but the
history before a frame. Wide, short ones take all slots' windows as rows of one product, so that their large weights
are read once; the others go slot by slot, whose samples stay in the processor's cache. Either way a row's sums are its
own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graphs.attention_cpu import mix, score, soften
from graphs.compiled import compiled, compiled_in_order, copy, exp, matmul, products
from graphs.compiled_layers import rotate

Array = npt.NDArray[Any]


class Convolution(NamedTuple):
    """models.mimi_conv.Packed for `products`: rows of `window` numbers, one every `hop`."""

    weight: Array
    bias: Array  # [columns]
    window: int
    hop: int


class Residual(NamedTuple):
    """x + narrow(ELU(wide(ELU(x))))."""

    wide: Convolution
    narrow: Convolution


class TransformerWeights(NamedTuple):
    """All layers one behind the other; see models.mimi_transformer.Layer."""

    norm1: Array  # weight and bias [layers, 2, dim], as norm2
    in_proj: Array
    out_proj: Array
    scale1: Array  # [layers, dim], as scale2
    norm2: Array
    linear1: Array
    linear2: Array
    scale2: Array


@compiled
def elu(target: Any, at: int, source: Any, start: int, count: int) -> None:
    """target[at : at + count] = ELU(source[start : start + count]); both [numbers]."""
    into, out_of = target[at : at + count], source[start : start + count]
    for i in range(count):
        x = out_of[i]
        into[i] = x if x > np.float32(0.0) else exp(x) - np.float32(1.0)


@compiled
def add_bias(x: Any, rows: int, bias: Any) -> None:
    """x [rows * columns] += bias [columns] in each row."""
    columns = bias.shape[0]
    for row in range(rows):
        line = x[row * columns : (row + 1) * columns]
        for i in range(columns):
            line[i] += bias[i]


@compiled
def elu_biased(x: Any, rows: int, bias: Any) -> None:
    """x [rows * columns] = ELU(x + bias [columns])."""
    columns = bias.shape[0]
    for row in range(rows):
        line = x[row * columns : (row + 1) * columns]
        for i in range(columns):
            y = line[i] + bias[i]
            line[i] = y if y > np.float32(0.0) else exp(y) - np.float32(1.0)


@compiled
def add_branch(x: Any, branch: Any, rows: int, bias: Any) -> None:
    """x [rows * columns] += branch + bias [columns]."""
    columns = bias.shape[0]
    for row in range(rows):
        line, other = x[row * columns : (row + 1) * columns], branch[row * columns : (row + 1) * columns]
        for i in range(columns):
            line[i] += other[i] + bias[i]


@compiled
def move(target: Any, at: int, source: Any, start: int, count: int) -> None:
    """target[at : at + count] = source[start : start + count]."""
    into, out_of = target[at : at + count], source[start : start + count]
    for i in range(count):
        into[i] = out_of[i]


@compiled_in_order
def convolve(convolution: Any, joined: Any, length: int, y: Any) -> int:
    """y = the products of all windows in joined[:length], without bias; returns how many. Reads one number beyond."""
    rows: int = (length - convolution.window) // convolution.hop + 1
    inputs, columns = convolution.weight.shape[1] * 2, convolution.bias.shape[0]
    products(joined, 0, convolution.hop, rows, inputs, convolution.weight, y, 0, columns, columns)
    return rows


@compiled_in_order
def join(joined: Any, history: Any, x: Any, start: int, count: int, activate: bool) -> int:
    """joined = history, then x[start : start + count], through ELU if so, whose end is kept; returns its length."""
    kept: int = history.shape[0]
    move(joined, 0, history, 0, kept)
    if activate:
        elu(joined, kept, x, start, count)
    else:
        move(joined, kept, x, start, count)
    move(history, 0, joined, count, kept)
    joined[kept + count] = np.float32(0.0)  # what a window of odd length meets its padding with
    return kept + count


@compiled_in_order
def residual(x: Any, count: int, block: Any, history: Any, joined: Any, hidden: Any, branch: Any) -> None:
    """One residual block over x[:count] of one slot, in place; the last three are working space."""
    rows = convolve(block.wide, joined, join(joined, history, x, 0, count, True), hidden)
    elu_biased(hidden, rows, block.wide.bias)
    length = rows * block.wide.bias.shape[0]
    rows = convolve(block.narrow, hidden, length, branch)
    add_branch(x, branch, rows, block.narrow.bias)


@compiled_in_order
def windows(
    convolution: Any, x: Any, width: int, history: Any, slots: Any, activate: bool, joined: Any, out: Any
) -> None:
    """out [slots * rows, inputs] = the windows of every slot's x [width], so that one product takes them all."""
    row = 0
    inputs = out.shape[1]
    flat = out.reshape(out.size)
    for index in range(slots.shape[0]):
        kept = history[slots[index]]
        length = join(joined, kept.reshape(kept.size), x, index * width, width, activate)
        for at in range(0, length - convolution.window + 1, convolution.hop):
            move(flat, row * inputs, joined, at, convolution.window)
            row += 1


@compiled_in_order
def encoder_front(
    pcm: Any, slots: Any, first: Any, first_history: Any, stages: Any, histories: Any, samples: int, out: Any
) -> None:
    """The encoder's convolutions but for the last stage's own: pcm [slots, 1920] → windows out [slots * rows, inputs].

    stages: (residual block, downsampling) each; histories: theirs in turn. samples: of the largest activation.
    """
    space = 2 * samples + 4_096
    x, joined, hidden = np.zeros(space, np.float32), np.zeros(space, np.float32), np.zeros(space, np.float32)
    branch = np.zeros(space, np.float32)
    row = 0
    flat = out.reshape(out.size)
    for index in range(slots.shape[0]):
        slot = slots[index]
        kept = first_history[slot]
        rows = convolve(first, joined, join(joined, kept.reshape(kept.size), pcm[index], 0, pcm.shape[1], False), x)
        add_bias(x, rows, first.bias)
        count = rows * first.bias.shape[0]
        for stage in range(len(stages)):
            block, down = stages[stage]
            before = histories[2 * stage][slot]
            residual(x, count, block, before.reshape(before.size), joined, hidden, branch)
            before = histories[2 * stage + 1][slot]
            length = join(joined, before.reshape(before.size), x, 0, count, True)
            if stage + 1 < len(stages):
                rows = convolve(down, joined, length, x)
                add_bias(x, rows, down.bias)
                count = rows * down.bias.shape[0]
            else:
                for at in range(0, length - down.window + 1, down.hop):
                    move(flat, row * out.shape[1], joined, at, down.window)
                    row += 1


@compiled_in_order
def decoder_back(
    y: Any, width: int, slots: Any, stages: Any, histories: Any, last: Any, last_history: Any, samples: int, out: Any
) -> None:
    """The decoder's convolutions from the first stage's residual block on: y [slots * width] → out [slots, 1920].

    stages: (upsampling, residual block) each, whose first upsampling is done; histories: theirs in turn.
    """
    space = 2 * samples + 4_096
    x, joined, hidden = np.zeros(space, np.float32), np.zeros(space, np.float32), np.zeros(space, np.float32)
    branch = np.zeros(space, np.float32)
    for index in range(slots.shape[0]):
        slot, count = slots[index], width
        move(x, 0, y, index * width, width)
        for stage in range(len(stages)):
            up, block = stages[stage]
            if stage > 0:
                before = histories[2 * stage][slot]
                rows = convolve(up, joined, join(joined, before.reshape(before.size), x, 0, count, True), x)
                add_bias(x, rows, up.bias)
                count = rows * up.bias.shape[0]
            before = histories[2 * stage + 1][slot]
            residual(x, count, block, before.reshape(before.size), joined, hidden, branch)
        before = last_history[slot]
        rows = convolve(last, joined, join(joined, before.reshape(before.size), x, 0, count, True), branch)
        add_bias(branch, rows, last.bias)
        move(out[index], 0, branch, 0, out.shape[1])


@compiled
def layer_norm(x: Any, norm: Any, out: Any) -> None:
    """out [rows, dim] = (x - mean) / sqrt(variance + 1e-5) · norm[0] + norm[1]."""
    for row in range(x.shape[0]):
        line, target = x[row], out[row]
        dim = np.float32(line.shape[0])
        total = np.float32(0.0)
        for i in range(line.shape[0]):
            total += line[i]
        mean = total / dim
        squares = np.float32(0.0)
        for i in range(line.shape[0]):
            squares += (line[i] - mean) * (line[i] - mean)
        scale = np.float32(1.0) / np.sqrt(squares / dim + np.float32(1e-5))
        for i in range(line.shape[0]):
            target[i] = (line[i] - mean) * scale * norm[0, i] + norm[1, i]


@compiled
def gelu(x: Any) -> None:
    """x [numbers] = x · Φ(x), the error function by Abramowitz and Stegun's 7.1.26 (absolute error 1.5e-7)."""
    for i in range(x.shape[0]):
        z = abs(x[i]) * np.float32(0.7071067811865476)
        t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * z)
        y = np.float32(1.061405429)
        y = y * t + np.float32(-1.453152027)
        y = y * t + np.float32(1.421413741)
        y = y * t + np.float32(-0.284496736)
        y = y * t + np.float32(0.254829592)
        tail = y * t * exp(-z * z)  # 1 - erf(z)
        x[i] *= np.float32(0.5) * (tail if x[i] < np.float32(0.0) else np.float32(2.0) - tail)


@compiled
def add_scaled(x: Any, branch: Any, scale: Any) -> None:
    """x [rows, dim] += branch · scale [dim]."""
    for row in range(x.shape[0]):
        line, other = x[row], branch[row]
        for i in range(scale.shape[0]):
            line[i] += other[i] * scale[i]


@compiled_in_order
def see(qkv: Any, ring: Any, slots: Any, frames: Any, context: int, scale: Any, mixed: Any) -> None:
    """Writes a frame's two keys and values of each slot and attends to what it sees; qkv [rows, 3, heads, head_dim].

    ring [slots, heads, 2, context, head_dim]; frames [slots of the call]; mixed [rows, heads, head_dim]. Which keys a
    position sees: models.mimi_transformer.visibility.
    """
    heads, dims = ring.shape[1], ring.shape[4]
    flat = ring.reshape(ring.size)
    scores = np.empty(context, np.float32)
    query, out = np.empty(dims, np.float32), np.empty(dims, np.float32)
    for index in range(slots.shape[0]):
        for half in range(2):
            place = (frames[index] * 2 + half) % context
            for head in range(heads):
                copy(ring[slots[index], head, 0, place], qkv[2 * index + half, 1, head])
                copy(ring[slots[index], head, 1, place], qkv[2 * index + half, 2, head])
        end = frames[index] * 2 + 2
        first = max(0, end - (context - 1))
        for head in range(heads):
            keys = (slots[index] * heads + head) * 2 * context * dims
            values = keys + context * dims
            for half in range(2):
                count = end - 1 + half - first
                start = first % context
                straight = min(count, context - start)
                for d in range(dims):
                    query[d] = qkv[2 * index + half, 0, head, d] * scale
                    out[d] = np.float32(0.0)
                at = start * dims
                score(query, flat, keys + at, dims, dims, scores, 0, straight, flat, values + at)
                score(query, flat, keys, dims, dims, scores, straight, count - straight, flat, values)
                total = soften(scores, count)
                then = values + context * dims
                mix(scores, 0, flat, values + at, dims, dims, straight, out, flat, then + at)
                mix(scores, straight, flat, values, dims, dims, count - straight, out, flat, then)
                for d in range(dims):
                    mixed[2 * index + half, head, d] = out[d] / total


@compiled_in_order
def transform(x: Any, weights: Any, rings: Any, slots: Any, frames: Any, rotation: Any) -> None:
    """The transformer over x [2 * slots, dim], two positions a slot, in place; rings: one a layer."""
    rows, dim = x.shape
    heads, context, head_dim = rings[0].shape[1], rings[0].shape[3], rings[0].shape[4]
    scale = np.float32(1.0) / np.sqrt(np.float32(head_dim))
    normed, branch = np.empty((rows, dim), np.float32), np.empty((rows, dim), np.float32)
    mixed = np.empty((rows, dim), np.float32)
    packed = np.empty((rows, 3 * dim), np.float32)
    split, apart = packed.reshape(rows, 3, heads, head_dim), mixed.reshape(rows, heads, head_dim)
    hidden = np.empty((rows, weights.linear2.shape[2] * 2), np.float32)
    for layer in range(len(rings)):
        layer_norm(x, weights.norm1[layer], normed)
        matmul(normed, weights.in_proj[layer], packed)
        rotate(split[:, 0], rotation[0], rotation[1])
        rotate(split[:, 1], rotation[0], rotation[1])
        see(split, rings[layer], slots, frames, context, scale, apart)
        matmul(mixed, weights.out_proj[layer], branch)
        add_scaled(x, branch, weights.scale1[layer])
        layer_norm(x, weights.norm2[layer], normed)
        matmul(normed, weights.linear1[layer], hidden)
        gelu(hidden.reshape(hidden.size))
        matmul(hidden, weights.linear2[layer], branch)
        add_scaled(x, branch, weights.scale2[layer])


@compiled_in_order
def quantize(rows: Any, entries: Any, packed: Any, norms: Any, codes: Any) -> None:
    """Codes [rows, codebooks] of rows [rows, 2 * dim]: the first codebook's half, then the half that the others share.

    entries [codebooks, bins, dim], packed the same for products, norms [codebooks, bins] squared. The nearest entry is
    the one of the smallest norm - 2 · product, of equals the first.
    """
    dim = entries.shape[2]
    products_of = np.empty((rows.shape[0], entries.shape[1]), np.float32)
    left = np.empty((rows.shape[0], dim), np.float32)
    for codebook in range(entries.shape[0]):
        if codebook < 2:
            for row in range(rows.shape[0]):
                copy(left[row], rows[row, codebook * dim :])
        matmul(left, packed[codebook], products_of)
        for row in range(rows.shape[0]):
            chosen = nearest(products_of[row], norms[codebook])
            codes[row, codebook] = chosen
            entry = entries[codebook, chosen]
            for d in range(dim):
                left[row, d] -= entry[d]


@compiled
def nearest(product: Any, norms: Any) -> int:
    """The first index of the smallest norm - 2 · product; product [bins] is overwritten."""
    least = np.float32(3e38)
    for i in range(norms.shape[0]):
        product[i] = norms[i] - np.float32(2.0) * product[i]
        least = min(least, product[i])
    for i in range(norms.shape[0]):
        if product[i] == least:
            return i
    return 0


@compiled
def entries_of(codes: Any, entries: Any, out: Any) -> None:
    """out [rows, 2 * dim]: the first codebook's entries, then the sum of all others'."""
    dim = entries.shape[2]
    for row in range(codes.shape[0]):
        for codebook in range(entries.shape[0]):
            start = 0 if codebook == 0 else dim
            entry, target = entries[codebook, codes[row, codebook]], out[row, start : start + dim]
            for d in range(dim):
                target[d] = entry[d] if codebook < 2 else target[d] + entry[d]


@compiled
def upsample(x: Any, filters: Any, history: Any, slots: Any, out: Any) -> None:
    """out [slots * stride, dim] = x [slots, dim] · filters[0, phase] + the vector before it · filters[1, phase].

    history [slots of the lane, 1, dim], which becomes x.
    """
    stride = filters.shape[1]
    for index in range(slots.shape[0]):
        before = history[slots[index], 0]
        for phase in range(stride):
            target = out[index * stride + phase]
            for d in range(x.shape[1]):
                target[d] = x[index, d] * filters[0, phase, d] + before[d] * filters[1, phase, d]
        for d in range(x.shape[1]):
            before[d] = x[index, d]
