"""What the phantom's voxels do when an image is shown: the signal without noise, and the noise.

Symbols: `E` normalised energy, `G` a voxel's Gaussian receptive field, `w` its weights over the common early
profiles, `T` its tuning to categories and scenes, `g` its share of content.

Early drive. A quadrature Gabor pyramid (6, 11.5, 18 and 27 cycles per image, 8 orientations from 11.25 degrees on:
not those of the `gabor` encoder) gives amplitudes `A_c`; divisive normalisation (Heeger 1992) makes `E_c = A_c^2 /
(s^2 + <A^2>)`, with `<>` the mean over channels and neighbouring places; two colour channels are normalised likewise.
Profiles common to all subjects, bumps over frequency and orientation, sum the channels; a voxel weights the profiles
and sums them over its receptive field, compressed (Kay et al. 2013): `(sum_k w_k sum_xy G E_k)^0.7`.

Content drive. Objects drive a voxel by visible area and place, and compete: `sum_o T[category] a_o G_o / (c + sum_o
a_o G_o)`; the scene adds `T[scene]`. All subjects' tunings `T` lie in one space of 8 dimensions; each subject mixes
it anew.

Signal. `(1 - g) z(early) + g z(content)`, standardised per voxel over the subject's images; `g` rises smoothly from 0
in V1 to V3 to 1 at the end of the streams.

Noise. White, of a few spatial components, and slow drift, in known shares. In units of the signal's standard
deviation its standard deviation is 1 / NCSNR.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from scipy import fft
from scipy.ndimage import uniform_filter1d

from data.phantom.cortex import Cortex, smooth_fields
from data.phantom.images import IMAGE_SIZE, ImageLabels

_FREQUENCIES = (6.0, 11.5, 18.0, 27.0)
_N_ORIENTATIONS = 8
_FIRST_ANGLE_DEG = 11.25
_BANDWIDTH = 0.25
_PLACES = 32
_POOL = 9
_SEMISATURATION = 0.01
_COLOUR_SEMISATURATION = 0.08
_COMPRESSION = 0.7
_N_PROFILES = 10
_N_CONTENT_AXES = 8
_AREA_HALF = 0.03
_COMPETITION = 0.15
_SCENE_WEIGHT = 0.28
_CONTENT_FROM, _CONTENT_TO = 0.36, 0.72
_BATCH = 32
_N_COMPONENTS = 6
_SPATIAL_SHARE = 0.2
_DRIFT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class CommonTuning:
    """What all subjects share.

    Attributes
    ----------
    profiles : weights of the early channels (frequencies outermost, then red-green and blue-yellow), rows sum to 1.
    axes : orthonormal directions in the space of categories followed by scenes; None without labels.
    """

    profiles: Float[np.ndarray, "profile channel"]
    axes: Float[np.ndarray, "axis content"] | None


@dataclass(frozen=True, kw_only=True)
class Population:
    """The voxels of one subject and their tuning.

    Attributes
    ----------
    early : weights `w` over the common profiles, rows sum to 1.
    content : tuning `T` over categories followed by scenes; no columns without labels.
    content_share : `g`.
    ncsnr : standard deviation of the signal over that of the noise.
    amplitude, baseline : standard deviation of the signal and mean response, in percent signal change.
    """

    cortex: Cortex
    early: Float[np.ndarray, "voxel profile"]
    content: Float[np.ndarray, "voxel content"]
    content_share: Float[np.ndarray, " voxel"]
    ncsnr: Float[np.ndarray, " voxel"]
    amplitude: Float[np.ndarray, " voxel"]
    baseline: Float[np.ndarray, " voxel"]


def draw_common_tuning(n_content: int, *, rng: np.random.Generator) -> CommonTuning:
    """Draw the tuning space; `n_content` counts categories and scenes, 0 for images without labels."""
    angles = np.pi * np.arange(_N_ORIENTATIONS) / _N_ORIENTATIONS
    octave = np.log2(_FREQUENCIES)
    profiles = []
    for _ in range(_N_PROFILES):
        near_frequency = np.exp(-0.5 * ((octave - rng.uniform(octave[0], octave[-1])) / 0.5) ** 2)
        near_angle = np.exp(1.5 * (np.cos(2 * (angles - rng.uniform(0, np.pi))) - 1))
        bump = np.outer(near_frequency, near_angle).ravel()
        profiles.append(np.concatenate([bump / bump.sum(), [0, 0]]))
    colour = np.zeros((2, len(profiles[0])))
    colour[[0, 1], [-2, -1]] = 1
    axes = None
    if n_content:
        directions, _ = np.linalg.qr(rng.standard_normal((n_content, n_content)))
        axes = directions[: min(_N_CONTENT_AXES, n_content)]
    return CommonTuning(profiles=np.concatenate([profiles, colour]), axes=axes)


def draw_population(cortex: Cortex, common: CommonTuning, *, rng: np.random.Generator) -> Population:
    """Mix the common tuning anew, smoothly over this subject's cortex, and draw how reliable its voxels are."""
    n_voxels, n_profiles = len(cortex.hierarchy), len(common.profiles)
    preference = smooth_fields(cortex.sheet, n_profiles, length=0.12, rng=rng)
    preference += 0.4 * rng.standard_normal((n_voxels, n_profiles))
    early = np.exp(2.0 * preference)
    early /= early.sum(axis=1, keepdims=True)

    content, content_share = np.zeros((n_voxels, 0)), np.zeros(n_voxels)
    if common.axes is not None:
        mixing, _ = np.linalg.qr(rng.standard_normal((len(common.axes),) * 2))
        weights = smooth_fields(cortex.sheet, len(common.axes), length=0.12, rng=rng)
        weights += 0.4 * rng.standard_normal(weights.shape)
        content = weights @ mixing @ common.axes
        rise = np.clip((cortex.hierarchy - _CONTENT_FROM) / (_CONTENT_TO - _CONTENT_FROM), 0, 1)
        content_share = rise**2 * (3 - 2 * rise)

    reliability = 0.75 * smooth_fields(cortex.sheet, 1, length=0.2, rng=rng)[:, 0]
    reliability += 0.65 * rng.standard_normal(n_voxels)
    return Population(
        cortex=cortex,
        early=early,
        content=content,
        content_share=content_share,
        ncsnr=np.clip(0.5 * np.exp(0.55 * reliability), 0.08, 1.6),
        amplitude=0.8 * np.exp(0.3 * rng.standard_normal(n_voxels)),
        baseline=rng.normal(0.6, 0.6, n_voxels),
    )


def energy_maps(
    pixels: UInt8[np.ndarray, "image 128 128 3"], common: CommonTuning
) -> Float32[np.ndarray, "image profile place"]:
    """Normalised energy `E` of each profile at 32 x 32 places, row by row."""
    filters = _filters()
    profiles = common.profiles.astype(np.float32)
    maps = np.empty((len(pixels), len(profiles), _PLACES**2), np.float32)
    for start in range(0, len(pixels), _BATCH):
        red, green, blue = (np.float32(1 / 255) * pixels[start : start + _BATCH, ..., channel] for channel in range(3))
        squared = _squared_amplitudes((red + green + blue) / 3, filters)
        pool = _blur(squared.mean(axis=1, keepdims=True))
        channels = [squared / (np.float32(_SEMISATURATION**2) + pool)]
        for opponent in (red - green, blue - (red + green) / 2):
            local = _shrink(opponent[:, None])
            local = (local - local.mean(axis=(2, 3), keepdims=True)) ** 2
            channels.append(local / (np.float32(_COLOUR_SEMISATURATION**2) + _blur(local)))
        stacked = np.concatenate(channels, axis=1).reshape(len(red), -1, _PLACES**2)
        maps[start : start + _BATCH] = profiles @ stacked
    return maps


def early_drive(
    maps: Float32[np.ndarray, "image profile place"], population: Population
) -> Float[np.ndarray, "image voxel"]:
    """Energy within each voxel's receptive field, by its weights over the profiles."""
    centres = (np.arange(_PLACES) + 0.5) / _PLACES
    x, y, size = population.cortex.receptive_field.T
    across = np.exp(-0.5 * ((centres[:, None] - x) / size) ** 2)
    down = np.exp(-0.5 * ((centres[:, None] - y) / size) ** 2)
    field = (down[:, None] * across[None, :]).reshape(_PLACES**2, -1)
    field /= field.sum(axis=0)
    drive = np.zeros((len(maps), len(x)))
    for profile in range(maps.shape[1]):
        # In double precision, so that the order of summation never shows in the rounded responses.
        drive += (maps[:, profile].astype(np.float64) @ field) * population.early[:, profile]
    return drive**_COMPRESSION


def content_drive(labels: ImageLabels, population: Population) -> Float[np.ndarray, "image voxel"]:
    """Response to what is in the image: objects, tolerant of their place within a wide field, and the scene."""
    objects = labels.objects
    x, y, size = population.cortex.receptive_field.T
    distance2 = (objects.x[:, None] - x) ** 2 + (objects.y[:, None] - y) ** 2
    area = labels.visible_area / (labels.visible_area + _AREA_HALF)
    strength = area[:, None] * np.exp(-0.5 * distance2 / size**2)
    total = _sum_by_image(strength, objects.image, len(labels.scene))
    driven = _sum_by_image(strength * population.content.T[objects.category], objects.image, len(labels.scene))
    scene = population.content.T[len(labels.category_names) + labels.scene]
    return driven / (_COMPETITION + total) + _SCENE_WEIGHT * scene


def noise_free_signal(
    maps: Float32[np.ndarray, "image profile place"], labels: ImageLabels | None, population: Population
) -> Float[np.ndarray, "image voxel"]:
    """Each voxel's response to each image, of zero mean and unit variance over the images given."""
    share = population.content_share
    signal = (1 - share) * _standardised(early_drive(maps, population))
    if labels is not None:
        signal += share * _standardised(content_drive(labels, population))
    return _standardised(signal)


def draw_noise(
    session: Int[np.ndarray, " trial"], cortex: Cortex, *, rng: np.random.Generator
) -> Float[np.ndarray, "trial voxel"]:
    """Noise of unit variance in expectation.

    It is white noise, spatial components that change from trial to trial, and drift within each session.
    """
    n_trials, n_voxels = len(session), len(cortex.hierarchy)
    loading = smooth_fields(cortex.sheet, 2 * _N_COMPONENTS, length=0.3, rng=rng)
    spatial, drifting = loading[:, :_N_COMPONENTS], loading[:, _N_COMPONENTS:]
    spatial = spatial / np.linalg.norm(spatial, axis=1, keepdims=True)
    drifting = drifting / np.linalg.norm(drifting, axis=1, keepdims=True)
    drift = np.empty((n_trials, _N_COMPONENTS))
    for index in np.unique(session):
        here = np.flatnonzero(session == index)
        time = (np.arange(len(here)) + 0.5) / len(here)
        cycles, phase = rng.uniform(0.5, 2.0, _N_COMPONENTS), rng.uniform(0, 2 * np.pi, _N_COMPONENTS)
        wave = np.sin(2 * np.pi * cycles * time[:, None] + phase)
        drift[here] = _standardised(wave)
    white = rng.standard_normal((n_trials, n_voxels))
    return (
        np.sqrt(1 - _SPATIAL_SHARE - _DRIFT_SHARE) * white
        + np.sqrt(_SPATIAL_SHARE) * rng.standard_normal((n_trials, _N_COMPONENTS)) @ spatial.T
        + np.sqrt(_DRIFT_SHARE) * drift @ drifting.T
    )


def _standardised(values: Float[np.ndarray, "image voxel"]) -> Float[np.ndarray, "image voxel"]:
    deviation = values.std(axis=0)
    # A voxel that sees no difference between the images has no signal, not an infinite one.
    return (values - values.mean(axis=0)) / np.where(deviation > 0, deviation, 1)


def _sum_by_image(values: Float[np.ndarray, "object voxel"], image: np.ndarray, n_images: int) -> np.ndarray:
    total = np.zeros((n_images, values.shape[1]))
    np.add.at(total, image, values)
    return total


def _filters() -> list[tuple[int, int, Float32[np.ndarray, "64 64"]]]:
    """For each filter: first row and column in the padded spectrum of a window around its passband, gain there."""
    bank = []
    for frequency in _FREQUENCIES:
        for orientation in range(_N_ORIENTATIONS):
            angle = np.deg2rad(_FIRST_ANGLE_DEG) + np.pi * orientation / _N_ORIENTATIONS
            centre = frequency * np.array([np.sin(angle), np.cos(angle)])
            first = np.round(centre).astype(int) - _PLACES
            fy, fx = (first[axis] + np.arange(2 * _PLACES) - centre[axis] for axis in (0, 1))
            gain = 2 * np.exp(-(fy[:, None] ** 2 + fx[None, :] ** 2) / (2 * (_BANDWIDTH * frequency) ** 2))
            bank.append((IMAGE_SIZE + int(first[0]), IMAGE_SIZE + int(first[1]), gain.astype(np.float32)))
    return bank


def _squared_amplitudes(
    luminance: Float32[np.ndarray, "image 128 128"], filters: list[tuple[int, int, Float32[np.ndarray, "64 64"]]]
) -> Float32[np.ndarray, "image channel 32 32"]:
    spectrum = fft.fftshift(fft.fft2(luminance - luminance.mean(axis=(1, 2), keepdims=True)), axes=(1, 2))
    half = IMAGE_SIZE // 2
    spectrum = np.pad(spectrum, ((0, 0), (half, half), (half, half)))
    bands = []
    for top, left, gain in filters:
        # Only the passband goes back, onto a coarse grid: the modulus doesn't see the shift of frequency.
        window = spectrum[:, top : top + 2 * _PLACES, left : left + 2 * _PLACES] * gain
        bands.append(_shrink(np.abs(np.asarray(fft.ifft2(window))) ** 2))
    return np.stack(bands, axis=1) * np.float32((2 * _PLACES / IMAGE_SIZE) ** 4)


def _shrink(maps: Float32[np.ndarray, "*map side side"]) -> Float32[np.ndarray, "*map 32 32"]:
    block = maps.shape[-1] // _PLACES
    rows = maps.reshape(*maps.shape[:-2], _PLACES, block, maps.shape[-1]).mean(axis=-2)
    return rows.reshape(*rows.shape[:-1], _PLACES, block).mean(axis=-1)


def _blur(maps: Float32[np.ndarray, "image map 32 32"]) -> Float32[np.ndarray, "image map 32 32"]:
    return uniform_filter1d(uniform_filter1d(maps, _POOL, axis=-1), _POOL, axis=-2)
