"""The kernels for a GPU, run by Triton's interpreter where there is none: equal to the loops."""

import importlib.util
import subprocess
import sys

import pytest

CODE = """
import numpy as np, torch
from snr_ray.noise.kernels import times, transposed
from snr_ray.noise.operator import NoiseSpec, RadonNoise
device = "cuda" if torch.cuda.is_available() else "cpu"
for height, width, filter, angle_range, counts in (
    (12, 15, "ramp", 180.0, (7, 0, 5)), (8, 8, "hann", 100.0, (3, 3)),
):
    x = np.random.default_rng(0).random((len(counts), height, width), np.float32)
    bounds = min(n for n in counts if n), max(counts)  # a table of all counts, one of a single
    n_views = torch.tensor(counts, device=device)
    made = [f(torch.from_numpy(x).to(device), n_views, *bounds, filter, angle_range)
            for f in (times, transposed)]
    for k, n in enumerate(counts):
        expected = [x[k], x[k]]
        if n:
            noise = RadonNoise(NoiseSpec(n, filter, angle_range), height, width)
            expected = [noise.times(x[k]), noise.transposed(x[k])]
        for a, b in zip(made, expected):
            off = np.abs(a[k].cpu().numpy() - b).max()
            assert off < 2e-5, (height, n, off)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_equal_the_loops_at_the_view_count_of_each_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
