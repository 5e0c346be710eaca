"""The compiled product: equal to SciPy's for any matrix, cut in parts or not, and any block."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from snr_ray.noise.rows import LANES, Rows, to_columns, to_rows


def cut(matrix: np.ndarray, n_parts: int) -> Rows:
    """A dense matrix as Rows whose columns come in so many parts."""
    edges = np.linspace(0, matrix.shape[1], n_parts + 1).astype(int)
    tall = np.zeros((n_parts * len(matrix), matrix.shape[1]))
    for part, (left, right) in enumerate(itertools.pairwise(edges)):
        tall[part * len(matrix) : (part + 1) * len(matrix), left:right] = matrix[:, left:right]
    stored = sparse.csr_array(tall)
    return Rows(stored.indptr.astype(np.int64), stored.indices.astype(np.int32),
                stored.data.astype(np.float32), *matrix.shape)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 60)),
    density=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    n_parts=st.integers(1, 4),
    n_vectors=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_product_equals_scipy(
    shape: tuple[int, int], density: float, n_parts: int, n_vectors: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal(shape) * (rng.random(shape) < density)
    rows = cut(matrix, n_parts)
    x = rng.standard_normal((shape[1], n_vectors * LANES)).astype(np.float32)
    out = np.full((shape[0], n_vectors * LANES), np.nan, np.float32)
    rows.times(x, out)
    np.testing.assert_allclose(out, matrix @ x, atol=1e-4)
    np.testing.assert_allclose(rows.scipy().toarray(), matrix.astype(np.float32))
    np.testing.assert_allclose(Rows.dense(matrix).scipy().toarray(), matrix.astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    more=st.integers(0, 20),
    width=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_turning_a_block_and_back_changes_nothing(n: int, more: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, order = rng.random((n, width), dtype=np.float32), rng.permutation(width)
    columns, back = np.empty((width, n + more), np.float32), np.empty((n, width), np.float32)
    to_columns(images, 0.5, order, columns)
    np.testing.assert_array_equal(columns[:, :n], images.T[order] - np.float32(0.5))
    assert not columns[:, n:].any()
    to_rows(columns, np.full(width, 0.5), np.argsort(order), back)
    np.testing.assert_allclose(back, images, atol=1e-6)
