"""Scans: what belongs to a named data set lies beside it, and names of files may hold a #."""

from pathlib import Path

import numpy as np
import pytest

from snr_ray.errors import InputError
from snr_ray.images.scans import open_scan

h5py = pytest.importorskip("h5py")
VIEWS = np.ones((6, 2, 8), np.float32)


def scan(path: Path, **thetas: float) -> str:
    """A file with one data set of views for each group, and angles that start with a number."""
    with h5py.File(path, "w") as file:
        for group in ("exchange", "second", "bare", "od#d"):
            file[f"{group}/data"] = VIEWS
            if group in thetas:
                file[f"{group}/theta"] = thetas[group] + np.arange(6.0)
    return str(path)


@pytest.mark.parametrize("name", ["", "#exchange/data", "#second/data", "#bare/data"])
def test_angles_are_those_beside_the_data_set(tmp_path: Path, name: str) -> None:
    theta = open_scan(scan(tmp_path / "a.h5", exchange=10, second=20) + name).theta()
    if name == "#bare/data":
        assert theta is None
    else:
        assert theta is not None
        assert theta[0] == (20 if name == "#second/data" else 10)


@pytest.mark.parametrize("name", ["", "#exchange/data", "#second/data", "#od#d/data"])
def test_names_may_hold_the_sign_that_parts_them(tmp_path: Path, name: str) -> None:
    opened = open_scan(scan(tmp_path / "run#3.h5", exchange=10, second=20) + name)
    assert opened.shape() == VIEWS.shape
    assert opened.stamp()
    assert (opened.theta() is None) == (name == "#od#d/data")


@pytest.mark.parametrize("part", ["data", "data_white", "data_dark", "theta"])
@pytest.mark.parametrize("kind", ["S4", "complex64", "bool", "empty"])
def test_what_holds_no_numbers_is_one_sentence(tmp_path: Path, part: str, kind: str) -> None:
    shape = 6 if part == "theta" else VIEWS.shape
    parts = {"data": VIEWS, part: h5py.Empty("f4") if kind == "empty" else np.zeros(shape, kind)}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in parts.items():
            file[f"exchange/{name}"] = values
    opened = open_scan(str(tmp_path / "a.h5"))
    with pytest.raises(InputError, match=r"numbers.* holds "):
        [ask() for ask in (opened.shape, opened.check_fields, opened.theta)]
