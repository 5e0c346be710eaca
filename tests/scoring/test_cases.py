"""What is scored: input as files and detectors have it."""

import numpy as np

from snr_ray.scoring.cases import EXTRA_SIGMA, as_seen


def test_grain_is_drawn_by_the_id_of_an_image() -> None:
    noisy = np.random.default_rng(0).random((2, 3, 40, 40), dtype=np.float32)
    grain = as_seen("remove_grainy", noisy, ["a", "b"]) - noisy
    np.testing.assert_allclose(grain.std((1, 2, 3)), EXTRA_SIGMA, rtol=0.05)
    assert abs(np.corrcoef(grain.reshape(2, -1))[0, 1]) < 0.1
    alone = as_seen("remove_grainy", noisy[1:], ["b"]) - noisy[1:]
    np.testing.assert_array_equal(alone[0], grain[1])


def test_stored_input_is_what_a_file_of_8_bits_holds() -> None:
    noisy = np.array([[[[-0.2, 0.1, 0.5, 1.4]]]], np.float32)
    seen = as_seen("remove_stored", noisy, ["a"])
    np.testing.assert_allclose(255 * seen, [[[[0, 26, 128, 255]]]], atol=1e-4)
    np.testing.assert_array_equal(as_seen("remove", noisy, ["a"]), noisy)
