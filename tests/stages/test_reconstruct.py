"""The reconstruct stage: scans in HDF5 and NPY, centres, every k-th view, resume, bad input."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from skimage.data import shepp_logan_phantom
from skimage.transform import iradon, radon, resize

from snr_ray.cli import main
from snr_ray.errors import InputError
from snr_ray.images.scans import open_scan
from snr_ray.stages.reconstruct import reconstruct

ANGLES = np.arange(36) * 5.0


@pytest.fixture(scope="module")
def integrals() -> np.ndarray:
    """[36 views, 2 slices, 48 bins], the axis at bin 24."""
    image = np.pad(resize(shepp_logan_phantom(), (32, 32)), 8)
    slices = [image, image.T]
    return np.stack([radon(s, ANGLES, circle=True).T for s in slices], 1).astype(np.float32)


@pytest.fixture(scope="module")
def scan(integrals: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as counts in HDF5, with flats, darks and angles."""
    h5py = pytest.importorskip("h5py")
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("exchange")
        group["data"] = 100 + 60000 * np.exp(-integrals / 48)
        group["data_white"] = np.full((4, 2, 48), 60100.0)
        group["data_dark"] = np.full((4, 2, 48), 100.0)
        group["theta"] = ANGLES
    return path


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_every_slice_is_what_scikit_image_makes_of_it(
    scan: Path, integrals: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = reconstruct(sinogram=str(scan), out=out, every=2)
    assert (outcome.images, outcome.failed) == (2, 0)
    for row in range(2):
        expected = iradon(integrals[::2, row].T, ANGLES[::2], circle=False, output_size=48) / 48
        image = tifffile.imread(out / f"scan_{row:04d}.tif")
        assert image.dtype == np.float32
        np.testing.assert_allclose(image, expected, atol=1e-4 * np.abs(expected).max())
    # A killed job makes what is missing, and leaves the rest alone.
    stamp = (out / "scan_0000.tif").stat().st_mtime_ns
    (out / "scan_0001.tif").unlink()
    reconstruct(sinogram=str(scan), out=out, every=2)
    assert (out / "scan_0001.tif").is_file()
    assert (out / "scan_0000.tif").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="belongs to another job"):
        reconstruct(sinogram=str(scan), out=out, every=3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_npy_with_fields_of_their_own_another_centre_and_wider_bins(
    integrals: np.ndarray, tmp_path: Path
) -> None:
    wide = np.pad(integrals[:, 0], ((0, 0), (24, 24)))  # the axis at bin 48 of 96
    np.save(tmp_path / "s.npy", np.roll(200 * np.exp(-wide / 48), 2, axis=1))
    np.save(tmp_path / "f.npy", np.full((3, 96), 200.0))
    code = main(["reconstruct", "--sinogram", str(tmp_path / "s.npy"),
                 "--flats", str(tmp_path / "f.npy"), "--out", str(tmp_path / "o"),
                 "--center", "50", "--bin", "2", "--size", "24"])  # fmt: skip
    assert code == 0
    image = tifffile.imread(tmp_path / "o" / "s_0000.tif")
    truth = np.pad(resize(shepp_logan_phantom(), (16, 16)), 4) * 2 / 48
    assert image.shape == (24, 24)
    assert np.corrcoef(image.ravel(), truth.ravel())[0, 1] > 0.9


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_a_slice_that_cannot_be_read_fails_alone(integrals: np.ndarray, tmp_path: Path) -> None:
    bad = integrals.copy()
    bad[3, 1] = np.nan
    np.save(tmp_path / "s.npy", bad)
    words = ["reconstruct", "--sinogram", str(tmp_path / "s.npy"), "--out", str(tmp_path / "out")]
    assert main(words) == 3
    assert (tmp_path / "out" / "s_0000.tif").is_file()
    (row,) = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert row["id"] == "s_0001.tif"
    assert "must be finite, but slice 1" in row["reason"]
    # The file put right is another scan, which does not pass for the one before.
    np.save(tmp_path / "s.npy", integrals)
    assert main(words) == 2
    assert main([*words, "--overwrite"]) == 0
    assert len(list((tmp_path / "out").glob("*.tif"))) == 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_the_first_slice_fails_alone_as_any_other(integrals: np.ndarray, tmp_path: Path) -> None:
    broken = integrals.copy()
    broken[4, 0, 9] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    outcome = reconstruct(sinogram=str(tmp_path / "broken.npy"), out=tmp_path / "out")
    assert (outcome.images, outcome.failed) == (integrals.shape[1] - 1, 1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_slices_are_called_as_their_scan(integrals: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "tooth#2.npy", integrals)
    reconstruct(sinogram=str(tmp_path / "tooth#2.npy"), out=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tif")) == [
        "tooth#2_0000.tif", "tooth#2_0001.tif"]  # fmt: skip


@pytest.mark.ray
@pytest.mark.usefixtures("ray_2_cpus")
def test_wider_bins_leave_the_axis_where_it_is(integrals: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", integrals)
    middle = integrals.shape[2] // 2
    images = []
    for center in (None, middle):
        out = tmp_path / f"out{center}"
        reconstruct(sinogram=str(tmp_path / "scan.npy"), out=out, center=center, together=2)
        images.append(tifffile.imread(out / "scan_0000.tif"))
    np.testing.assert_array_equal(*images)


def test_the_fields_of_a_named_data_set_lie_beside_it(scan: Path) -> None:
    named = open_scan(f"{scan}#exchange/data")
    assert named.flats == f"{scan}#exchange/data_white"
    assert named.darks == f"{scan}#exchange/data_dark"
    assert not open_scan(f"{scan}#other/data").flats


@pytest.mark.parametrize(
    ("theta", "sentence"),
    [(np.full((36, 1), np.nan), "must be finite"), (ANGLES[:30], "30 angles")],
)
def test_angles_that_are_none_are_refused(
    theta: np.ndarray, sentence: str, integrals: np.ndarray, tmp_path: Path
) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["exchange/data"], file["exchange/theta"] = integrals, theta
    with pytest.raises(InputError, match=sentence):
        reconstruct(sinogram=str(tmp_path / "s.h5"), out=tmp_path / "out")


def test_bad_scans_are_one_sentence(integrals: np.ndarray, scan: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", integrals)
    np.save(tmp_path / "d.npy", np.zeros((1, 2, 48)))
    np.save(tmp_path / "four.npy", np.zeros((2, 2, 2, 48)))
    (tmp_path / "cut.h5").write_bytes(scan.read_bytes()[:1000])
    (tmp_path / "text.csv").write_text("1,2")
    nan = integrals.copy()
    nan[3] = np.nan
    np.save(tmp_path / "nan.npy", nan)

    def refused(words: str, sinogram: str = "s.npy", **options: object) -> None:
        path = sinogram if "/" in sinogram else str(tmp_path / sinogram)
        with pytest.raises(InputError, match=words):
            reconstruct(sinogram=path, out=tmp_path / "out", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    refused("must be a file .npy or .h5, but .* is not there", "none.npy")
    refused("must be a file .npy or .h5, but .* is a folder", str(tmp_path))
    refused("must be NPY or HDF5", "text.csv")
    refused("is not a readable HDF5 file", "cut.h5")
    refused("must hold the data set x/y, but holds exchange/data", f"{scan}#x/y")
    refused(r"\[views, bins\] or \[views, slices, bins\], but .* \[2, 2, 2, 48\]", "four.npy")
    refused("must be finite, but slice 0", "nan.npy")
    np.save(tmp_path / "huge.npy", 1e300 * (1 + integrals.astype(np.float64)))
    refused("must be finite, but slice 0", "huge.npy")
    np.save(tmp_path / "f3.npy", np.ones((3, 3, 48)))
    np.save(tmp_path / "f40.npy", np.ones((3, 40)))
    for fields in ("f3", "f40"):
        refused(r"\[fields, 48 bins\] or \[fields, 2 slices, 48 bins\], .*f\w+\.npy holds float64 "
                r"\[3, ", flats=str(tmp_path / f"{fields}.npy"))  # fmt: skip
    np.save(tmp_path / "f2.npy", np.ones((2, 48)))
    refused(r"--flats must say what they are of, .*f2\.npy holds \[2, 48\], which may be one field "
            r"or 2; store one as \[1, 2, 48\]", flats=str(tmp_path / "f2.npy"))  # fmt: skip
    refused("--darks say nothing without --flats", darks=str(tmp_path / "d.npy"))
    refused("--every must be at most the 36 views", every=37)
    refused("--every must be at least 1", every=0)
    refused("--center must be a bin of the detector, 0 to 47, but got 48", center=48)
    for center in (0, 47):
        refused(rf"0\.5 to 46\.5 in groups of 2, but got {center}", center=center, together=2)
    refused("at least 8 bins, but .* has 48, in groups of 7", together=7)
    for size in (4, 8 * 48 + 1):
        refused(f"--size must be from 8 to 384, 8 for each bin, but got {size}", size=size)
