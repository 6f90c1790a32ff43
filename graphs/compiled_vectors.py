"""The inner loops of the CPU's kernels in explicit vectors of sixteen floats, as numba intrinsics that emit LLVM's IR.

What a compiler makes of a loop decides whether sums stay in registers; here it is said. LLVM turns a vector of sixteen
into one register of AVX-512, two of AVX2 or four of NEON. Sums are fused multiply-adds in the order of the loop,
whatever else is computed beside them, so a row has the same bits alone and among eight.

Weights and keys are stored in fp32, or in bf16 as the upper halves of floats: there two numbers lie in one 32-bit word
(the earlier one in its lower half), so that widening sixteen words is a shift and a mask.

Positions are element offsets into the arrays' memory, hops are distances between rows in elements. Nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

cgutils: Any = untyped_cgutils

LANES = 16
WIDE, NARROW = 2 * LANES, LANES  # columns of a panel of weights, see graphs.compiled.pack

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_KEYS_AT_ONCE = 8
_UPPER_HALF = -65_536  # 0xFFFF0000


class _Memory:
    """An array argument's memory while IR is emitted."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        self.builder = builder
        self.halves = not isinstance(array_type.dtype, types.Float)  # bf16, as 16-bit integers
        self._bytes = 2 if self.halves else 4
        self._data = context.make_array(array_type)(context, builder, array).data

    def _at(self, offset: Any, vector: ir.Type) -> Any:
        return self.builder.bitcast(self.builder.gep(self._data, [offset]), vector.as_pointer())

    def load(self, offset: Any) -> Any:
        return self.builder.load(self._at(offset, _FLOATS), align=self._bytes)

    def load_words(self, offset: Any) -> Any:
        return self.builder.load(self._at(offset, _WORDS), align=self._bytes)

    def store(self, vector: Any, offset: Any) -> None:
        self.builder.store(vector, self._at(offset, vector.type), align=self._bytes)

    def store_one(self, value: Any, offset: Any) -> None:
        self.builder.store(value, self.builder.gep(self._data, [offset]))

    def load_one(self, offset: Any) -> Any:
        """One float in every lane."""
        return _spread(self.builder, self.builder.load(self.builder.gep(self._data, [offset])))

    def fetch(self, offset: Any) -> None:
        builder, byte, word = self.builder, ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(self._data, [offset]), byte)
        builder.call(function, [address, word(0), word(3), word(1)])  # to read, into the nearest cache, data

    def load_pair(self, offset: Any) -> tuple[Any, Any]:
        """bf16 only: sixteen words, as the floats in their lower and in their upper halves."""
        builder, words = self.builder, self.load_words(offset)
        low = builder.shl(words, ir.Constant(_WORDS, [16] * LANES))
        high = builder.and_(words, ir.Constant(_WORDS, [_UPPER_HALF] * LANES))
        return builder.bitcast(low, _FLOATS), builder.bitcast(high, _FLOATS)


def _spread(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), zeros)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32"), [a, b, c])


def _total(builder: Any, vector: Any) -> Any:
    """The sum of the lanes, halving: 8 + 8, 4 + 4, 2 + 2, 1 + 1."""
    width = LANES
    while width > 1:
        width //= 2
        lanes = [*range(width, 2 * width), *([0] * (LANES - width))]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes)
        vector = builder.fadd(vector, builder.shuffle_vector(vector, ir.Constant(_FLOATS, ir.Undefined), mask))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


class _Sums:
    """Vectors that a loop adds to; LLVM keeps them in registers."""

    def __init__(self, builder: Any, count: int) -> None:
        self._builder = builder
        self._places = [cgutils.alloca_once(builder, _FLOATS) for _ in range(count)]
        for place in self._places:
            builder.store(ir.Constant(_FLOATS, [0.0] * LANES), place)

    def add(self, index: int, a: Any, b: Any) -> None:
        place = self._places[index]
        self._builder.store(_multiply_add(self._builder, a, b, self._builder.load(place)), place)

    def __getitem__(self, index: int) -> Any:
        return self._builder.load(self._places[index])


@contextmanager
def _loop(builder: Any, count: Any) -> Iterator[Any]:
    with cgutils.for_range(builder, count) as loop:
        yield loop.index


def _offsets(builder: Any, start: Any, hop: Any, count: int) -> list[Any]:
    found = [start]
    for _ in range(count - 1):
        found.append(builder.add(found[-1], hop))
    return found


def _number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def _emitting(context: Any, builder: Any, signature: Any, values: Any) -> list[Any]:
    """The arguments of an intrinsic, arrays as their memory."""
    return [
        _Memory(context, builder, kind, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, values, strict=True)
    ]


def _tile(rows: int, width: int) -> Callable[..., None]:
    """tile(x, x_at, x_hop, weight, w_at, pairs, y, y_at, y_hop): y [rows, width] = x [rows, 2 * pairs] · a panel.

    A panel of fp32 lies [2 * pairs, width], one of bf16 [pairs, width] in words of two inputs' weights.
    """
    vectors = width // LANES

    def multiply(builder: Any, pair: Any, weight: _Memory, w_at: Any, x: _Memory, xs: list[Any], sums: _Sums) -> None:
        first = builder.add(w_at, builder.mul(pair, _number(2 * width)))
        if weight.halves:
            words = [weight.load_pair(builder.add(first, _number(2 * LANES * v))) for v in range(vectors)]
            loaded = [[word[half] for word in words] for half in range(2)]
        else:
            loaded = [
                [weight.load(builder.add(first, _number(half * width + LANES * v))) for v in range(vectors)]
                for half in range(2)
            ]
        for half in range(2):
            place = builder.add(builder.mul(pair, _number(2)), _number(half))
            for row in range(rows):
                value = x.load_one(builder.add(xs[row], place))
                for v in range(vectors):
                    sums.add(row * vectors + v, value, loaded[half][v])

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_at, x_hop, weight, w_at, pairs, y, y_at, y_hop = _emitting(context, builder, signature, values)
        sums = _Sums(builder, rows * vectors)
        xs = _offsets(builder, x_at, x_hop, rows)
        with _loop(builder, pairs) as pair:
            multiply(builder, pair, weight, w_at, x, xs, sums)
        for row, target in enumerate(_offsets(builder, y_at, y_hop, rows)):
            for v in range(vectors):
                y.store(sums[row * vectors + v], builder.add(target, _number(v * LANES)))
        return context.get_dummy_value()

    def kernel(
        typing_context: Any,
        x: Any,
        x_at: Any,
        x_hop: Any,
        weight: Any,
        w_at: Any,
        pairs: Any,
        y: Any,
        y_at: Any,
        y_hop: Any,
    ) -> Any:
        at = types.intp
        return types.void(x, at, at, weight, at, at, y, at, at), generate

    return cast(Callable[..., None], intrinsic(kernel))


def _scores(count: int) -> Callable[..., None]:
    """scores(q, q_at, keys, k_at, k_hop, chunks, out, out_at): `count` keys' products with one query.

    A chunk is what one load of keys holds: 16 dimensions in fp32, 32 in bf16.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        q, q_at, keys, k_at, k_hop, chunks, out, out_at = _emitting(context, builder, signature, values)
        step = 2 * LANES if keys.halves else LANES
        sums = _Sums(builder, count)
        starts = _offsets(builder, k_at, k_hop, count)
        with _loop(builder, chunks) as chunk:
            place = builder.mul(chunk, _number(step))
            query = [q.load(builder.add(builder.add(q_at, place), _number(at))) for at in range(0, step, LANES)]
            for index, start in enumerate(starts):
                at = builder.add(start, place)
                for part, key in zip(query, keys.load_pair(at) if keys.halves else [keys.load(at)], strict=True):
                    sums.add(index, part, key)
        for index in range(count):
            out.store_one(_total(builder, sums[index]), builder.add(out_at, _number(index)))
        return context.get_dummy_value()

    def kernel(
        typing_context: Any, q: Any, q_at: Any, keys: Any, k_at: Any, k_hop: Any, chunks: Any, out: Any, out_at: Any
    ) -> Any:
        at = types.intp
        return types.void(q, at, keys, at, at, at, out, at), generate

    return cast(Callable[..., None], intrinsic(kernel))


def _mix(loads: int) -> Callable[..., None]:
    """mix(weights, w_at, values, v_at, v_hop, count, out, out_at): out += the weighted sum of `count` values.

    Of each value as many dimensions as `loads` loads hold. Values of even and of odd index are summed apart.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        weights, w_at, ring, v_at, v_hop, count, out, out_at = _emitting(context, builder, signature, values)
        step = 2 * LANES if ring.halves else LANES
        vectors = loads * step // LANES
        sums = _Sums(builder, 2 * vectors)

        def add(index: Any, side: int) -> None:
            weight = weights.load_one(builder.add(w_at, index))
            start = builder.add(v_at, builder.mul(index, v_hop))
            parts: list[Any] = []
            for load in range(loads):
                at = builder.add(start, _number(load * step))
                parts += ring.load_pair(at) if ring.halves else [ring.load(at)]
            for v, part in enumerate(parts):
                sums.add(side * vectors + v, weight, part)

        with _loop(builder, builder.ashr(count, _number(1))) as pair:
            index = builder.shl(pair, _number(1))
            add(index, 0)
            add(builder.add(index, _number(1)), 1)
        odd = builder.and_(count, _number(1))
        with builder.if_then(builder.trunc(odd, ir.IntType(1))):
            add(builder.sub(count, _number(1)), 0)
        for v in range(vectors):
            target = builder.add(out_at, _number(v * LANES))
            out.store(builder.fadd(out.load(target), builder.fadd(sums[v], sums[vectors + v])), target)
        return context.get_dummy_value()

    def kernel(
        typing_context: Any, weights: Any, w_at: Any, values: Any, v_at: Any, v_hop: Any, count: Any, out: Any, at: Any
    ) -> Any:
        place = types.intp
        return types.void(weights, place, values, place, place, place, out, place), generate

    return cast(Callable[..., None], intrinsic(kernel))


def _keep(typing_context: Any, vector: Any, at: Any, ring: Any, ring_at: Any) -> Any:
    """keep(vector, at, ring, ring_at): a chunk of floats as the ring stores it, bf16 rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        source, start, target, place = _emitting(context, builder, signature, values)
        low = source.load(start)
        if not target.halves:
            target.store(low, place)
            return context.get_dummy_value()
        sixteen = ir.Constant(_WORDS, [16] * LANES)
        low = builder.lshr(_rounded(builder, low), sixteen)
        high = _rounded(builder, source.load(builder.add(start, _number(LANES))))
        high = builder.and_(high, ir.Constant(_WORDS, [_UPPER_HALF] * LANES))
        target.store(builder.or_(low, high), place)
        return context.get_dummy_value()

    return types.void(vector, types.intp, ring, types.intp), generate


def _fetch(typing_context: Any, memory: Any, at: Any) -> Any:
    """fetch(memory, at): has the line of memory brought nearer; harmless if there is none."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        memory, offset = _emitting(context, builder, signature, values)
        memory.fetch(offset)
        return context.get_dummy_value()

    return types.void(memory, types.intp), generate


def _rounded(builder: Any, floats: Any) -> Any:
    """Bits whose upper half is the float rounded to bf16."""
    words = builder.bitcast(floats, _WORDS)
    odd = builder.and_(builder.lshr(words, ir.Constant(_WORDS, [16] * LANES)), ir.Constant(_WORDS, [1] * LANES))
    return builder.add(words, builder.add(odd, ir.Constant(_WORDS, [0x7FFF] * LANES)))


# Eight rows of 32 columns keep 16 sums in registers, beside which the widening of weights costs nothing.
tile_8x32, tile_4x32, tile_1x32 = _tile(8, WIDE), _tile(4, WIDE), _tile(1, WIDE)
tile_8x16, tile_1x16 = _tile(8, NARROW), _tile(1, NARROW)
score_eight, score_one = _scores(_KEYS_AT_ONCE), _scores(1)
mix_one_load, mix_two_loads, mix_four_loads = _mix(1), _mix(2), _mix(4)
keep: Callable[..., None] = cast(Any, intrinsic(_keep))
fetch: Callable[..., None] = cast(Any, intrinsic(_fetch))
