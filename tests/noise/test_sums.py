"""Sums over windows: equal to NumPy's for any block, gathered or spread."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snr_ray.noise import blocks, sums

WIDTHS = {2: (sums.gather2, sums.spread2), 3: (sums.gather3, sums.spread3),
          4: (sums.gather4, sums.spread4)}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from(sorted(WIDTHS)),
    n_images=st.integers(1, 100),
    n_rows=st.integers(1, 6),
    stride=st.integers(1, 4),
    base=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_equal_numpy(
    width: int, n_images: int, n_rows: int, stride: int, base: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ends = np.cumsum(rng.integers(0, 9, n_rows))
    starts = np.concatenate([[0], ends[:-1]])
    weights = rng.standard_normal((4, ends[-1] + 1)).astype(np.float32)
    places = rng.integers(0, 20, ends[-1] + 1).astype(np.int32)
    block = rng.standard_normal((24 + 3 * stride, n_images)).astype(np.float32)
    rows = rng.standard_normal((n_rows + 2, n_images)).astype(np.float32)
    matrix = np.zeros((len(rows), len(block)))
    for r in range(n_rows):
        for k in range(starts[r], ends[r]):
            for j in range(width):
                matrix[2 + r, base + places[k] + j * stride] += weights[j, k]
    gather, spread = WIDTHS[width]
    gathered, spread_out = rows.copy(), block.copy()
    gather(block, base, stride, places, weights, starts, ends, gathered, 2, n_rows)
    spread(spread_out, base, stride, places, weights, starts, ends, rows, 2, n_rows)
    np.testing.assert_allclose(gathered, rows + matrix @ block, atol=1e-4)
    np.testing.assert_allclose(spread_out, block + matrix.T @ rows, atol=1e-4)


@pytest.mark.parametrize("n", range(1, 70))
def test_blocks_are_filled_up_to_vectors(n: int) -> None:
    width = blocks.block_width(n)
    assert n <= width < n + blocks.LANES
    assert n == 1 or width % blocks.FEW == 0


def test_scratch_begins_at_a_line_of_the_cache_and_is_kept() -> None:
    first = sums.scratch("test", 5, 7)
    assert first.ctypes.data % 64 == 0
    assert sums.scratch("test", 7, 5).ctypes.data == first.ctypes.data
    assert sums.scratch("test", 100, 100).ctypes.data % 64 == 0


def test_without_a_place_for_the_compiled_code_it_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An installation that nobody may write to, for a user without a home.
    def nowhere(*args: object, **options: object) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function 'double': no locator available")
        return njit(*args, **options)

    njit = sums.numba.njit
    monkeypatch.setattr(sums.numba, "njit", nowhere)

    @sums.compiled
    def double(x):  # type: ignore[no-untyped-def]
        return 2 * x

    assert double(4) == 8
