"""Vision transformers through `transformers`: DINOv2 and its like, by hub name or from a local directory.

A depth ``d`` is the output of the encoder's block ``d`` (1-based) after the model's own final layer norm, as DINOv2's
``get_intermediate_layers(norm=True)`` gives it. The first token is CLS; register tokens are dropped.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from data.encoders.base import Tokens
from data.schema import check_name

# What changes the numbers; the rest of a processor's description varies with the version of `transformers`.
PREPROCESSING = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
_UNUSED = "pooler."  # drawn at random where a checkpoint has none; no token passes through it


class HuggingFaceEncoder:
    """A pretrained vision transformer and its own preprocessing.

    Parameters
    ----------
    source : hub name (``facebook/dinov2-base``) or a local directory.
    depths : encoder blocks whose tokens are kept, 1-based; by default a quarter, half, three quarters and all of them.

    Raises
    ------
    ValueError
        If the model can't be loaded, is no vision transformer with a CLS token, or lacks a depth.
    """

    def __init__(self, source: str, *, depths: tuple[int, ...] | None = None, device: str | None = None) -> None:
        from transformers import AutoImageProcessor, AutoModel

        try:
            self._processor = AutoImageProcessor.from_pretrained(source)
            model, loading = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"no encoder {source!r}: neither a local directory nor reachable on the hub ({reason})"
            ) from error
        if missing := sorted(key for key in loading["missing_keys"] if _UNUSED not in key):
            raise ValueError(f"{source!r} lacks the weights {missing[0]!r} of a {model.config.model_type}; get it anew")
        model = getattr(model, "vision_model", model)
        config = model.config
        n_blocks = getattr(config, "num_hidden_layers", None)
        norm = next((getattr(model, n) for n in ("layernorm", "post_layernorm", "norm") if hasattr(model, n)), None)
        if n_blocks is None or norm is None:
            raise ValueError(
                f"{source!r} ({config.model_type}) is not a vision transformer that this command understands"
            )
        self._norm: torch.nn.Module = norm
        depths = depths or tuple(sorted({max(1, n_blocks * k // 4) for k in (1, 2, 3, 4)}))
        if any(not 1 <= d <= n_blocks for d in depths) or list(depths) != sorted(set(depths)):
            raise ValueError(f"depths {depths} of {source!r} must rise and lie within 1..{n_blocks}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().to(self.device)
        self._n_prefix = 1 + int(getattr(config, "num_register_tokens", 0) or 0)
        local = Path(source).is_dir()
        self.name = check_name((Path(source).resolve() if local else Path(source)).name, "encoder")
        self.depths = depths
        self.width = int(config.hidden_size)
        self._source = self.name if local else source
        n_patches = self.encode(np.zeros((1, 64, 64, 3), np.uint8)).patch.shape[2]
        side = round(n_patches**0.5)
        if side * side != n_patches:
            raise ValueError(
                f"{source!r} ({config.model_type}) gives {n_patches} tokens beside CLS, not a square grid of patches; "
                f"choose a vision transformer with a CLS token"
            )
        self.grid = (side, side)

    def spec(self) -> dict[str, Any]:
        """Return what identifies the tokens: weights, preprocessing, depths."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            if not name.startswith(_UNUSED):
                sha.update(name.encode())
                sha.update(tensor.cpu().contiguous().numpy().data)
        settings = self._processor.to_dict()
        return {
            "kind": "transformers",
            "source": self._source,
            "model_type": self._model.config.model_type,
            "weights": "sha256:" + sha.hexdigest(),
            "preprocessing": {
                key: list(value) if isinstance(value, tuple) else value
                for key in PREPROCESSING
                if (value := settings.get(key)) is not None
            },
            "depths": list(self.depths),
            "grid": list(self.grid),
            "width": self.width,
        }

    @torch.inference_mode()
    def encode(self, images: UInt8[np.ndarray, "image height width 3"]) -> Tokens:
        """Return the tokens of `images` in single precision."""
        pixels = self._processor(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        hidden = self._model(pixel_values=pixels, output_hidden_states=True).hidden_states
        kept = torch.stack([self._norm(hidden[d]) for d in self.depths], dim=1).cpu().numpy()
        return Tokens(cls=kept[:, :, 0], patch=kept[:, :, self._n_prefix :])
