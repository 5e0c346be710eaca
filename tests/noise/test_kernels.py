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
for height, width, spec in ((12, 15, NoiseSpec(7)), (8, 8, NoiseSpec(5, "hann", 100.0))):
    noise = RadonNoise(spec, height, width)
    x = np.random.default_rng(0).random((3, height, width), np.float32)
    there, back = (f(noise, torch.from_numpy(x).to(device)).cpu().numpy()
                   for f in (times, transposed))
    print(np.abs(there - noise.times(x)).max(), np.abs(back - noise.transposed(x)).max())
    assert np.abs(there - noise.times(x)).max() < 2e-5
    assert np.abs(back - noise.transposed(x)).max() < 2e-5
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_equal_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
