"""The codec's layers as the CPU computes them, compiled by numba, in fp32 (see graphs.compiled_codec).

Convolutions are products over windows (models.mimi_conv) whose rows overlap in memory, so nothing is copied but the
history before a frame. Wide, short ones take all slots' windows as rows of one product, so that their large weights
are read once; the others go slot by slot, whose samples stay in the processor's cache. Either way a row's sums are its
own. The transformers are in graphs.compiled_codec_transformer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graphs.compiled import compiled, compiled_in_order, copy, exp, matmul, products

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
