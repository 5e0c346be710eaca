"""Sparse matrices by rows, and their product with a block of columns: one compiled loop.

Built for the noise operator, where one small matrix meets millions of images: the columns of a
block are images, so each weight is read once per block and the inner loop runs along the block.
"""

import math
import threading
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
from scipy import sparse

Block = npt.NDArray[np.float32]

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
        """out [n_rows, B] = matrix @ block [n_columns, B]; both contiguous, B any number."""
        _product(self.starts, self.columns, self.weights, block, out)

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


@compiled
def _product(starts, columns, weights, x, out):  # type: ignore[no-untyped-def]
    # Eight weights share one pass over a row of `out`: loading and storing it for each would
    # take as long as the sums.
    n = x.shape[1]
    out[:] = 0
    for row in range(len(starts) - 1):
        sums = out[row % len(out)]
        k, end = starts[row], starts[row + 1]
        while k + 8 <= end:
            w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
            w4, w5, w6, w7 = weights[k + 4], weights[k + 5], weights[k + 6], weights[k + 7]
            x0, x1, x2, x3 = x[columns[k]], x[columns[k + 1]], x[columns[k + 2]], x[columns[k + 3]]
            x4, x5 = x[columns[k + 4]], x[columns[k + 5]]
            x6, x7 = x[columns[k + 6]], x[columns[k + 7]]
            for b in range(n):
                sums[b] += ((w0 * x0[b] + w1 * x1[b]) + (w2 * x2[b] + w3 * x3[b])) + (
                    (w4 * x4[b] + w5 * x5[b]) + (w6 * x6[b] + w7 * x7[b])
                )
            k += 8
        while k < end:
            w0, x0 = weights[k], x[columns[k]]
            for b in range(n):
                sums[b] += w0 * x0[b]
            k += 1


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
    """Entry order[p] of each of the rows [B, P], less `offset`, becomes row p of `out` [P, B]."""
    wide, turned = _wide(images.shape), scratch("turned", *out.shape)
    np.subtract(images, np.float32(offset), out=wide)
    np.copyto(turned, wide.T)
    np.take(turned, order, axis=0, out=out, mode="clip")


def to_rows(
    columns: Block, offset: npt.NDArray[np.floating], order: npt.NDArray[np.int64], out: Block
) -> None:
    """Row order[p] of the columns [P, B] becomes entry p of each row of `out` [B, P], plus
    offset[p]."""
    wide, sorted_ = _wide(out.shape), scratch("turned", *columns.shape)
    np.take(columns, order, axis=0, out=sorted_, mode="clip")
    np.copyto(wide, sorted_.T)
    np.add(wide, offset, out=out, casting="same_kind")


def _wide(shape: tuple[int, ...]) -> Block:
    """An array whose rows are a little apart: where they are a power of two apart, all of them fall
    into the same few lines of the cache, and turning a block takes five times as long."""
    return scratch("wide", shape[0], shape[1] + 16)[:, : shape[1]]
