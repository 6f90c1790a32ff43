"""The inner loops of attention on the CPU in explicit vectors, see graphs.compiled_vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from graphs.compiled_vectors import (
    LANES,
    UPPER_HALF,
    WORDS,
    Sums,
    emitting,
    loop,
    number,
    offsets,
    picked,
    rounded,
    totals,
)


def _scores(rows: int, count: int) -> Callable[..., None]:
    """scores(q, q_at, q_hop, keys, k_at, k_hop, chunks, out, out_at, out_hop): products of queries and keys.

    Of `rows` queries with `count` keys, sixteen products at most. A chunk is what one load of keys holds: 16 dimensions
    in fp32, 32 in bf16.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        q, q_at, q_hop, keys, k_at, k_hop, chunks, out, out_at, out_hop = emitting(context, builder, signature, values)
        step = 2 * LANES if keys.halves else LANES
        sums = Sums(builder, rows * count)
        queries, starts = offsets(builder, q_at, q_hop, rows), offsets(builder, k_at, k_hop, count)
        with loop(builder, chunks) as chunk:
            place = builder.mul(chunk, number(step))
            loaded = [
                [q.load(builder.add(builder.add(query, place), number(at))) for at in range(0, step, LANES)]
                for query in queries
            ]
            for index, start in enumerate(starts):
                at = builder.add(start, place)
                key = keys.load_pair(at) if keys.halves else [keys.load(at)]
                for row in range(rows):
                    for mine, theirs in zip(loaded[row], key, strict=True):
                        sums.add(row * count + index, mine, theirs)
        products = totals(builder, [sums[index] for index in range(rows * count)])
        for row, target in enumerate(offsets(builder, out_at, out_hop, rows)):
            lanes = list(range(row * count, (row + 1) * count))
            out.store(picked(builder, products, products, lanes), target)
        return context.get_dummy_value()

    def kernel(
        typing_context: Any,
        q: Any,
        q_at: Any,
        q_hop: Any,
        keys: Any,
        k_at: Any,
        k_hop: Any,
        chunks: Any,
        out: Any,
        out_at: Any,
        out_hop: Any,
    ) -> Any:
        at = types.intp
        return types.void(q, at, at, keys, at, at, at, out, at, at), generate

    return cast(Callable[..., None], intrinsic(kernel))


def _mix(rows: int, loads: int) -> Callable[..., None]:
    """mix(weights, w_at, w_hop, values, v_at, v_hop, count, out, out_at, out_hop): out += weighted sums of values.

    `rows` sums of the same `count` values, of each of which as many dimensions as `loads` loads hold. Values of even
    and of odd index are summed apart.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        weights, w_at, w_hop, ring, v_at, v_hop, count, out, out_at, out_hop = emitting(
            context, builder, signature, values
        )
        step = 2 * LANES if ring.halves else LANES
        vectors = loads * step // LANES
        sums = Sums(builder, rows * 2 * vectors)
        mine = offsets(builder, w_at, w_hop, rows)

        def add(index: Any, side: int) -> None:
            start = builder.add(v_at, builder.mul(index, v_hop))
            parts: list[Any] = []
            for load in range(loads):
                at = builder.add(start, number(load * step))
                parts += ring.load_pair(at) if ring.halves else [ring.load(at)]
            for row in range(rows):
                weight = weights.load_one(builder.add(mine[row], index))
                for v, part in enumerate(parts):
                    sums.add((row * 2 + side) * vectors + v, weight, part)

        with loop(builder, builder.ashr(count, number(1))) as pair:
            index = builder.shl(pair, number(1))
            add(index, 0)
            add(builder.add(index, number(1)), 1)
        odd = builder.and_(count, number(1))
        with builder.if_then(builder.trunc(odd, ir.IntType(1))):
            add(builder.sub(count, number(1)), 0)
        for row, place in enumerate(offsets(builder, out_at, out_hop, rows)):
            for v in range(vectors):
                target = builder.add(place, number(v * LANES))
                both = builder.fadd(sums[row * 2 * vectors + v], sums[(row * 2 + 1) * vectors + v])
                out.store(builder.fadd(out.load(target), both), target)
        return context.get_dummy_value()

    def kernel(
        typing_context: Any,
        weights: Any,
        w_at: Any,
        w_hop: Any,
        values: Any,
        v_at: Any,
        v_hop: Any,
        count: Any,
        out: Any,
        out_at: Any,
        out_hop: Any,
    ) -> Any:
        at = types.intp
        return types.void(weights, at, at, values, at, at, at, out, at, at), generate

    return cast(Callable[..., None], intrinsic(kernel))


def _keep(typing_context: Any, vector: Any, at: Any, ring: Any, ring_at: Any) -> Any:
    """keep(vector, at, ring, ring_at): a chunk of floats as the ring stores it, bf16 rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source, start, target, place = emitting(context, builder, signature, values)
        low = source.load(start)
        if not target.halves:
            target.store(low, place)
            return context.get_dummy_value()
        sixteen = ir.Constant(WORDS, [16] * LANES)
        low = builder.lshr(rounded(builder, low), sixteen)
        high = rounded(builder, source.load(builder.add(start, number(LANES))))
        high = builder.and_(high, ir.Constant(WORDS, [UPPER_HALF] * LANES))
        target.store(builder.or_(low, high), place)
        return context.get_dummy_value()

    return types.void(vector, types.intp, ring, types.intp), generate


def _fetch(typing_context: Any, memory: Any, at: Any) -> Any:
    """fetch(memory, at): has the line of memory brought nearer; harmless if there is none."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        memory, offset = emitting(context, builder, signature, values)
        memory.fetch(offset)
        return context.get_dummy_value()

    return types.void(memory, types.intp), generate


# Sixteen sums again, or eight where there is one query: a key is widened once for all of them.
score_eight, score_one, score_four_by_four = _scores(1, 8), _scores(1, 1), _scores(4, 4)
mix_one_load, mix_two_loads, mix_four_loads, mix_four_rows = _mix(1, 1), _mix(1, 2), _mix(1, 4), _mix(4, 1)
keep: Callable[..., None] = cast(Any, intrinsic(_keep))
fetch: Callable[..., None] = cast(Any, intrinsic(_fetch))
