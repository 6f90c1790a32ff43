"""The kernels of attention on the CPU, compiled by numba: rows over exactly the keys they see, in 16 or 32 bits.

One row of one head is two passes over memory: scores over keys, then the mix of values. In both rings a key is a row,
so that what a step reads of a slot's head is one stretch of memory, read once: by a live row alone, by a prompt's rows
together. What a row computes depends on its position alone, never on its neighbours or on how rows came in chunks
(docs/decisions/cpu-attention.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from graphs.compiled import compiled, compiled_in_order, exp
from graphs.compiled_attention_vectors import (
    fetch,
    keep,
    mix_four_loads,
    mix_four_rows,
    mix_one_load,
    mix_two_loads,
    score_eight,
    score_four_by_four,
    score_one,
)
from graphs.spans import KEY_BLOCK

GROUP = 16  # values that a row adds up before it adds them to what it has
TOGETHER = 16  # rows of one slot that share the reading of a block; their scores have to stay near


def chunk(ring: Any) -> int:
    """Dimensions that one load of a ring holds (see graphs.compiled_vectors)."""
    raise NotImplementedError("only called from compiled code")


@overload(chunk)
def _chunk_typed(ring: Any) -> Any:
    def of_floats(ring: Any) -> Any:
        return 16

    def of_halves(ring: Any) -> Any:
        return 32

    return of_floats if isinstance(ring.dtype, types.Float) else of_halves


@compiled_in_order
def score(
    q: Any, q_at: int, keys: Any, at: int, dims: int, scores: Any, place: int, count: int, then: Any, then_at: int
) -> None:
    """scores[place : place + count] = a query [dims] · the `count` keys that lie in memory from `at` on.

    `then` at `then_at` is what is read next, as many rows: the memory is asked for it meanwhile.
    """
    line = chunk(keys)  # which is a line of the cache, too: 64 bytes
    chunks = dims // line
    whole = count - count % 8
    for j in range(0, whole, 8):
        for ahead in range(0, 8 * dims, line):
            fetch(then, then_at + j * dims + ahead)
        score_eight(q, q_at, 0, keys, at + j * dims, dims, chunks, scores, place + j, 0)
    for j in range(whole, count):
        score_one(q, q_at, 0, keys, at + j * dims, dims, chunks, scores, place + j, 0)


@compiled
def soften(scores: Any) -> Any:
    """Turns scores into unnormalised weights; returns their sum."""
    largest = scores[0]
    for j in range(scores.shape[0]):
        largest = max(largest, scores[j])
    total = np.float32(0.0)
    for j in range(scores.shape[0]):
        weight = exp(scores[j] - largest)
        scores[j] = weight
        total += weight
    return total


@compiled_in_order
def mix(
    scores: Any, place: int, values: Any, at: int, dims: int, count: int, out: Any, out_at: int, then: Any, then_at: int
) -> None:
    """out [dims] from out_at on += the values from `at` on weighted by scores[place : place + count]; see score."""
    step = chunk(values)
    for j in range(0, count, GROUP):
        for ahead in range(0, GROUP * dims, step):
            fetch(then, then_at + j * dims + ahead)
        some, start = min(GROUP, count - j), at + j * dims
        if step == 16 and dims % 64 == 0:
            for d in range(0, dims, 64):
                mix_four_loads(scores, place + j, 0, values, start + d, dims, some, out, out_at + d, 0)
        elif dims % (2 * step) == 0:
            for d in range(0, dims, 2 * step):
                mix_two_loads(scores, place + j, 0, values, start + d, dims, some, out, out_at + d, 0)
        else:
            for d in range(0, dims, step):
                mix_one_load(scores, place + j, 0, values, start + d, dims, some, out, out_at + d, 0)


@compiled_in_order
def store(ring: Any, blocks: Any, head_hop: int, slots: Any, places: Any, fresh: Any) -> None:
    """Puts fresh [rows, heads, head_dim] into place places[row] of the ring of slots[row]; see attend."""
    dims, step = ring.shape[3], chunk(ring)
    vector = np.zeros(dims, np.float32)
    for row in range(slots.shape[0]):
        block, within = places[row] // KEY_BLOCK, places[row] % KEY_BLOCK
        for head in range(fresh.shape[1]):
            at = blocks[slots[row], block] + head * head_hop + within * dims
            for d in range(fresh.shape[2]):
                vector[d] = fresh[row, head, d]
            for d in range(0, dims, step):
                keep(vector, d, ring, at + d)


@compiled_in_order
def score_rows(
    queries: Any, begin: Any, end: Any, keys: Any, at: int, dims: int, scores: Any, column: int, then: Any, then_at: int
) -> None:
    """Scores of queries [rows, dims] over one block: row i's over its keys begin[i] … end[i] - 1.

    Key j's go to scores[i, column + j]. begin and end rise from row to row; what four rows see, they read together.
    """
    rows, width, chunks = begin.shape[0], scores.shape[1], dims // chunk(keys)
    query, flat = queries.reshape(queries.size), scores.reshape(scores.size)
    for four in range(0, rows, 4):
        low = high = 0
        if rows - four >= 4 and begin[four + 3] < end[four]:
            low = begin[four + 3]
            high = low + (end[four] - low) // 4 * 4
        for j in range(low, high, 4):
            if four == 0:
                for ahead in range(0, 4 * dims, chunk(keys)):
                    fetch(then, then_at + j * dims + ahead)
            place = four * width + column + j
            score_four_by_four(query, four * dims, dims, keys, at + j * dims, dims, chunks, flat, place, width)
        for i in range(four, min(four + 4, rows)):
            for begins, ends in ((begin[i], min(low, end[i])), (max(begin[i], high), end[i])):
                if begins < ends:
                    start, place = begins * dims, i * width + column + begins
                    score(query, i * dims, keys, at + start, dims, flat, place, ends - begins, then, then_at + start)


@compiled_in_order
def mix_rows(
    scores: Any, column: int, begin: Any, end: Any, values: Any, at: int, dims: int, mixed: Any, then: Any, then_at: int
) -> None:
    """Adds one block's values to mixed [rows, dims], weighted by `scores`; see score_rows.

    A row adds in groups of GROUP from its own first key of the block on. Rows that begin at the same key share groups.
    """
    rows, width = begin.shape[0], scores.shape[1]
    flat, out = scores.reshape(scores.size), mixed.reshape(mixed.size)
    for four in range(0, rows, 4):
        shared = 0
        if rows - four >= 4 and begin[four] == begin[four + 3] and end[four] > begin[four]:
            shared = (end[four] - begin[four]) // GROUP * GROUP
        for j in range(begin[four], begin[four] + shared, GROUP):
            if four == 0:
                for ahead in range(0, GROUP * dims, chunk(values)):
                    fetch(then, then_at + j * dims + ahead)
            place, start = four * width + column + j, at + j * dims
            for d in range(0, dims, chunk(values)):
                mix_four_rows(flat, place, width, values, start + d, dims, GROUP, out, four * dims + d, dims)
        for i in range(four, min(four + 4, rows)):
            first = begin[i] + shared
            if first < end[i]:
                start, place = first * dims, i * width + column + first
                mix(flat, place, values, at + start, dims, end[i] - first, out, i * dims, then, then_at + start)


@compiled_in_order
def attend_alone(
    query: Any, keys: Any, values: Any, ring: Any, head_hop: int, first: int, seen: int, scores: Any, mixed: Any
) -> Any:
    """Adds to mixed [dims] what one query sees of one head, unnormalised; returns the sum of its weights.

    ring: where this head's blocks begin, the next head's are head_hop behind.
    """
    dims, done = query.shape[0], 0
    while done < seen:
        block, within = (first + done) // KEY_BLOCK, (first + done) % KEY_BLOCK
        run, at = min(KEY_BLOCK - within, seen - done), ring[block % ring.shape[0]] + within * dims
        score(query, 0, keys, at, dims, scores, done, run, values, at)
        done += run
    total, done = soften(scores[:seen]), 0
    while done < seen:
        block, within = (first + done) // KEY_BLOCK, (first + done) % KEY_BLOCK
        run, at = min(KEY_BLOCK - within, seen - done), ring[block % ring.shape[0]] + within * dims
        mix(scores, done, values, at, dims, run, mixed, 0, keys, at + head_hop)
        done += run
    return total


@compiled_in_order
def attend_together(
    queries: Any,
    keys: Any,
    values: Any,
    ring: Any,
    head_hop: int,
    first: Any,
    seen: Any,
    scores: Any,
    mixed: Any,
    totals: Any,
) -> None:
    """The same for several rows of a slot: queries, mixed [rows, dims], first, seen, totals [rows].

    Each block is read once, by all of them; a row's own runs, groups and sums are those of attend_alone.
    """
    rows, dims = queries.shape
    block, final = first[0] // KEY_BLOCK, first[rows - 1] + seen[rows - 1] - 1
    base = block * KEY_BLOCK  # the position whose score stands first
    begin, end = np.empty(rows, np.int64), np.empty(rows, np.int64)
    for softened in range(2):
        for number in range(block, final // KEY_BLOCK + 1):
            for i in range(rows):  # what row i sees of this block; nothing: begin >= end
                start = first[i] - number * KEY_BLOCK
                begin[i], end[i] = max(start, 0), min(start + seen[i], KEY_BLOCK)
            at, column = ring[number % ring.shape[0]], number * KEY_BLOCK - base
            if softened:
                mix_rows(scores, column, begin, end, values, at, dims, mixed, keys, at + head_hop)
            else:
                score_rows(queries, begin, end, keys, at, dims, scores, column, values, at)
        if not softened:
            for i in range(rows):
                totals[i] = soften(scores[i, first[i] - base : first[i] - base + seen[i]])


@compiled_in_order
def attend(
    q: Any,
    keys: Any,
    values: Any,
    blocks: Any,
    head_hop: int,
    slots: Any,
    first: Any,
    count: Any,
    scale: Any,
    out: Any,
) -> None:
    """Row r of slot slots[r] sees the count[r] positions from first[r] on, which may wrap around the ring's end.

    q, out [rows, heads, head_dim]; keys, values: the memory of one layer, its last axis a key as `store` filled it.
    A ring is read block by block, KEY_BLOCK positions each: blocks [slots, blocks of a ring] says where, in elements,
    that of head 0 begins; every further head's is head_hop behind. So rings may lie in one piece or in pages, and the
    sums are the same.

    Consecutive rows of one slot share a read of each block, TOGETHER at a time, and a head's keys and values stay in
    the cache for all rows of a prompt. What a row adds up, and in which order, is what it would alone.
    """
    dims, head_dim = keys.shape[3], q.shape[2]
    scores = np.empty((TOGETHER, (blocks.shape[1] + 1) * KEY_BLOCK), np.float32)
    queries, mixed = np.zeros((TOGETHER, dims), np.float32), np.empty((TOGETHER, dims), np.float32)
    totals = np.empty(TOGETHER, np.float32)
    row, past = 0, 0
    while row < slots.shape[0]:
        past = row + 1
        while (
            past < slots.shape[0]
            and slots[past] == slots[row]
            and first[past] >= first[past - 1]
            and first[past] + count[past] == first[past - 1] + count[past - 1] + 1
        ):
            past += 1
        for head in range(q.shape[1]):
            ring = blocks[slots[row]] + head * head_hop
            for group in range(row, past, TOGETHER):
                rows = min(TOGETHER, past - group)
                for i in range(rows):
                    for d in range(head_dim):
                        queries[i, d] = q[group + i, head, d] * scale
                    for d in range(dims):
                        mixed[i, d] = np.float32(0.0)
                if rows == 1:
                    totals[0] = attend_alone(
                        queries[0], keys, values, ring, head_hop, first[group], count[group], scores[0], mixed[0]
                    )
                else:
                    which = slice(group, group + rows)
                    attend_together(
                        queries[:rows], keys, values, ring, head_hop, first[which], count[which], scores, mixed[:rows],
                        totals,
                    )  # fmt: skip
                for i in range(rows):
                    for d in range(head_dim):
                        out[group + i, head, d] = mixed[i, d] / totals[i]
        row = past
