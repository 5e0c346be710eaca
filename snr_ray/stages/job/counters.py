"""What a job tells Prometheus through Ray: images, bytes, training and trials.

Every node of a Ray cluster serves these beside Ray's own figures; cluster/prometheus.yml scrapes
them and cluster/grafana.json draws them. Without a scraper they cost nothing that is felt.
"""

import functools

from ray.util.metrics import Counter, Gauge

IMAGES = "snr_images"
BYTES = "snr_bytes"
STEP = "snr_training_step"
RATE = "snr_training_images_per_second"
TRIALS = "snr_trials"


def count_images(
    stage: str, *, read: int = 0, done: int = 0, failed: int = 0, doubtful: int = 0
) -> None:
    """Add images of a stage: read by tasks, done, failed, done but doubtful."""
    for outcome, number in (
        ("read", read), ("done", done), ("failed", failed), ("doubtful", doubtful),
    ):  # fmt: skip
        if number:
            _images().inc(number, {"stage": stage, "outcome": outcome})


def count_bytes(stage: str, *, read: int = 0, written: int = 0) -> None:
    """Add bytes of files that a stage read and wrote."""
    for way, number in (("read", read), ("written", written)):
        if number:
            _bytes().inc(number, {"stage": stage, "way": way})


def show_training(run: str, step: int, images_per_s: float) -> None:
    """Where a run is: its step, and the clean images that all workers take together per second."""
    _gauge(STEP, "Step of a training run", "run").set(step, {"run": run})
    _gauge(RATE, "Clean images per second of a training run", "run").set(images_per_s, {"run": run})


def show_trials(**states: int) -> None:
    """Trials of a sweep by state: running, finished, failed."""
    for state, number in states.items():
        _gauge(TRIALS, "Trials of a sweep", "state").set(number, {"state": state})


@functools.cache
def _images() -> Counter:
    return Counter(IMAGES, "Images of a stage by what became of them", ("stage", "outcome"))


@functools.cache
def _bytes() -> Counter:
    return Counter(BYTES, "Bytes of files that a stage read and wrote", ("stage", "way"))


@functools.cache
def _gauge(name: str, description: str, key: str) -> Gauge:
    return Gauge(name, description, (key,))
