"""An encoder's own preprocessing: resize, crop, rescale and normalise as its configuration says.

`transformers` has each processor twice, and which one it takes depends on whether torchvision is installed; their
numbers differ slightly. Ours are those of the Pillow one wherever it runs. DINOv3's exists for torchvision only, and
resizes after rescaling, in floating point: that is what torchvision itself hands to `torch`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image

from data.encoders.hub import Location

# What changes the numbers; the rest of a processor's description varies with the version of `transformers`.
SETTINGS = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("processor", "max_num_patches", "patch_size"),
)
_STEPS = ("_preprocess", "process_image", "resize", "center_crop", "rescale", "normalize")
_TORCH_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
_DINOV3 = "DINOv3ViTImageProcessor"
_DINOV3_DEFAULTS = {
    **dict(do_resize=True, size={"height": 224, "width": 224}, resample=2),
    **dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True),
    **dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
}

Inputs = dict[str, torch.Tensor]
"""What a model's forward takes, image first."""


class Preprocessing:
    """The preprocessing that comes with an encoder.

    Attributes
    ----------
    processor : name of the class in `transformers` that does the same.
    settings : all that changes its numbers, as JSON; the class is named unless it is the plain resize, crop, rescale,
        normalise.
    """

    def __init__(self, location: Location) -> None:
        self.processor, settings, self._run = _load(location)
        self.settings: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value
            for key in SETTINGS
            if (value := settings.get(key)) is not None
        }

    def __call__(self, images: UInt8[np.ndarray, "image height width 3"]) -> Inputs:
        """Return the encoder's inputs of `images`; ``pixel_values`` among them, float32."""
        return self._run(images)


def _load(location: Location) -> tuple[str, dict[str, Any], Callable[[np.ndarray], Inputs]]:
    from transformers import AutoImageProcessor
    from transformers.image_processing_backends import PilBackend
    from transformers.image_processing_base import ImageProcessingMixin

    found, _ = ImageProcessingMixin.get_image_processor_dict(location.source, **location.arguments())
    if str(found.get("image_processor_type")).removesuffix("Fast") == _DINOV3:
        settings = _DINOV3_DEFAULTS | found | {"processor": _DINOV3}
        return _DINOV3, settings, _dinov3(settings, location.source)

    processor = AutoImageProcessor.from_pretrained(location.source, backend="pil", **location.arguments())
    kind, settings = type(processor).__name__, processor.to_dict()
    if all(getattr(type(processor), step, None) is getattr(PilBackend, step) for step in _STEPS):
        return kind, settings, _pillow(settings, location.source)
    if kind == "Siglip2ImageProcessorPil":  # patches of images of any shape: no plain picture comes out
        settings["processor"] = kind
        return kind, settings, lambda images: dict(processor(list(images), return_tensors="pt"))
    raise ValueError(
        f"{location.source!r} comes with the image processor {kind}, which this command doesn't understand; choose an "
        f"encoder with the processor of DINOv2, DINOv3, CLIP, SigLIP or ViT"
    )


def _pillow(settings: dict[str, Any], source: str) -> Callable[[np.ndarray], Inputs]:
    """Resize in bytes with Pillow, crop, and normalise in one go."""
    if settings.get("do_pad"):
        raise ValueError(f"{source!r} comes with an image processor that pads, which this command doesn't understand")
    resample = settings.get("resample")
    resample = Image.Resampling(Image.Resampling.BILINEAR if resample is None else resample)
    scale, offset = _normalisation(settings)

    def one(image: UInt8[np.ndarray, "height width 3"]) -> np.ndarray:
        if settings.get("do_resize"):
            height, width = _resized(settings["size"], image.shape[0], image.shape[1], source)
            if (height, width) != image.shape[:2]:
                image = np.asarray(Image.fromarray(image).resize((width, height), resample))
        if settings.get("do_center_crop"):
            image = _cropped(image, settings["crop_size"], source)
        return image

    def run(images: np.ndarray) -> Inputs:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # Pillow lets go of the interpreter
            pictures = np.stack(list(threads.map(one, images)))
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return {"pixel_values": pixels.mul_(scale).add_(offset)}

    return run


def _dinov3(settings: dict[str, Any], source: str) -> Callable[[np.ndarray], Inputs]:
    """Rescale, resize in floating point with antialiasing, and normalise."""
    if settings.get("do_center_crop") or settings.get("do_pad") or settings["resample"] not in _TORCH_MODES:
        raise ValueError(
            f"{source!r} comes with settings of {_DINOV3} that this command doesn't understand: it resizes by nearest, "
            f"bilinear or bicubic interpolation, and neither crops nor pads"
        )
    mode = _TORCH_MODES[settings["resample"]]
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    scale, offset = _normalisation(settings | {"do_rescale": False})

    def run(images: np.ndarray) -> Inputs:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) * factor
        if settings["do_resize"]:
            size = _resized(settings["size"], images.shape[1], images.shape[2], source)
            smooth = mode != "nearest-exact"
            pixels = torch.nn.functional.interpolate(
                pixels, size, mode=mode, antialias=smooth, align_corners=False if smooth else None
            )
        return {"pixel_values": pixels.contiguous().mul_(scale).add_(offset)}

    return run


def _normalisation(
    settings: dict[str, Any],
) -> tuple[Float32[torch.Tensor, "channel 1 1"], Float32[torch.Tensor, "channel 1 1"]]:
    """Return scale and offset that rescale and normalise: ``(x * factor - mean) / sd = x * scale + offset``."""
    factor = settings["rescale_factor"] if settings.get("do_rescale") else 1.0
    mean, sd = np.zeros(3), np.ones(3)
    if settings.get("do_normalize"):
        mean, sd = (np.broadcast_to(np.float64(settings[key]), 3) for key in ("image_mean", "image_std"))
    scale, offset = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (factor / sd, -mean / sd))
    return scale, offset


def _resized(size: dict[str, int], height: int, width: int, source: str) -> tuple[int, int]:
    """Return height and width of a picture after resizing."""
    given = {key: value for key, value in size.items() if value is not None}
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    if given.keys() == {"shortest_edge"}:
        edge = given["shortest_edge"]
        # Truncated, as transformers and torchvision do.
        return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
    raise ValueError(
        f"{source!r} comes with an image processor that resizes to {given}; this command understands height and width, "
        f"or shortest_edge"
    )


def _cropped(image: UInt8[np.ndarray, "height width 3"], size: dict[str, int], source: str) -> np.ndarray:
    """Return the middle of a picture."""
    height, width = image.shape[:2]
    top, left = (height - size["height"]) // 2, (width - size["width"]) // 2
    if top < 0 or left < 0:
        raise ValueError(
            f"{source!r} comes with an image processor that crops {size['height']} x {size['width']} out of "
            f"{height} x {width} pixels; mend its preprocessor_config.json"
        )
    return image[top : top + size["height"], left : left + size["width"]]
