"""snr_ray: sparse-view CT streaks out of image collections, by a hierarchical VAE, on Ray.

The modules form four layers; a module imports only from its own layer or the ones below it.

    0 values   config  configfile  hashing  outputs
    1 arrays   rows  radon  images  samples  collection  files  sources  datafolder
               metrics  baselines  lmmse
    2 torch    torchradon  noisemaker  physics  blocks  hvae  unet  batches  shardfeed  losses
               muon  fit  checkpoint  swap  fileswap  scores  probes
    3 ray      cluster  simulate  dataset  train  sweep  denoise  evaluate  report  bench  benchjob
               demo  cli

Layers 1 and 2 run without Ray: in a notebook, in tests, on a lone GPU machine.
"""

__version__ = "0.1.0"
