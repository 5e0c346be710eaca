"""snr_ray: sparse-view CT streaks out of image collections, by a hierarchical VAE, on Ray.

The modules form four layers; a module imports only from its own layer or the ones below it.

    0 values   config
    1 arrays   radon  images  sources  metrics  baselines        (NumPy, SciPy, scikit-image)
    2 torch    blocks  hvae  losses  fit  checkpoint  swap       (run without Ray)
    3 ray      cluster  simulate  train  sweep  denoise  evaluate  report  bench  demo  cli
"""

__version__ = "0.1.0"
