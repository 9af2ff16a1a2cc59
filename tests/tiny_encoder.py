"""Vision transformers of a few kilobytes with random weights, saved as a user would have them."""

import json
from pathlib import Path
from typing import Any

import torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIDE, PATCH, WIDTH, BLOCKS = 28, 14, 32, 3
MEAN, SD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZES: dict[str, Any] = dict(
    hidden_size=WIDTH,
    intermediate_size=64,
    num_hidden_layers=BLOCKS,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
)


def save_processor(path: Path, kind: str = "BitImageProcessor", **more: Any) -> None:
    """Write a preprocessor_config.json: shortest edge to 28, centre 28 x 28."""
    settings = {
        "image_processor_type": kind,
        **dict(do_resize=True, size={"shortest_edge": SIDE}, resample=3, do_convert_rgb=True),
        **dict(do_center_crop=True, crop_size={"height": SIDE, "width": SIDE}),
        **dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=MEAN, image_std=SD),
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings | more))


def randomise(model: torch.nn.Module, *, seed: int = 0) -> torch.nn.Module:
    """Draw every weight anew, so that none is zero or one, and no block does next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.abs_().add_(0.5)
    return model.eval()


def save_vit(path: Path, kind: str = "Dinov2", *, seed: int = 0, **more: Any) -> Path:
    """Save a model of its own class, such as ``Dinov2Model``, with a processor."""
    save_model(path, kind, seed=seed, **more)
    return path


def save_model(path: Path, kind: str, *, seed: int = 0, **more: Any) -> torch.nn.Module:
    """Save a model as `save_vit` does, and return it."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(SIZES | more))
    model = randomise(getattr(transformers, f"{kind}Model")(config), seed=seed)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    save_processor(path)
    return model
