"""Sparse matrices by rows, and their product with a block of columns: one compiled loop.

Built for the noise operator, where one small matrix meets millions of images: the columns of a
block are images, so each weight is read once per block and meets whole vectors of images.
"""

import math
import threading
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from scipy import sparse

Block = npt.NDArray[np.float32]

LANES = 16
"""Images of one vector; the widest registers there are hold 16 float32 numbers."""

SUMMED = 8
"""Weights whose sum is made before it joins that of their row: short sums round less."""

compiled = numba.njit(cache=True, fastmath={"contract", "nsz"}, error_model="numpy", nogil=True)
"""Compile at the first call and keep the result on disk. Sums keep their order."""


@dataclass(frozen=True)
class Rows:
    """A sparse matrix in compressed rows, float32 weights and 32-bit columns.

    A wide one comes in parts, each with all rows but only some of the columns, so that the entries
    of a block that one part reads stay in cache.
    """

    starts: npt.NDArray[np.int64]
    """[parts * n_rows + 1] where each row of each part begins in the two others."""
    columns: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    n_rows: int
    n_columns: int

    @classmethod
    def dense(cls, matrix: npt.NDArray[np.float64]) -> "Rows":
        """A dense matrix without its zeros, up to rounding."""
        kept = np.abs(matrix) > 1e-12 * np.abs(matrix).max()
        starts = np.concatenate([[0], np.cumsum(kept.sum(1))])
        columns = np.nonzero(kept)[1].astype(np.int32)
        return cls(starts, columns, matrix[kept].astype(np.float32), *matrix.shape)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, which every product reads once."""
        return self.starts.nbytes + self.columns.nbytes + self.weights.nbytes

    def times(self, block: Block, out: Block) -> None:
        """out [c n_rows, B] = matrix @ each of c equal parts of a block [c n_columns, B].

        Both are contiguous, and B is a multiple of LANES.
        """
        # The compiled code reads and writes memory without looking.
        assert block.flags.c_contiguous
        assert out.flags.c_contiguous
        assert block.shape[1] == out.shape[1]
        assert block.shape[1] % LANES == 0
        copies = len(block) // self.n_columns
        _product(self.starts, self.columns, self.weights, copies, block, out)

    def scipy(self) -> sparse.csr_array:
        """The same matrix for SciPy."""
        parts = (self.weights, self.columns, self.starts)
        n_parts = (len(self.starts) - 1) // self.n_rows
        tall = sparse.csr_array(parts, shape=(n_parts * self.n_rows, self.n_columns))
        if n_parts == 1:
            return tall
        matrix = tall.tocoo()
        entries = (matrix.data, (matrix.row % self.n_rows, matrix.col))
        return sparse.coo_array(entries, shape=(self.n_rows, self.n_columns)).tocsr()


def _accumulate(n_vectors: int):  # type: ignore[no-untyped-def]
    """A compiled call: out[row] += sum of weights[k] * x[columns[k]], k in [start, end), for
    `n_vectors` vectors of images from `lane` on, whose sums stay in registers.

    Numba itself has no vectors: its loop along the images loads and stores the sums again for
    every few weights, which takes as long as the arithmetic. Here SUMMED weights make a sum of
    their own, which then joins that of the row.
    """
    vector, index = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)

    @intrinsic
    def call(typing, x, columns, weights, start, end, out, row, lane):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kinds = signature.args
            x, columns, weights, out = (
                context.make_array(kinds[k])(context, builder, args[k]) for k in (0, 1, 2, 5)
            )
            start, end, row, lane = (args[k] for k in (3, 4, 6, 7))
            n_images = cgutils.unpack_tuple(builder, x.shape, 2)[1]

            def vectors(array, row):  # type: ignore[no-untyped-def]
                first = builder.add(builder.mul(row, n_images), lane)
                place = builder.bitcast(builder.gep(array.data, [first]), vector.as_pointer())
                return [builder.gep(place, [index(k)]) for k in range(n_vectors)]

            def terms(k):  # type: ignore[no-untyped-def]
                column = builder.sext(builder.load(builder.gep(columns.data, [k])), index)
                weight = builder.load(builder.gep(weights.data, [k]))
                same = builder.insert_element(vector(ir.Undefined), weight, ir.IntType(32)(0))
                everywhere = ir.VectorType(ir.IntType(32), LANES)([0] * LANES)
                same = builder.shuffle_vector(same, vector(ir.Undefined), everywhere)
                values = [builder.load(place, align=4) for place in vectors(x, column)]
                return [builder.fmul(same, value, flags=["contract"]) for value in values]

            def plus(some, others):  # type: ignore[no-untyped-def]
                # Fused with the product where one of the two is that of `terms`.
                pairs = zip(some, others, strict=True)
                return [builder.fadd(one, other, flags=["contract"]) for one, other in pairs]

            def add(parts):  # type: ignore[no-untyped-def]
                for total, more in zip(sums, plus(parts, map(builder.load, sums)), strict=True):
                    builder.store(more, total)

            targets = vectors(out, row)
            sums = [cgutils.alloca_once(builder, vector) for _ in targets]
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(target, align=4), total)
            whole = builder.sub(end, builder.srem(builder.sub(end, start), index(SUMMED)))
            with cgutils.for_range_slice(builder, start, whole, index(SUMMED), index) as (k, _):
                parts = terms(k)
                for more in range(1, SUMMED):
                    parts = plus(terms(builder.add(k, index(more))), parts)
                add(parts)
            with cgutils.for_range_slice(builder, whole, end, index(1), index) as (k, _):
                add(terms(k))
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        return types.void(x, columns, weights, start, end, out, row, lane), generate

    return call


_one, _four = _accumulate(1), _accumulate(4)


@compiled
def _product(starts, columns, weights, copies, x, out):  # type: ignore[no-untyped-def]
    n_rows, n_columns, n_images = len(out) // copies, len(x) // copies, x.shape[1]
    out[:] = 0
    for copy in range(copies):
        block = x[copy * n_columns : (copy + 1) * n_columns]
        for first in range(0, len(starts) - 1, n_rows):  # of each part
            for k in range(n_rows):
                start, end = starts[first + k], starts[first + k + 1]
                row, lane = copy * n_rows + k, 0
                while lane + 4 * LANES <= n_images:
                    _four(block, columns, weights, start, end, out, row, lane)
                    lane += 4 * LANES
                while lane < n_images:
                    _one(block, columns, weights, start, end, out, row, lane)
                    lane += LANES


_local = threading.local()


def scratch(name: str, *shape: int) -> Block:
    """An array of this thread, uninitialised; the next call with the same name gets it again.

    Fresh memory of some megabytes comes from the system page by page, which takes as long as the
    products themselves.
    """
    size = math.prod(shape)
    kept = _local.__dict__.get(name)
    if kept is None or kept.size < size:
        kept = _local.__dict__[name] = np.empty(size, np.float32)
    return kept[:size].reshape(shape)


def to_columns(images: Block, offset: float, order: npt.NDArray[np.int64], out: Block) -> None:
    """Entry order[p] of each of the rows [n, P], less `offset`, becomes row p of `out` [P, B];
    columns from n on become 0."""
    wide, turned = _wide(out.T.shape), scratch("turned", *out.shape)
    np.subtract(images, np.float32(offset), out=wide[: len(images)])
    wide[len(images) :] = 0
    np.copyto(turned, wide.T)
    np.take(turned, order, axis=0, out=out, mode="clip")


def to_rows(
    columns: Block, offset: npt.NDArray[np.floating], order: npt.NDArray[np.int64], out: Block
) -> None:
    """Row order[p] of the columns [P, B] becomes entry p of each row of `out` [n, P], plus
    offset[p]; columns from n on are left out."""
    wide, sorted_ = _wide(columns.T.shape), scratch("turned", *columns.shape)
    np.take(columns, order, axis=0, out=sorted_, mode="clip")
    np.copyto(wide, sorted_.T)
    np.add(wide[: len(out)], offset, out=out, casting="same_kind")


def _wide(shape: tuple[int, ...]) -> Block:
    """An array whose rows are a little apart: where they are a power of two apart, all of them fall
    into the same few lines of the cache, and turning a block takes five times as long."""
    return scratch("wide", shape[0], shape[1] + 16)[:, : shape[1]]
