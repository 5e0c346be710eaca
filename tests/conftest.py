"""Shared pieces of the tests: a tiny config, images, one Ray of two cores, one trained model."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.fs as pafs
import pytest
from PIL import Image

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.environment import prepare_environment

if TYPE_CHECKING:
    from snr_ray.learning.batches import Pairs
    from snr_ray.network.hvae import HVAE

os.environ.pop("RAY_ADDRESS", None)  # tests never touch a cluster that is running
prepare_environment()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=2, help="kills of each test of kills")


@pytest.fixture(scope="session")
def tiny() -> Config:
    """Two levels of 8 channels on 16 px glyphs: everything runs, nothing is learned."""
    return configs.load(["smoke"], ["images.limit=200"])


@pytest.fixture(scope="session")
def ray_2_cpus() -> Iterator[None]:
    """One local Ray for the whole session; never attaches to a running cluster."""
    import ray

    from snr_ray.stages.job.connection import quiet_data

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    quiet_data()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server on loopback: the query that URIs of its buckets need."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    put, one = S3Response.put_object, threading.Lock()

    def put_at_once(response: S3Response) -> Any:
        """A conditional write is one step for S3; moto looks, then writes."""
        with one:
            return put(response)

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_at_once)
        server.start()
        host, port = server.get_host_and_port()
        yield f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        server.stop()


@pytest.fixture
def bucket(
    s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[pafs.FileSystem, str]]:
    """The empty bucket `bucket` of that server: its file system and the query of its URIs."""
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    uri = f"s3://bucket?{s3_server}&allow_bucket_creation=true&allow_bucket_deletion=true"
    fs, _ = pafs.FileSystem.from_uri(uri)
    fs.create_dir("bucket")
    yield fs, s3_server
    fs.delete_dir("bucket")


@pytest.fixture(scope="session")
def unbroken(tiny: Config, ray_2_cpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on one worker, from the glyphs; not to be written to."""
    from snr_ray.stages.simulation.dataset import Origin
    from snr_ray.stages.training.train import train

    out = tmp_path_factory.mktemp("train") / "run"
    return train(tiny, origin=Origin(images="glyphs"), out=out).out


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """24 grey PNG files of 20x18 pixels in two subfolders."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for k in range(24):
        path = folder / "ab"[k % 2] / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 18), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def model_folder(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights, with noise codes of real glyphs; made without Ray."""
    return _model_folder(tiny, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def unet_folder(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a U-Net."""
    config = configs.replace(tiny, {"model.kind": "unet"})
    return _model_folder(config, tmp_path_factory.mktemp("unets") / "unet")


@pytest.fixture(scope="session")
def blind_folder(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a model whose decoder learns noise, and that cannot be told what it is."""
    config = configs.replace(tiny, {"model.decoder": "network"})
    return _model_folder(config, tmp_path_factory.mktemp("blind"))


@pytest.fixture(scope="session")
def physics_folder(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a model that knows the geometry."""
    config = configs.replace(tiny, {"model.physics": True})
    return _model_folder(config, tmp_path_factory.mktemp("physics"))


@pytest.fixture(scope="session")
def range_folder(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a model of a range of view counts."""
    config = configs.replace(tiny, {"noise.views_per_pixel": [0.2, 0.9]})
    return _model_folder(config, tmp_path_factory.mktemp("range"))


def _model_folder(tiny: Config, run: Path) -> Path:
    import torch

    from snr_ray.images.sources import open_source
    from snr_ray.learning.batches import Pairs
    from snr_ray.learning.checkpoint import save_model
    from snr_ray.learning.learner import Learner
    from snr_ray.learning.validation import donor_codes
    from snr_ray.noise.operator import noise_operator, noise_specs

    source = open_source("glyphs")
    rows = source.select("train", 20)
    clean = np.stack([source.load(row, tiny.images) for row in rows])
    noisy = [[noise_operator(spec, 16, 16)(clean)] for spec in noise_specs(tiny.noise)]
    pairs = Pairs([source.ids[row] for row in rows], [clean], noisy)
    learner = Learner(tiny)
    if tiny.model.physics:
        learner.fit_physics(pairs)
    maker = getattr(learner.average, "noise_maker", None)
    if maker is not None and tiny.noise.views_per_pixel is not None:
        _teach(learner.average, pairs, tiny)
    elif maker is not None:  # its weights begin at zero; here the least change of a code must show
        code = torch.cat([level.flatten() for level in donor_codes(learner.average, pairs).mean(0)])
        weights = np.random.default_rng(0).normal(size=maker.logits.weight.shape)
        maker.logits.weight.copy_(torch.from_numpy(100 * weights))
        maker.logits.bias.copy_(-maker.logits.weight @ code)
    codes, metrics = learner.validate(pairs, pairs)
    run.mkdir(exist_ok=True)
    save_model(run / "model", tiny, learner.average, codes, metrics, "tests", steps=20)
    return run / "model"


def _teach(model: "HVAE", pairs: "Pairs", config: Config) -> None:
    """Let noise codes tell the noise and the view count of these images, as well as they can."""
    import torch

    from snr_ray.learning.validation import donor_codes

    maker = model.noise_maker
    assert maker is not None
    codes = torch.cat([level.flatten(2) for level in donor_codes(model, pairs).donors], dim=2)
    ids, donors, _ = codes.shape
    octaves = np.log(np.array(config.noise.n_views) / config.images.size) - maker.middle
    truth = np.array([[-8.0, 0.0], *([8.0, octave] for octave in octaves)], np.float32)
    flat = torch.nn.functional.pad(codes.reshape(ids * donors, -1), (0, 1), value=1.0)
    wanted = torch.from_numpy(truth).repeat_interleave(donors, 0)
    solution = torch.linalg.lstsq(flat.double(), wanted.double(), driver="gelsd").solution.float()
    maker.reading.weight.copy_(solution[:-1].T)
    maker.reading.bias.copy_(solution[-1])
