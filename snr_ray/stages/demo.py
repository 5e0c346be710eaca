"""The whole pipeline on rendered letters: simulate -> train -> denoise -> evaluate."""

from pathlib import Path

from snr_ray.config import Config
from snr_ray.stages.denoising.denoise import denoise
from snr_ray.stages.evaluation.evaluate import evaluate
from snr_ray.stages.job.connection import connected
from snr_ray.stages.simulation.dataset import Origin
from snr_ray.stages.simulation.simulate import simulate
from snr_ray.stages.training.train import train

INTRODUCTION = """\
snr demo: sparse-view noise out of rendered letters, about 10 minutes on 2 cores.
  1. simulate  draw letters A to J in many fonts; reconstruct each from {views} projections
  2. train     a hierarchical VAE for {steps} steps, the longest part
  3. denoise   clean unseen noisy letters by exchanging their noise code
  4. evaluate  compare with the noisy input, total variation and the linear MMSE estimate
Everything goes to {out}; interrupt at will, the same command continues.
"""


def demo(config: Config, *, out: Path, overwrite: bool = False) -> int:
    """Run all stages on the source `glyphs`. Returns the exit code."""
    views = ", ".join(map(str, config.noise.n_views))
    print(INTRODUCTION.format(views=views, steps=config.train.steps, out=out), flush=True)
    few = min(config.noise.n_views)
    cleaned = out / f"denoised_{few}_views"
    with connected():
        simulate(config, images="glyphs", out=out / "data", overwrite=overwrite)
        train(config, origin=Origin(data=out / "data"), out=out / "run", overwrite=overwrite)
        model = str(out / "run" / "model")
        noisy = f"{out / 'data' / 'test'}#noisy_{few}"
        denoise(config, model=model, images=noisy, out=cleaned, overwrite=overwrite)
        report = out / "evaluation"
        evaluate(config, model=model, images="glyphs", out=report, limit=200, overwrite=overwrite)
    print((report / "metrics.md").read_text())
    print(f"Pictures  {report / 'grid.png'}\n          {cleaned / 'report.html'}")
    print(f"Model     {out / 'run' / 'model'}")
    return 0
