"""The inner loops of the CPU's kernels in explicit vectors of sixteen floats, as numba intrinsics that emit LLVM's IR.

What a compiler makes of a loop decides whether sums stay in registers; here it is said. LLVM turns a vector of sixteen
into one register of AVX-512, two of AVX2 or four of NEON. Sums are fused multiply-adds in the order of the loop,
whatever else is computed beside them, so a row has the same bits alone and among eight.

Weights and keys are stored in fp32, or in bf16 as the upper halves of floats: there two numbers lie in one 32-bit word
(the earlier one in its lower half), so that widening sixteen words is a shift and a mask. Weights may be int8, too.

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

FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
SCALE_BYTES = 4  # a panel of int8 begins with a float for each column
UPPER_HALF = -65_536  # 0xFFFF0000


class Memory:
    """An array argument's memory while IR is emitted."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        self.builder = builder
        self.halves = array_type.dtype == types.int16  # bf16
        self.bytes = array_type.dtype == types.int8
        self._align = 1 if self.bytes else 2 if self.halves else 4
        self._data = context.make_array(array_type)(context, builder, array).data

    def _at(self, offset: Any, vector: ir.Type) -> Any:
        return self.builder.bitcast(self.builder.gep(self._data, [offset]), vector.as_pointer())

    def load(self, offset: Any) -> Any:
        return self.builder.load(self._at(offset, FLOATS), align=self._align)

    def load_bytes(self, offset: Any) -> Any:
        """int8 only: sixteen of them as floats."""
        raw = self.builder.load(self._at(offset, _BYTES), align=1)
        return self.builder.sitofp(self.builder.sext(raw, WORDS), FLOATS)

    def load_words(self, offset: Any) -> Any:
        return self.builder.load(self._at(offset, WORDS), align=self._align)

    def store(self, vector: Any, offset: Any) -> None:
        self.builder.store(vector, self._at(offset, vector.type), align=self._align)

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
        low = builder.shl(words, ir.Constant(WORDS, [16] * LANES))
        high = builder.and_(words, ir.Constant(WORDS, [UPPER_HALF] * LANES))
        return builder.bitcast(low, FLOATS), builder.bitcast(high, FLOATS)


def _spread(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), zeros)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32"), [a, b, c])


def totals(builder: Any, vectors: list[Any]) -> Any:
    """The sum of the lanes of each of 1, 2, 4, 8 or 16 vectors, as one vector.

    Always by halving: 8 + 8, 4 + 4, 2 + 2, 1 + 1. Two vectors' halves are added in one addition, so that sixteen sums
    take fifteen and not sixty-four; each has the bits that it has alone.
    """
    held, width = 1, LANES  # sums in each vector, and the lanes of one that are still to be added up
    while width > 1:
        width //= 2
        taken = 2 if len(vectors) > 1 else 1
        starts = [which * held * 2 * width + index * 2 * width for which in range(taken) for index in range(held)]
        low = [start + lane for start in starts for lane in range(width)]
        vectors = [
            builder.fadd(
                picked(builder, vectors[at], vectors[at + taken - 1], low),
                picked(builder, vectors[at], vectors[at + taken - 1], [lane + width for lane in low]),
            )
            for at in range(0, len(vectors), taken)
        ]
        held *= taken
    return vectors[0]


def picked(builder: Any, vector: Any, other: Any, lanes: list[int]) -> Any:
    """Lanes of two vectors one behind the other."""
    return builder.shuffle_vector(vector, other, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


class Sums:
    """Vectors that a loop adds to; LLVM keeps them in registers."""

    def __init__(self, builder: Any, count: int) -> None:
        self._builder = builder
        self._places = [cgutils.alloca_once(builder, FLOATS) for _ in range(count)]
        for place in self._places:
            builder.store(ir.Constant(FLOATS, [0.0] * LANES), place)

    def add(self, index: int, a: Any, b: Any) -> None:
        place = self._places[index]
        self._builder.store(_multiply_add(self._builder, a, b, self._builder.load(place)), place)

    def __getitem__(self, index: int) -> Any:
        return self._builder.load(self._places[index])


@contextmanager
def loop(builder: Any, count: Any) -> Iterator[Any]:
    with cgutils.for_range(builder, count) as passes:
        yield passes.index


def offsets(builder: Any, start: Any, hop: Any, count: int) -> list[Any]:
    found = [start]
    for _ in range(count - 1):
        found.append(builder.add(found[-1], hop))
    return found


def number(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


def emitting(context: Any, builder: Any, signature: Any, values: Any) -> list[Any]:
    """The arguments of an intrinsic, arrays as their memory."""
    return [
        Memory(context, builder, kind, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, values, strict=True)
    ]


def _tile(rows: int, width: int) -> Callable[..., None]:
    """tile(x, x_at, x_hop, weight, w_at, pairs, y, y_at, y_hop): y [rows, width] = x [rows, 2 * pairs] · a panel.

    A panel of fp32 lies [2 * pairs, width], one of bf16 [pairs, width] in words of two inputs' weights; one of int8 as
    of fp32, behind `width` floats that its columns' sums are multiplied with.
    """
    vectors = width // LANES

    def multiply(builder: Any, pair: Any, weight: Memory, w_at: Any, x: Memory, xs: list[Any], sums: Sums) -> None:
        first = builder.add(w_at, builder.mul(pair, number(2 * width)))
        if weight.halves:
            words = [weight.load_pair(builder.add(first, number(2 * LANES * v))) for v in range(vectors)]
            loaded = [[word[half] for word in words] for half in range(2)]
        elif weight.bytes:
            loaded = [
                [
                    weight.load_bytes(builder.add(first, number(SCALE_BYTES * width + half * width + LANES * v)))
                    for v in range(vectors)
                ]
                for half in range(2)
            ]
        else:
            loaded = [
                [weight.load(builder.add(first, number(half * width + LANES * v))) for v in range(vectors)]
                for half in range(2)
            ]
        for half in range(2):
            place = builder.add(builder.mul(pair, number(2)), number(half))
            for row in range(rows):
                value = x.load_one(builder.add(xs[row], place))
                for v in range(vectors):
                    sums.add(row * vectors + v, value, loaded[half][v])

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, x_at, x_hop, weight, w_at, pairs, y, y_at, y_hop = emitting(context, builder, signature, values)
        sums = Sums(builder, rows * vectors)
        xs = offsets(builder, x_at, x_hop, rows)
        with loop(builder, pairs) as pair:
            multiply(builder, pair, weight, w_at, x, xs, sums)
        for row, target in enumerate(offsets(builder, y_at, y_hop, rows)):
            for v in range(vectors):
                total = sums[row * vectors + v]
                if weight.bytes:
                    scale = weight.load(builder.add(w_at, number(v * LANES * SCALE_BYTES)))
                    total = builder.fmul(total, scale)
                y.store(total, builder.add(target, number(v * LANES)))
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


def rounded(builder: Any, floats: Any) -> Any:
    """Bits whose upper half is the float rounded to bf16."""
    words = builder.bitcast(floats, WORDS)
    odd = builder.and_(builder.lshr(words, ir.Constant(WORDS, [16] * LANES)), ir.Constant(WORDS, [1] * LANES))
    return builder.add(words, builder.add(odd, ir.Constant(WORDS, [0x7FFF] * LANES)))


# Eight rows of 32 columns keep 16 sums in registers, beside which the widening of weights costs nothing.
tile_8x32, tile_4x32, tile_1x32 = _tile(8, WIDE), _tile(4, WIDE), _tile(1, WIDE)
tile_8x16, tile_1x16 = _tile(8, NARROW), _tile(1, NARROW)
