"""The page of a training run: every curve, the pictures and the settings in one file."""

import re
from pathlib import Path

import numpy as np
import pytest

from snr_ray.config import Config
from snr_ray.images.sources import open_source
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import load_any, load_model
from snr_ray.noise.operator import noise_operator, noise_specs
from snr_ray.scoring.runpage import GAP, png, run_page, tiles


@pytest.fixture(scope="module")
def val(tiny: Config) -> Pairs:
    source = open_source("glyphs")
    rows = source.select("val", 60)[:4]
    clean = np.stack([source.load(row, tiny.images) for row in rows])
    noisy = [[noise_operator(spec, 16, 16)(clean)] for spec in noise_specs(tiny.noise)]
    return Pairs([source.ids[row] for row in rows], [clean], noisy)


def test_tiles_show_the_images_in_their_columns(model_folder: Path, val: Pairs) -> None:
    trained = load_model(model_folder)
    sheet, columns = tiles(trained.model, trained.codes, val, (12, 6))
    assert columns == ["clean", "noisy, 6 views", "noise removed", "noisy, rebuilt",
                       "clean, rebuilt", "noise injected"]  # fmt: skip
    scale = 6  # 16 pixels -> 96
    assert sheet.shape == (4 * (96 + GAP) - GAP, 6 * (96 + GAP) - GAP, 3)
    rows = np.arange(4)
    for column, images in enumerate((val.take(rows, 0), val.take(rows, 2))):
        for row in rows:
            tile = sheet[
                row * 100 : row * 100 + 96 : scale, column * 100 : column * 100 + 96 : scale
            ]
            np.testing.assert_array_equal(tile[..., 1], images[row, 0].clip(0, 1))


def test_tiles_of_a_unet(unet_folder: Path, val: Pairs) -> None:
    _, columns = tiles(load_any(unet_folder).model, None, val, (12, 6))
    assert columns == ["clean", "noisy, 6 views", "noise removed"]


def test_page_holds_curves_pictures_and_settings_and_needs_nothing_else() -> None:
    rows = [
        {"step": step, "loss": 20.0 / step, "recon": 1.0, "kl_noise": 3.0, "kl_noise_0": 1.0,
         "distance_same_id": 0.2, "grad_norm": 5.0, "skipped": 0, "images_per_s": 70.0}
        for step in (25, 50)
    ]  # fmt: skip
    rows += [{"step": 50, "swap_psnr": 21.5, "swap_psnr_12": 23.0, "recon_clean_psnr": 25.0}]
    del rows[0]["loss"]  # was not finite
    picture = png(np.full((8, 8, 3), 0.5, np.float32), "clean, noisy", 50)
    page = run_page(rows, "train:\n  lr: 0.006 # <fast>\n", picture, "Stopped & kept.")
    for text in ("Stopped &amp; kept.", "lr: 0.006 # &lt;fast&gt;", "step 50, from left to right: ",
                 "kl_noise_0", "gradient norm before clipping", "skipped steps", "images/s",
                 "swap_psnr_12", "data:image/png;base64,"):  # fmt: skip
        assert text in page
    assert len(re.findall(r"<svg", page)) == 1
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page == run_page(rows, "train:\n  lr: 0.006 # <fast>\n", picture, "Stopped & kept.")


def test_steps_of_a_short_run_are_whole() -> None:
    axis = r">{}</text>"
    page = run_page([{"step": 20, "grad_norm": 5.0}], "", None, "Done.")
    assert re.search(axis.format("20"), page)
    assert not re.search(axis.format(r"(19|20)\.\d+"), page)


def test_page_of_a_run_that_never_stepped() -> None:
    page = run_page([], "", None, "Interrupted.")
    assert "No step has been logged yet." in page
