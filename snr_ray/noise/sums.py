"""Weighted sums over a block of images, compiled: what the loops of the noise operator end in.

A block [P, B] holds B images side by side, so one weight meets whole vectors of images. Weights
come in windows: a few neighbours of one place, `stride` rows apart.
"""

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from snr_ray.noise.blocks import FEW, LANES

Block = npt.NDArray[np.float32]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call and keep the result on disk. Sums keep their order.

    Where neither the package nor the home can be written to, each process compiles for itself.
    """
    options = {"fastmath": {"contract", "nsz"}, "error_model": "numpy", "nogil": True}
    try:
        kept: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place to keep it
        kept = numba.njit(**options)(function)
    return kept


def _windows(width: int, n_vectors: int, lanes: int, spread: bool):  # type: ignore[no-untyped-def]
    """A compiled call for `n_vectors` vectors of images from `lane` on, and windows of `width`.

    It gathers: rows[row] += sum over k in [start, end) and j of
    weights[j, k] * block[base + places[k] + j * stride]; or it spreads, the transpose of the same:
    block[base + places[k] + j * stride] += weights[j, k] * rows[row].

    Numba itself has no vectors: its loop along the images loads and stores the sums again for
    every few weights, which takes as long as the arithmetic. Each of the window's places has a sum
    of its own, which leaves no addition waiting for the last; short sums also round less.
    """
    vector = ir.VectorType(ir.FloatType(), lanes) if lanes > 1 else ir.FloatType()
    zero = ir.Constant(vector, [0.0] * lanes if lanes > 1 else 0.0)
    index = ir.IntType(64)

    @intrinsic
    def call(typing, block, base, stride, places, weights, start, end, rows, row, lane):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kinds = signature.args
            block, places, weights, rows = (
                context.make_array(kinds[k])(context, builder, args[k]) for k in (0, 3, 4, 7)
            )
            base, stride, start, end, row, lane = (args[k] for k in (1, 2, 5, 6, 8, 9))
            n_images = cgutils.unpack_tuple(builder, block.shape, 2)[1]
            n_weights = cgutils.unpack_tuple(builder, weights.shape, 2)[1]

            def vectors(array, row):  # type: ignore[no-untyped-def]
                first = builder.add(builder.mul(row, n_images), lane)
                place = builder.bitcast(builder.gep(array.data, [first]), vector.as_pointer())
                return [builder.gep(place, [index(k)]) for k in range(n_vectors)]

            def load(place):  # type: ignore[no-untyped-def]
                return builder.load(place, align=4)

            def weight(j, k):  # type: ignore[no-untyped-def]
                place = builder.add(k, builder.mul(n_weights, index(j)))
                value = builder.load(builder.gep(weights.data, [place]))
                if lanes == 1:
                    return value
                same = builder.insert_element(vector(ir.Undefined), value, ir.IntType(32)(0))
                everywhere = ir.VectorType(ir.IntType(32), lanes)([0] * lanes)
                return builder.shuffle_vector(same, vector(ir.Undefined), everywhere)

            def fused(value, factor, total):  # type: ignore[no-untyped-def]
                product = builder.fmul(factor, value, flags=["contract"])
                return builder.fadd(product, total, flags=["contract"])

            targets = vectors(rows, row)
            values = [load(target) for target in targets]
            sums = [[cgutils.alloca_once(builder, vector) for _ in targets] for _ in range(width)]
            for place in itertools.chain.from_iterable(sums):
                builder.store(zero, place)
            offsets = [builder.mul(stride, index(j)) for j in range(width)]
            with cgutils.for_range_slice(builder, start, end, index(1), index) as (k, _):
                place = builder.sext(builder.load(builder.gep(places.data, [k])), index)
                place = builder.add(base, place)
                for j in range(width):
                    factor = weight(j, k)
                    others = vectors(block, builder.add(place, offsets[j]))
                    for other, value, total in zip(others, values, sums[j], strict=True):
                        if spread:
                            builder.store(fused(value, factor, load(other)), other, align=4)
                        else:
                            more = fused(load(other), factor, builder.load(total))
                            builder.store(more, total)
            if not spread:
                for v, target in enumerate(targets):
                    total = builder.load(sums[0][v])
                    for j in range(1, width):
                        total = builder.fadd(total, builder.load(sums[j][v]))
                    builder.store(builder.fadd(total, values[v]), target, align=4)
            return context.get_dummy_value()

        kinds = (block, base, stride, places, weights, start, end, rows, row, lane)
        return types.void(*kinds), generate

    return call


def _sums(width: int, spread: bool) -> Callable[..., None]:
    """The call for all images of a block and `n_rows` rows from `first` on; row r has the windows
    in [starts[r], ends[r])."""
    most, whole = _windows(width, 4, LANES, spread), _windows(width, 1, LANES, spread)
    few, one = _windows(width, 1, FEW, spread), _windows(width, 1, 1, spread)

    @compiled
    def run(block, base, stride, places, weights, starts, ends, rows, first, n_rows):  # type: ignore[no-untyped-def]
        lane, n_images = 0, block.shape[1]
        while lane + 4 * LANES <= n_images:
            for r in range(n_rows):
                most(
                    block, base, stride, places, weights, starts[r], ends[r], rows, first + r, lane
                )
            lane += 4 * LANES
        while lane + LANES <= n_images:
            for r in range(n_rows):
                whole(
                    block, base, stride, places, weights, starts[r], ends[r], rows, first + r, lane
                )
            lane += LANES
        while lane + FEW <= n_images:
            for r in range(n_rows):
                few(block, base, stride, places, weights, starts[r], ends[r], rows, first + r, lane)
            lane += FEW
        while lane < n_images:
            for r in range(n_rows):
                one(block, base, stride, places, weights, starts[r], ends[r], rows, first + r, lane)
            lane += 1

    return run


gather2, gather3, gather4 = (_sums(width, spread=False) for width in (2, 3, 4))
spread2, spread3, spread4 = (_sums(width, spread=True) for width in (2, 3, 4))

_local = threading.local()
KEPT_BYTES = 64 * 2**20
"""Larger arrays are not kept for the next call: the system's pages cost little beside their use."""


def scratch(name: str, *shape: int) -> Block:
    """An array of this thread, uninitialised; the next call with the same name gets it again.

    Fresh memory of some megabytes comes from the system page by page, which takes as long as the
    sums themselves. It begins at a line of the cache: a vector across two takes twice as long.
    """
    size = math.prod(shape)
    kept: Block | None = _local.__dict__.get(name)
    if kept is None or kept.size < size:
        room = np.empty(size + LANES, np.float32)
        start = -room.ctypes.data // 4 % LANES
        kept = room[start : start + size]
        if kept.nbytes <= KEPT_BYTES:
            _local.__dict__[name] = kept
    return kept[:size].reshape(shape)
