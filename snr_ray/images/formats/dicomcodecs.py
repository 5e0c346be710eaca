"""Compressed DICOM frames -> stored pixels by imagecodecs, as a plugin of pydicom.

JPEG (lossy and lossless), JPEG-LS, JPEG 2000 and its high-throughput form; pydicom itself knows
RLE.
"""

import imagecodecs
import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder, DecodeRunner

LABEL = "imagecodecs"
CODECS = {
    uid.JPEGBaseline8Bit: imagecodecs.jpeg_decode,
    uid.JPEGExtended12Bit: imagecodecs.jpeg_decode,
    uid.JPEGLossless: imagecodecs.jpeg_decode,
    uid.JPEGLosslessSV1: imagecodecs.jpeg_decode,
    uid.JPEGLSLossless: imagecodecs.jpegls_decode,
    uid.JPEGLSNearLossless: imagecodecs.jpegls_decode,
    uid.JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    uid.JPEG2000: imagecodecs.jpeg2k_decode,
    uid.HTJ2KLossless: imagecodecs.jpeg2k_decode,
    uid.HTJ2KLosslessRPCL: imagecodecs.jpeg2k_decode,
    uid.HTJ2K: imagecodecs.jpeg2k_decode,
}
DECODER_DEPENDENCIES = dict.fromkeys(CODECS, ("numpy", "imagecodecs"))


def is_available(syntax: str) -> bool:
    """Whether a transfer syntax can be decoded; part of pydicom's plugin interface."""
    return syntax in CODECS


def decode_frame(data: bytes, runner: DecodeRunner) -> bytearray:
    """One frame as little-endian bytes of 8 or 16 bits a pixel; of pydicom's plugin interface."""
    pixels = np.asarray(CODECS[runner.transfer_syntax](data))
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    return bytearray(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes())


def register() -> None:
    """Tell pydicom; once for a process."""
    for syntax in CODECS:
        decoder: Decoder = get_decoder(syntax)
        if LABEL not in decoder.available_plugins:
            decoder.add_plugin(LABEL, (__name__, "decode_frame"))
