"""snr_ray: sparse-view CT streaks out of image collections, by a hierarchical VAE, on Ray."""

__version__ = "0.1.0"
