"""snr_ray: sparse-view CT streaks out of image collections, by a hierarchical VAE, on Ray.

For Python: `load_model(name_or_folder)`, `denoise(images, model)` on arrays, `add_noise(images,
n_views)`, `NoiseSpec`; see `snr_ray.notebook`. For a shell or a cluster: `snr --help`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snr_ray.notebook import NoiseSpec, add_noise, denoise, load_model

__version__ = "0.1.0"
__all__ = ["NoiseSpec", "__version__", "add_noise", "denoise", "load_model"]


def __getattr__(name: str) -> Any:
    """The front door, opened where it is used: `snr --help` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'snr_ray' has no attribute {name!r}")
    from snr_ray import notebook

    return getattr(notebook, name)
