"""What the codes know and what injected noise is worth: measurements on whole sets of images.

Each takes a trained model and pairs, and returns plain numbers; fitting is on validation images,
scoring on test images. Runs without Ray.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from snr_ray.hashing import hash64
from snr_ray.images.formats.pixels import with_channels
from snr_ray.learning.batches import Pairs
from snr_ray.learning.checkpoint import TrainedModel
from snr_ray.metrics import psnr
from snr_ray.network.swap import detect, swap

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Codes = dict[str, npt.NDArray[Any]]

IMAGES = 400
"""Images per split that are probed."""
SPREAD_DONORS = 16
SAMPLES = 8
"""Posterior samples behind an uncertainty."""
BINS = 10
NO_CLASS = -1
CLASSIFIER_STEPS = 300
CLASSIFIER_BATCH = 64


def donor_spread(trained: TrainedModel, pairs: Pairs) -> dict[str, float]:
    """Standard deviation in dB of an image's swap PSNR over random clean donors, mean of images."""
    rows = pairs.sample(IMAGES // 4)
    clean = pairs.take(rows, 0)
    spread = {}
    for noise_id, n_views in enumerate(trained.config.noise.n_views, start=1):
        noisy, ids = pairs.take(rows, noise_id), np.full(len(rows), noise_id)
        values = []
        for donor in range(min(SPREAD_DONORS, trained.codes.n_donors)):
            code = trained.codes.pick(0, np.array([donor]))
            values.append(psnr(swap(trained.model, noisy, code, noise_ids=ids), clean))
        spread[str(n_views)] = round(float(np.std(values, axis=0).mean()), 4)
    return spread


def accuracies(
    trained: TrainedModel, fit: Pairs, test: Pairs, labels: dict[str, str]
) -> dict[str, float]:
    """What can be read from the codes: accuracies on test images, and their chance levels.

    `noise_id` is what `snr_ray.network.swap.detect` says; `noise_id_from_*` and `class_from_*` are
    linear probes (ridge regression on one-hot labels) fitted on `fit`. Classes are those of
    `labels`, by image id; images without one, and of classes that `fit` lacks, are left out of the
    class probes, which are left out themselves where nothing is left.
    """
    n_ids = len(trained.config.noise.n_views) + 1
    probed = fit.names(fit.sample(IMAGES))
    names = sorted({labels[name] for name in probed if labels.get(name)})
    codes = {name: _codes(trained, pairs, labels, names) for name, pairs in
             (("fit", fit), ("test", test))}  # fmt: skip
    result: dict[str, float] = {}
    detected = [
        detect(trained.model, trained.codes, test.take(test.sample(IMAGES), k)) == k
        for k in range(n_ids)
    ]
    result["noise_id"] = round(float(np.mean(detected)), 4)
    for part in ("noise", "content"):
        what = {"noise_id": n_ids, "class": len(names)}
        for target, count in what.items():
            if count > 1:
                x, y = _of_a_class(codes["fit"], part, target)
                tested, truth = _of_a_class(codes["test"], part, target)
                right = _ridge(x, y, tested, count) == truth
                if len(right):
                    result[f"{target}_from_{part}_code"] = round(float(np.mean(right)), 4)
    result["chance_of_noise_id"] = round(1 / n_ids, 4)
    if len(names) > 1:
        result["chance_of_class"] = round(1 / len(names), 4)
    return result


def _of_a_class(codes: Codes, part: str, target: str) -> tuple[Array, Labels]:
    """Codes of a part of the images that have a class of the target, and these classes."""
    known = codes[target] != NO_CLASS
    return codes[part][known], codes[target][known]


def _ridge(x: Array, y: Labels, tested: Array, count: int) -> Labels:
    """Classes of rows `tested` by ridge regression fitted to rows x with classes y in 0..count."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    # In its dual form: codes are longer than the set.
    scaled = np.c_[(x - mean) / deviation, np.ones(len(x))].astype(np.float64)
    kernel = scaled @ scaled.T + 0.1 * scaled.shape[1] * np.eye(len(x))
    weights = scaled.T @ np.linalg.solve(kernel, np.eye(count)[y])
    return (np.c_[(tested - mean) / deviation, np.ones(len(tested))] @ weights).argmax(1)


@torch.inference_mode()
def _codes(trained: TrainedModel, pairs: Pairs, labels: dict[str, str], names: list[str]) -> Codes:
    """Posterior-mean codes of images, clean and of every noise id: flat noise and content, ids."""
    rows = pairs.sample(IMAGES)
    known = [labels.get(name) for name in pairs.names(rows)]
    classes = np.array([names.index(label) if label in names else NO_CLASS for label in known])
    noise, content, noise_ids = [], [], []
    for noise_id in range(len(trained.config.noise.n_views) + 1):
        images = with_channels(pairs.take(rows, noise_id), trained.model.channels)
        codes = trained.model.encode(torch.from_numpy(images))
        noise.append(torch.cat([level.flatten(1) for level in codes.noise], 1).numpy())
        content.append(torch.cat([level.flatten(1) for level in codes.content], 1).numpy())
        noise_ids.append(np.full(len(rows), noise_id))
    return {
        "noise": np.concatenate(noise),
        "content": np.concatenate(content),
        "noise_id": np.concatenate(noise_ids),
        "class": np.tile(classes, len(noise_ids)),
    }


def injected_or_true(trained: TrainedModel, fit: Pairs, test: Pairs) -> dict[str, float]:
    """Accuracy of a small classifier that tells injected from truly noisy images, per view count.

    It sees both as they are, unclipped, is trained on `fit` and scored on `test`; 0.5 means that
    injection fools it. Half of the images of a set are shown injected, the other half truly noisy,
    so that no image is seen both ways.
    """
    result = {}
    for noise_id, n_views in enumerate(trained.config.noise.n_views, start=1):
        x, y = _mixed(trained, fit, noise_id)
        tested, truth = _mixed(trained, test, noise_id)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trained.config.seed)
            classifier = _train_classifier(x, y)
        with torch.inference_mode():
            right = (classifier(tested)[:, 0] > 0) == (truth > 0.5)
        result[str(n_views)] = round(float(right.float().mean()), 4)
    return result


def _mixed(trained: TrainedModel, pairs: Pairs, noise_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, half of them injected by the hash of their id, and 1 for each injected one."""
    rows = pairs.sample(IMAGES)
    chosen = np.array([hash64(f"injected/{name}") % 2 == 0 for name in pairs.names(rows)])
    noisy = pairs.take(rows, noise_id)
    code = trained.codes.mean(noise_id)
    noisy[chosen] = swap(trained.model, pairs.take(rows[chosen], 0), code)
    x = torch.from_numpy(noisy)
    return x / x.abs().mean(), torch.from_numpy(chosen.astype(np.float32))


def _train_classifier(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    channels = x.shape[1]
    classifier = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for _ in range(CLASSIFIER_STEPS):
        rows = torch.randint(len(x), (CLASSIFIER_BATCH,))
        loss = F.binary_cross_entropy_with_logits(classifier(x[rows])[:, 0], y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier


def uncertainty(trained: TrainedModel, fit: Pairs, test: Pairs) -> dict[str, dict[str, Any]]:
    """How well the spread of posterior samples tells the error of the denoised image.

    Per view count: `scale`, the factor on the standard deviation that makes its mean square on
    `fit` that of the error; `curve`, pairs of (scaled deviation, root mean square error) in
    BINS equally filled bins of test pixels; `correlation` of the two over all test pixels;
    `calibration_error`, the mean over bins of |deviation - error| as a share of the root mean
    square error of all pixels (not of the bin: where a pixel is surely black, both are next to 0).
    """
    result: dict[str, dict[str, Any]] = {}
    for noise_id, n_views in enumerate(trained.config.noise.n_views, start=1):
        deviation, error = _sampled(trained, fit, noise_id)
        scale = float(np.sqrt(np.mean(error**2) / max(float(np.mean(deviation**2)), 1e-12)))
        deviation, error = _sampled(trained, test, noise_id)
        deviation *= scale
        order = np.array_split(np.argsort(deviation), BINS)
        curve: list[tuple[float, float]] = [
            (float(np.sqrt(np.mean(deviation[o] ** 2))), float(np.sqrt(np.mean(error[o] ** 2))))
            for o in order
        ]
        result[str(n_views)] = {
            "scale": round(scale, 3),
            "correlation": round(float(np.corrcoef(deviation, np.abs(error))[0, 1]), 4),
            "calibration_error": round(
                float(np.mean([abs(d - e) for d, e in curve]) / np.sqrt(np.mean(error**2))), 4
            ),
            "curve": [(round(d, 5), round(e, 5)) for d, e in curve],
        }
    return result


def _sampled(trained: TrainedModel, pairs: Pairs, noise_id: int) -> tuple[Array, Array]:
    """Standard deviation over posterior samples and error of their mean, per pixel, flat."""
    rows = pairs.sample(IMAGES // 4)
    generator = torch.Generator().manual_seed(trained.config.seed)
    noisy, ids = pairs.take(rows, noise_id), np.full(len(rows), noise_id)
    drawn = [
        swap(
            trained.model, noisy, trained.codes.mean(0), noise_ids=ids,
            normal=lambda shape: torch.randn(shape, generator=generator),
        ).clip(0, 1)
        for _ in range(SAMPLES)
    ]  # fmt: skip
    error = np.mean(drawn, axis=0) - pairs.take(rows, 0)
    return np.std(drawn, axis=0, ddof=1).ravel(), error.ravel()
