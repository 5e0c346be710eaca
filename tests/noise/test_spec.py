"""What a noise spec takes, and what it is then: plain numbers, whatever they came as."""

import json
from typing import Any

import numpy as np
import pytest

from snr_ray.errors import InputError
from snr_ray.noise.operator import RadonNoise, noise_operator
from snr_ray.noise.spec import NoiseSpec, spec_hash


@pytest.mark.parametrize(
    ("kind", "number"), [(np.uint8, 20), (np.int8, 20), (np.int64, 200), (np.uint16, 200)]
)
def test_view_counts_of_numpy_are_those_of_python(kind: type, number: int) -> None:
    spec, plain = NoiseSpec(kind(number)), NoiseSpec(number)
    assert (spec, hash(spec), type(spec.n_views)) == (plain, hash(plain), int)
    np.testing.assert_array_equal(spec.theta, plain.theta)
    image = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    noise_operator.cache_clear()
    noisy = noise_operator(spec, 64, 64)(image)
    np.testing.assert_array_equal(noise_operator(plain, 64, 64)(image), noisy)
    np.testing.assert_array_equal(RadonNoise(plain, 64, 64)(image), noisy)


def test_so_are_its_other_settings() -> None:
    spec = NoiseSpec(9, np.str_("hann"), np.float32(90), np.int32(1000))
    plain = NoiseSpec(9, "hann", 90.0, 1000)
    assert spec == plain
    assert NoiseSpec(9, "hann", 90, 1e3) == plain
    assert spec_hash([spec], 28) == spec_hash([NoiseSpec(9, "hann", 90, 1e3)], 28)
    assert json.dumps(spec.photons) == "1000"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_views": 0}, "n_views must be at least 1, but got 0"),
        ({"n_views": 9.0}, "n_views must be a whole number of views, but got 9.0"),
        ({"n_views": np.True_}, "n_views must be a whole number of views, but got .*True"),
        ({"filter": "box"}, "filter must be one of ramp"),
        ({"filter": ["ramp"]}, "filter must be one of ramp"),
        ({"angle_range": 0.0}, "angle_range must be from 1 to 180 degrees, but got 0.0"),
        ({"angle_range": -10}, "angle_range must be from 1 to 180 degrees, but got -10"),
        ({"angle_range": 181.0}, "angle_range must be from 1 to 180 degrees, but got 181"),
        ({"angle_range": 1e-300}, "angle_range must be from 1 to 180 degrees, but got 1e-300"),
        ({"angle_range": np.nan}, "angle_range must be from 1 to 180 degrees, but got nan"),
        ({"angle_range": "90"}, "angle_range must be from 1 to 180 degrees, but got '90'"),
        ({"photons": -1}, "photons must not be negative, but got -1"),
        ({"photons": 1000.5}, "photons must be a whole number, but got 1000.5"),
        ({"photons": "5"}, "photons must be a whole number, but got '5'"),
        ({"photons": True}, "photons must be a whole number, but got True"),
        ({"photons": np.nan}, "photons must be a whole number, but got nan"),
        ({"photons": 1e19}, r"photons must be at most 1e\+18, but got 1e\+19"),
        ({"photons": 10**18 + 1}, r"photons must be at most 1e\+18"),
        ({"photons": np.inf}, r"photons must be at most 1e\+18, but got inf"),
        ({"photons": -np.inf}, "photons must"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        NoiseSpec(**{"n_views": 4} | settings)
