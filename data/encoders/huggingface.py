"""Vision transformers through `transformers`: DINOv2, DINOv3, CLIP, SigLIP, ViT, by hub name or from a local directory.

A depth ``d`` is the output of the encoder's block ``d`` (1-based) after the model's own final layer norm, as DINOv2's
``get_intermediate_layers(norm=True)`` gives it. Its tokens are told apart:

- ``cls``, the first token; or, in SigLIP, which has none, ``pooled``: the model's own attention pooling of that depth;
- ``register``, where the model has such, next;
- ``patch``, the rest.
"""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from data.encoders.base import Tokens
from data.encoders.hub import locate
from data.encoders.preprocessing import Inputs, Preprocessing
from data.encoders.vision_towers import UNUSED_WEIGHTS, load_tower
from data.schema import check_name

# Bytes of activations of a block at which one batch is right: a CPU's caches are small, a GPU's many units want work.
_ACTIVATION_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
_ACTIVATIONS_PER_TOKEN = 10  # times the width: residual, normed, queries, keys, values, four of the MLP, result
_MAX_BATCH = 32  # two in each batch of `compute_features`: one is prepared while the other is encoded
_LOGGER = logging.getLogger(__name__)


class HuggingFaceEncoder:
    """A pretrained vision transformer and its own preprocessing.

    Parameters
    ----------
    source : hub name (``facebook/dinov2-base``) or a local directory.
    depths : encoder blocks whose tokens are kept, 1-based; by default a quarter, half, three quarters and all of them.
    device : where it runs; by default the GPU, if there is one that torch can use.

    Raises
    ------
    ValueError
        If the model can't be loaded, is of an unknown kind, gives no square grid of patches, or lacks a depth.
    """

    def __init__(self, source: str, *, depths: tuple[int, ...] | None = None, device: str | None = None) -> None:
        location = locate(source)
        try:
            self._tower = load_tower(location)
            self._preprocessing = Preprocessing(location)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{source!r} lacks part of an encoder ({reason}); save model and processor there"
            ) from error
        if location.unreachable:
            _LOGGER.warning(
                "%s is taken from the cache, commit %s: the hub was not asked (%s)",
                *(source, location.revision, location.unreachable),
            )
        self.depths = _chosen(depths, len(self._tower.blocks), source)
        self._weights = _digest_of_weights(self._tower.model)
        del self._tower.blocks[self.depths[-1] :]  # nothing is taken from deeper ones
        self._found: list[Float[torch.Tensor, "image token width"]] = []
        for depth in self.depths:
            self._tower.blocks[depth - 1].register_forward_hook(self._keep)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tower.model.to(self.device)

        local = Path(source).is_dir()
        self.name = check_name((Path(source).resolve() if local else Path(source)).name, "encoder")
        self.width = self._tower.width
        self._source, self._revision = self.name if local else source, location.revision
        self._n_prefix = self._tower.n_registers + (self._tower.head is None)
        n_patches = self._probe(source)
        side = round(n_patches**0.5)
        if side * side != n_patches:
            raise ValueError(
                f"{source!r} ({self._tower.kind}) gives {n_patches} patch tokens, not a square grid of patches; "
                f"choose a vision transformer and a preprocessing for square pictures"
            )
        self.grid = (side, side)
        per_image = (n_patches + self._n_prefix) * self.width * 4 * _ACTIVATIONS_PER_TOKEN
        room = _ACTIVATION_BYTES.get(self.device.type, _ACTIVATION_BYTES["cpu"])
        self.batch = 1 << (int(np.clip(room // per_image, 1, _MAX_BATCH)).bit_length() - 1)

    def spec(self) -> dict[str, Any]:
        """Return what identifies the tokens, wherever the files are: weights, preprocessing, depths, which tokens."""
        return {
            "kind": "transformers",
            "model_type": self._tower.kind,
            "weights": self._weights,
            "preprocessing": self._preprocessing.settings,
            "depths": list(self.depths),
            "grid": list(self.grid),
            "width": self.width,
            **({"registers": self._tower.n_registers} if self._tower.n_registers else {}),
            **({"pooled": "head"} if self._tower.head is not None else {}),
        }

    def provenance(self) -> dict[str, Any]:
        """Return where it came from: directory or hub name and commit, the preprocessing's class, library versions."""
        import transformers

        return {
            "source": self._source,
            "revision": self._revision,
            "processor": self._preprocessing.processor,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": self.device.type,
        }

    @torch.inference_mode()
    def encode(self, images: UInt8[np.ndarray, "image height width 3"]) -> Tokens:
        """Return the tokens of `images` in single precision.

        Raises
        ------
        ValueError
            If their shape leads to another grid of patches than `grid`.
        """
        starts = range(0, len(images), self.batch)
        tokens: dict[str, np.ndarray] = {}
        with ThreadPoolExecutor(1) as ahead:  # the next batch is prepared while this one is encoded
            prepared = ahead.submit(self._preprocessing, images[: self.batch])
            for start in starts:
                inputs = prepared.result()
                stop = start + self.batch
                if stop < len(images):
                    prepared = ahead.submit(self._preprocessing, images[stop : stop + self.batch])
                for place, hidden in enumerate(self._hidden(inputs)):
                    for name, values in self._told_apart(hidden).items():
                        if name not in tokens:
                            shape = (len(images), len(self.depths), *values.shape[1:])
                            tokens[name] = np.empty(shape, np.float32)
                        tokens[name][start:stop, place] = values.cpu().numpy()
        if (n := tokens["patch"].shape[2]) != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"{self.name!r} gives {n} patches of images of {images.shape[1]} x {images.shape[2]} pixels, not the "
                f"{self.grid[0]} x {self.grid[1]} of square ones; crop the images to squares before they are imported"
            )
        return Tokens(**tokens)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._found.append(output[0] if isinstance(output, tuple) else output)

    def _hidden(self, inputs: Inputs) -> list[Float[torch.Tensor, "image token width"]]:
        """Return each depth's normed tokens."""
        self._found.clear()
        self._tower.model(**{name: values.to(self.device) for name, values in inputs.items()})
        n_tokens = None
        if (shapes := inputs.get("spatial_shapes")) is not None:  # SigLIP 2 pads images of other shapes
            n_tokens = int(shapes[0].prod())
        hidden = [self._tower.norm(found[:, :n_tokens]) for found in self._found]
        self._found.clear()
        return hidden

    def _told_apart(self, hidden: Float[torch.Tensor, "image token width"]) -> dict[str, torch.Tensor]:
        named = {"patch": hidden[:, self._n_prefix :]}
        if self._tower.head is not None:
            named["pooled"] = self._tower.head(hidden)
        else:
            named["cls"] = hidden[:, 0]
        if self._tower.n_registers:
            named["register"] = hidden[:, self._n_prefix - self._tower.n_registers : self._n_prefix]
        return named

    @torch.inference_mode()
    def _probe(self, source: str) -> int:
        """Return the number of patches of a square picture."""
        try:
            hidden = self._hidden(self._preprocessing(np.zeros((1, 64, 64, 3), np.uint8)))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"model and preprocessing of {source!r} don't fit each other ({error}); mend its "
                f"preprocessor_config.json"
            ) from error
        return hidden[0].shape[1] - self._n_prefix


def _chosen(depths: tuple[int, ...] | None, n_blocks: int, source: str) -> tuple[int, ...]:
    if depths is None:
        return tuple(sorted({max(1, n_blocks * k // 4) for k in (1, 2, 3, 4)}))
    if not depths or any(not 1 <= d <= n_blocks for d in depths) or list(depths) != sorted(set(depths)):
        raise ValueError(f"depths {depths} of {source!r} must rise and lie within 1..{n_blocks}")
    return tuple(depths)


def _digest_of_weights(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(UNUSED_WEIGHTS):
            sha.update(name.encode())
            sha.update(tensor.contiguous().numpy().data)
    return "sha256:" + sha.hexdigest()
