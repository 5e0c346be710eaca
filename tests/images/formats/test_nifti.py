"""NIfTI volumes: slice by slice, back with affine, header and kind of numbers."""

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from snr_ray.config import ImagesConfig
from snr_ray.errors import InputError
from snr_ray.images.formats.codec import open_file, output_name
from snr_ray.images.formats.headers import n_values
from snr_ray.images.sources import open_source

WINDOW = (-1000.0, 400.0)
AFFINE = np.array([[-0.75, 0, 0, 90], [0, 0.5, 0, -120], [0, 0, 3.0, 5], [0, 0, 0, 1]])
UNITS = np.round(np.linspace(-1024, 900, 12 * 9 * 4)).reshape(12, 9, 4)


def volume(values: np.ndarray, kind: Any = nibabel.Nifti1Image, **scaling: float) -> bytes:
    image = kind(values, AFFINE)
    image.header["descrip"] = b"a scan"
    image.header.set_xyzt_units("mm")
    if scaling:
        image.header.set_slope_inter(**scaling)
    return image.to_bytes()


def again(data: bytes, name: str = "a.nii", **options: Any) -> tuple[list[np.ndarray], bytes]:
    file = open_file(data, name, **options)
    pixels = [frame.pixels for frame in file.frames]
    return pixels, file.encode(pixels, name)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_slices_are_read_and_the_volume_comes_back(dtype: type, kind: Any) -> None:
    pixels, written = again(volume(UNITS.astype(dtype), kind), window=WINDOW)
    cut = np.clip(UNITS, *WINDOW)
    assert len(pixels) == 4
    for k, slice_ in enumerate(pixels):  # rows along y
        np.testing.assert_allclose(slice_[0], (cut[:, :, k].T + 1000) / 1400, atol=1e-6)
    after = kind.from_bytes(written)
    # What lies above the window is still there; below air is nothing.
    np.testing.assert_allclose(after.get_fdata(), np.maximum(UNITS, -1000), atol=1e-3)
    np.testing.assert_array_equal(after.affine, AFFINE)
    assert after.get_data_dtype() == dtype
    assert after.header["descrip"] == b"a scan"
    assert after.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_slope_and_intercept_are_kept(dtype: type) -> None:
    stored = np.round((UNITS + 1024) / 0.5).astype(dtype)
    data = volume(stored, slope=0.5, inter=-1024.0)
    pixels, written = again(data, window=WINDOW)
    cut = np.clip(stored * 0.5 - 1024, *WINDOW)
    np.testing.assert_allclose(pixels[2][0], (cut[:, :, 2].T + 1000) / 1400, atol=1e-6)
    after = nibabel.Nifti1Image.from_bytes(written)
    assert (after.dataobj.slope, after.dataobj.inter) == (0.5, -1024.0)
    assert after.get_data_dtype() == dtype
    np.testing.assert_allclose(after.get_fdata(), np.maximum(stored * 0.5 - 1024, -1000), atol=0.25)


def test_a_packed_series_stays_packed_and_its_bytes_are_the_same_each_time() -> None:
    series = np.stack([UNITS, UNITS[::-1]], axis=-1).astype(np.int16)
    data = gzip.compress(volume(series))
    pixels, written = again(data, "a.nii.gz", window=WINDOW)
    assert len(pixels) == 8
    assert written == again(data, "a.nii.gz", window=WINDOW)[1]
    after = nibabel.Nifti1Image.from_bytes(gzip.decompress(written))
    np.testing.assert_allclose(after.get_fdata(), np.maximum(series, -1000))
    assert output_name("x/a.nii.gz", tensors=False, file=True) == "x/a.nii.gz"


def test_what_cannot_be_read_has_its_sentence() -> None:
    with pytest.raises(InputError, match=r"int16 pixels have no agreed white"):
        open_file(volume(UNITS.astype(np.int16)), "a.nii")
    with pytest.raises(InputError, match=r"must hold numbers, but a\.nii holds complex"):
        open_file(volume(UNITS.astype(np.complex64)), "a.nii", window=WINDOW)
    for data in (gzip.compress(b"no volume"), b"no volume", gzip.compress(b"x" * 900)[:20]):
        with pytest.raises(InputError, match=r"a\.nii\.gz cannot be read as an image"):
            open_file(data, "a.nii.gz", window=WINDOW)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_its_size_is_known_before_it_is_unpacked(kind: Any) -> None:
    data = volume(UNITS.astype(np.int16), kind)
    for name, file in (("a.nii", data), ("a.nii.gz", gzip.compress(data))):
        assert n_values(file, name) == UNITS.size
        assert n_values(file[:30], name) is None


def test_a_source_gives_one_picture_or_all(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(volume(UNITS.astype(np.int16)))
    source, images = open_source(str(tmp_path)), ImagesConfig(window=WINDOW)
    assert [frame.pixels.shape for frame in source.pictures(0, images)] == [(1, 9, 12)] * 4
    with pytest.raises(InputError, match=r"must hold one image, but a\.nii holds 4; split it"):
        source.read(0, images)
