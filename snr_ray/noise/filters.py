"""The filter of filtered back projection, on blocks of sinograms."""

import functools

import numpy as np
import numpy.typing as npt
from numpy import fft  # SciPy's takes each process of a job 0.15 s to import

from snr_ray.noise.sums import Block

DENSE_BINS = 1024
"""Up to so many bins a view's filter is a dense product, above by way of its spectrum."""
SPECTRUM_BYTES = 32 * 2**20
"""Memory for spectra, about."""


@functools.lru_cache(maxsize=64)
def response(n_bins: int, name: str) -> npt.NDArray[np.float64]:
    """The filter [size] over frequencies of a view with zeros behind its bins.

    Source: Kak and Slaney, Principles of Computerized Tomographic Imaging (1988), chapter 3,
    equation 61: the ramp is transformed from its spatial form, which removes a small bias.
    """
    size = max(64, 2 ** int(np.ceil(np.log2(2 * n_bins))))
    odd = np.concatenate([np.arange(1, size / 2 + 1, 2), np.arange(size / 2 - 1, 0, -2)])
    kernel = np.zeros(size)
    kernel[0] = 0.25
    kernel[1::2] = -1 / (np.pi * odd) ** 2
    response = 2 * np.real(fft.fft(kernel))  # the ramp
    if name == "shepp-logan":
        omega = np.pi * fft.fftfreq(size)[1:]
        response[1:] *= np.sin(omega) / omega
    elif name == "cosine":
        response *= fft.fftshift(np.sin(np.linspace(0, np.pi, size, endpoint=False)))
    elif name == "hamming":
        response *= fft.fftshift(np.hamming(size))
    elif name == "hann":
        response *= fft.fftshift(np.hanning(size))
    elif name == "none":
        response[:] = 1
    return (response + np.roll(response[::-1], 1)) / 2  # what makes a real view real


@functools.lru_cache(maxsize=16)
def matrix(n_bins: int, name: str) -> Block:
    """The same as a matrix [N, N] on bins; symmetric, because the filter is real."""
    spectrum = response(n_bins, name)
    impulse = fft.ifft(spectrum).real  # the filter is a circular convolution
    bins = np.arange(n_bins)
    return impulse[(bins[:, None] - bins) % len(spectrum)].astype(np.float32)


def filtered(
    sinogram: npt.NDArray[np.floating], name: str, out: npt.NDArray[np.floating]
) -> npt.NDArray[np.floating]:
    """Sinograms [A, N, B] filtered along N, written to `out`. This is its own transpose."""
    n_views, n_bins, n_images = sinogram.shape
    if n_bins <= DENSE_BINS and sinogram.dtype == np.float32:
        kernel = matrix(n_bins, name)
        if n_images == 1:
            np.matmul(sinogram[..., 0], kernel, out=out[..., 0])
        else:
            np.matmul(kernel, sinogram, out=out)
        return out
    spectrum = response(n_bins, name)
    size = len(spectrum)
    gain = spectrum[: size // 2 + 1, None].astype(sinogram.dtype)
    together = max(1, SPECTRUM_BYTES // (2 * sinogram.itemsize * size * n_images))
    for k in range(0, n_views, together):
        waves = fft.rfft(sinogram[k : k + together], size, axis=1)
        waves *= gain
        out[k : k + together] = fft.irfft(waves, size, axis=1)[:, :n_bins]
    return out
