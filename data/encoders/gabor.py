"""The built-in encoder `gabor`: a Gabor pyramid and texture statistics, no weights, nothing to download.

An image becomes 12 feature maps of 16 x 16 places at each of four depths:

1. fine energies: amplitude at 32 and 21 cycles per image, 6 orientations;
2. middle energies: amplitude at 14 and 9 cycles per image, 6 orientations;
3. coarse energies (5 cycles per image) and colour: luminance, red-green, blue-yellow, contrast of both, saturation;
4. second order, over 5 x 5 places: contrast of the amplitude and share of the spectrum at 4 frequencies, orientation
   (cos 2a, sin 2a, cos 4a), correlation of colour with luminance.

The amplitude is the modulus of the analytic signal, that is of a quadrature pair of Gabor filters: it doesn't depend
on the phase. A patch token is the 2 x 2 places of its patch times the 12 maps; the CLS token is mean, centre-weighted
mean, standard deviation and maximum of the 12 maps over the image. Amplitudes are compressed by `log(1 + a / a0)`, so
that tokens are of unit scale and lose nothing that matters in float16.
"""

import math
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float32, UInt8
from PIL import Image
from scipy import fft
from scipy.ndimage import uniform_filter1d

from data.encoders.base import Tokens

_DEPTHS = (1, 2, 3, 4)
_SIZE = 128
_MARGIN = 32
_MAPS = 12
_POSITIONS = 16
_GRID = 8
_FREQUENCIES = (32.0, 21.0, 14.0, 9.0, 5.0)
_N_ORIENTATIONS = 6
_BANDWIDTH = 0.3
_AMPLITUDE_UNIT = 0.02
_BATCH = 32


class GaborEncoder:
    """Deterministic tokens of an image from a fixed filter bank.

    Parameters
    ----------
    depths : which of the four depths to give, 1 (fine energies) to 4 (second-order texture), in rising order.

    Raises
    ------
    ValueError
        If a depth doesn't exist, comes twice or out of order, or none is asked for.
    """

    name = "gabor"

    def __init__(self, *, depths: tuple[int, ...] = _DEPTHS) -> None:
        depths = tuple(depths)
        if not depths or not set(depths) <= set(_DEPTHS) or list(depths) != sorted(set(depths)):
            raise ValueError(
                f"the gabor encoder has depths {_DEPTHS}, not {depths}; give some of them, each once and rising"
            )
        self.depths = depths
        self.width = 4 * _MAPS
        self.grid = (_GRID, _GRID)
        self._bank = _filter_bank()

    def spec(self) -> dict[str, Any]:
        """Everything that decides the tokens."""
        return {
            "name": self.name,
            "version": 1,
            "depths": list(self.depths),
            "width": self.width,
            "grid": list(self.grid),
            "size": _SIZE,
            "frequencies": list(_FREQUENCIES),
            "n_orientations": _N_ORIENTATIONS,
            "bandwidth": _BANDWIDTH,
            "amplitude_unit": _AMPLITUDE_UNIT,
        }

    def provenance(self) -> dict[str, Any]:
        """Return the libraries that compute the tokens."""
        return {"numpy": np.__version__, "scipy": scipy.__version__}

    def encode(self, images: UInt8[np.ndarray, "image height width 3"]) -> Tokens:
        """Tokens of RGB images of any one size.

        Returns
        -------
        Tokens
            float32; `cls` (image, depth, 48) and `patch` (image, depth, 64, 48), patches row by row from the top left.
        """
        cls = np.empty((len(images), len(self.depths), self.width), np.float32)
        patch = np.empty((len(images), len(self.depths), _GRID * _GRID, self.width), np.float32)
        for start in range(0, len(images), _BATCH):
            maps = self._maps(_resized(images[start : start + _BATCH]))
            for place, depth in enumerate(self.depths):
                cls[start : start + _BATCH, place] = _cls_token(maps[depth])
                patch[start : start + _BATCH, place] = _patch_tokens(maps[depth])
        return Tokens(cls=cls, patch=patch)

    def _maps(self, images: UInt8[np.ndarray, "image 128 128 3"]) -> dict[int, Float32[np.ndarray, "image 12 16 16"]]:
        red, green, blue = (np.float32(1 / 255) * images[..., channel] for channel in range(3))
        luminance = (red + green + blue) / 3
        opponent = np.stack([red - green, blue - (red + green) / 2], axis=1)

        amplitude = self._amplitudes(luminance)
        compressed = np.log1p(amplitude / _AMPLITUDE_UNIT)
        fine, mid, coarse = _joined(compressed[:, 0:2]), _joined(compressed[:, 2:4]), compressed[:, 4]

        means = _pool(np.concatenate([luminance[:, None], opponent], axis=1))
        spread = np.sqrt(np.maximum(_pool(opponent**2) - means[:, 1:] ** 2, 0))
        brightest, darkest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
        saturation = _pool((brightest - darkest)[:, None])
        colour = [4 * (means[:, :1] - 0.45), 5 * means[:, 1:], np.log1p(spread / _AMPLITUDE_UNIT), 4 * saturation]
        third = np.concatenate([coarse, *colour], axis=1)
        return {1: fine, 2: mid, 3: third, 4: _second_order(amplitude[:, :4], means)}

    def _amplitudes(
        self, luminance: Float32[np.ndarray, "image 128 128"]
    ) -> Float32[np.ndarray, "image frequency orientation 16 16"]:
        spectrum = fft.fft2(luminance - luminance.mean(axis=(1, 2), keepdims=True))
        # Centred, and wide enough that a window around any passband is one slice.
        spectrum = np.pad(fft.fftshift(spectrum, axes=(1, 2)), ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
        bands = []
        for top, left, gain in self._bank:
            side = len(gain)
            # Only the passband goes back, onto a coarser grid: the modulus doesn't see the shift of frequency.
            signal = fft.ifft2(spectrum[:, top : top + side, left : left + side] * gain)
            bands.append(_pool(np.abs(np.asarray(signal))) * np.float32((side / _SIZE) ** 2))
        return np.stack(bands, axis=1).reshape(-1, len(_FREQUENCIES), _N_ORIENTATIONS, _POSITIONS, _POSITIONS)


def _resized(images: UInt8[np.ndarray, "image height width 3"]) -> UInt8[np.ndarray, "image 128 128 3"]:
    if images.shape[1:3] == (_SIZE, _SIZE):
        return images
    resize = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(image).resize((_SIZE, _SIZE), resize)) for image in images])


def _filter_bank() -> list[tuple[int, int, Float32[np.ndarray, "side side"]]]:
    """For each filter, frequencies outermost: first row and column of its window in the padded spectrum, gain there."""
    bank = []
    for frequency in _FREQUENCIES:
        sigma = _BANDWIDTH * frequency
        side = _POSITIONS * 2 ** max(1, math.ceil(math.log2(5 * sigma / _POSITIONS)))
        for orientation in range(_N_ORIENTATIONS):
            angle = math.pi * orientation / _N_ORIENTATIONS
            centre_y, centre_x = frequency * math.sin(angle), frequency * math.cos(angle)
            first_y, first_x = round(centre_y) - side // 2, round(centre_x) - side // 2
            fy, fx = np.arange(first_y, first_y + side)[:, None], np.arange(first_x, first_x + side)[None, :]
            gain = 2 * np.exp(-((fy - centre_y) ** 2 + (fx - centre_x) ** 2) / (2 * sigma**2))
            zero = _MARGIN + _SIZE // 2
            bank.append((zero + first_y, zero + first_x, gain.astype(np.float32)))
    return bank


def _joined(maps: Float32[np.ndarray, "image frequency orientation 16 16"]) -> Float32[np.ndarray, "image map 16 16"]:
    return maps.reshape(len(maps), -1, _POSITIONS, _POSITIONS)


def _pool(maps: Float32[np.ndarray, "*map side side"]) -> Float32[np.ndarray, "*map 16 16"]:
    block = maps.shape[-1] // _POSITIONS
    rows = maps.reshape(*maps.shape[:-2], _POSITIONS, block, maps.shape[-1]).mean(axis=-2)
    return rows.reshape(*rows.shape[:-1], _POSITIONS, block).mean(axis=-1)


def _second_order(
    amplitude: Float32[np.ndarray, "image 4 orientation 16 16"], means: Float32[np.ndarray, "image 3 16 16"]
) -> Float32[np.ndarray, "image 12 16 16"]:
    total = amplitude.sum(axis=2)
    local = _neighbourhood(total)
    contrast = np.sqrt(np.maximum(_neighbourhood(total**2) - local**2, 0)) / (local + _AMPLITUDE_UNIT)
    share = local / (local.sum(axis=1, keepdims=True) + _AMPLITUDE_UNIT)

    angles = np.arange(_N_ORIENTATIONS, dtype=np.float32) * np.float32(np.pi / _N_ORIENTATIONS)
    waves = np.stack([np.cos(2 * angles), np.sin(2 * angles), np.cos(4 * angles)])
    by_orientation = _neighbourhood(amplitude.sum(axis=1))
    direction = np.einsum("ko,nohw->nkhw", waves, by_orientation)
    direction /= by_orientation.sum(axis=1, keepdims=True) + _AMPLITUDE_UNIT

    chroma, luminance = means[:, 1:2] - means[:, 2:3], means[:, :1]
    covariance = _neighbourhood(chroma * luminance) - _neighbourhood(chroma) * _neighbourhood(luminance)
    covariance /= np.sqrt(_neighbourhood(chroma**2) * _neighbourhood(luminance**2)) + _AMPLITUDE_UNIT
    return np.concatenate([2 * contrast, 4 * share, 3 * direction, 4 * covariance], axis=1)


def _neighbourhood(maps: Float32[np.ndarray, "image map 16 16"]) -> Float32[np.ndarray, "image map 16 16"]:
    """Mean over 5 x 5 positions, mirrored at the border."""
    return uniform_filter1d(uniform_filter1d(maps, 5, axis=-1), 5, axis=-2)


def _patch_tokens(maps: Float32[np.ndarray, "image 12 16 16"]) -> Float32[np.ndarray, "image 64 48"]:
    block = _POSITIONS // _GRID
    split = maps.reshape(len(maps), _MAPS, _GRID, block, _GRID, block)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(len(maps), _GRID * _GRID, -1)


def _cls_token(maps: Float32[np.ndarray, "image 12 16 16"]) -> Float32[np.ndarray, "image 48"]:
    places = np.linspace(-1, 1, _POSITIONS, dtype=np.float32)
    window = np.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * 0.4**2))
    centre = (maps * (window / window.sum())).sum(axis=(2, 3))
    return np.concatenate([maps.mean(axis=(2, 3)), centre, maps.std(axis=(2, 3)), maps.max(axis=(2, 3))], axis=1)
