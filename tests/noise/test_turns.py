"""Large images are turned to be seen in fewer views, which changes nothing but the time."""

import numpy as np
import pytest
from skimage.transform import radon

from snr_ray.noise import blocks
from snr_ray.noise.operator import NoiseSpec, RadonNoise
from snr_ray.noise.turns import Turns

SHAPES = [(30, 30), (33, 33), (36, 24), (25, 40), (30, 50)]


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TURNED_PIXELS", 1)


def images(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).random((n, *shape), dtype=np.float32)


def both_ways(operator: RadonNoise, x: np.ndarray) -> list[np.ndarray]:
    """All that an operator makes of images, which may be turned or not."""
    return [operator(x), operator.times(x), operator.transposed(x), operator.project(x)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_views", [1, 2, 3, 4, 6, 7, 10, 20])
def test_turned_images_have_the_same_noise(
    shape: tuple[int, int], n_views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, plain = images(3, *shape), RadonNoise(NoiseSpec(n_views), *shape)
    before = both_ways(plain, x)
    monkeypatch.setattr(blocks, "TURNED_PIXELS", 1)
    assert blocks.n_turns(*shape, 3) > 1
    for one, other in zip(
        both_ways(RadonNoise(NoiseSpec(n_views), *shape), x), before, strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()))


@pytest.mark.usefixtures("turned")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_transpose_is_exact(shape: tuple[int, int]) -> None:
    operator, x, y = RadonNoise(NoiseSpec(7), *shape), images(2, *shape), images(2, *shape)[::-1]
    forth = (operator.times(x).astype(float) * y).sum()
    assert (operator.transposed(y).astype(float) * x).sum() == pytest.approx(forth, rel=1e-5)


@pytest.mark.usefixtures("turned")
def test_views_of_another_range_have_no_such_symmetry() -> None:
    x = images(1, 30, 30)
    half, most = (RadonNoise(NoiseSpec(9, angle_range=r), 30, 30).project(x) for r in (180, 160))
    assert np.abs(half - most).max() > 1
    theta = NoiseSpec(9, angle_range=160).theta
    expected = radon(x[0], theta=theta, circle=False)
    np.testing.assert_allclose(most[0], expected[: len(most[0])], atol=1e-3)


@pytest.mark.parametrize(("shape", "n_views", "turns", "first"), [
    ((30, 30), 20, 4, 6), ((30, 30), 6, 4, 2), ((30, 30), 7, 2, 4), ((36, 24), 20, 2, 11),
])  # fmt: skip
def test_a_square_needs_an_eighth_of_the_circle(
    shape: tuple[int, int], n_views: int, turns: int, first: int
) -> None:
    its = Turns.of(*shape, n_views)
    assert (its.n, its.n_views) == (turns, first)


def test_few_large_images_are_turned() -> None:
    assert [blocks.n_turns(n, n, 1) for n in (64, 256, 512, 2048, 4096)] == [1, 4, 4, 4, 1]
    assert [blocks.n_turns(512, 512, n) for n in (4, 8, 9)] == [4, 4, 1]
    assert blocks.n_turns(512, 400, 4) == 2
    assert blocks.n_turns(400, 400, 4) == 1  # 566 bins
