"""Sparse matrices by rows, and their product with a block of columns: one compiled loop.

Built for the noise operator, where one small matrix meets millions of images: the columns of a
block are images, so each weight is read once per block and the inner loop runs along the block.
"""

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
    """A sparse matrix in compressed rows, float32 weights and 32-bit columns."""

    starts: npt.NDArray[np.int64]
    """[n_rows + 1] where each row begins in the two others."""
    columns: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    n_columns: int

    @classmethod
    def dense(cls, matrix: npt.NDArray[np.float64]) -> "Rows":
        """A dense matrix without its zeros, up to rounding."""
        kept = np.abs(matrix) > 1e-12 * np.abs(matrix).max()
        starts = np.concatenate([[0], np.cumsum(kept.sum(1))])
        columns = np.nonzero(kept)[1].astype(np.int32)
        return cls(starts, columns, matrix[kept].astype(np.float32), matrix.shape[1])

    @property
    def n_rows(self) -> int:
        """Height of the matrix."""
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        """Memory in bytes, which every product reads once."""
        return self.starts.nbytes + self.columns.nbytes + self.weights.nbytes

    def times(self, block: Block, out: Block) -> None:
        """out [n_rows, B] = matrix @ block [n_columns, B]; both contiguous, B any number."""
        _product(self.starts, self.columns, self.weights, block, out)

    def scipy(self) -> sparse.csr_array:
        """The same matrix for SciPy; arrays are shared."""
        parts = (self.weights, self.columns, self.starts)
        return sparse.csr_array(parts, shape=(self.n_rows, self.n_columns))


@compiled
def _product(starts, columns, weights, x, out):  # type: ignore[no-untyped-def]
    # Eight weights share one pass over a row of `out`: loading and storing it for each would
    # take as long as the sums.
    n = x.shape[1]
    for row in range(len(starts) - 1):
        sums = out[row]
        k, end = starts[row], starts[row + 1]
        for b in range(n):
            sums[b] = 0
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


@compiled
def to_columns(rows, offset, out):  # type: ignore[no-untyped-def]
    """out [P, B] = rows [B, P] transposed, less `offset`; 16 columns at a time stay in cache."""
    n, width = rows.shape
    for left in range(0, width, 16):
        for b in range(n):
            for p in range(left, min(left + 16, width)):
                out[p, b] = rows[b, p] - offset


@compiled
def to_rows(columns, offset, out):  # type: ignore[no-untyped-def]
    """out [B, P] = columns [P, B] transposed, plus `offset` [P]."""
    width, n = columns.shape
    for left in range(0, width, 16):
        for b in range(n):
            for p in range(left, min(left + 16, width)):
                out[b, p] = columns[p, b] + offset[p]
