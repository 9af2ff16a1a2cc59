"""What the plan of docs/scaling.md extrapolates from, measured: the model at DINOv2-base's shape, and a real store.

::

    python -m tests.experiments.scaling_constants [--store STORE --encoder NAME]

prints the constants of `tests.experiments.scaling`. Sizes and counts are exact and the same on every machine; rates are
of one thread here. With a store, the bytes of its tokens and responses on disk beside those that are in them.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from data.store import PooledStore
from foundation.checkpoint import save_model
from foundation.losses import objective
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.recipes import recipe_named
from foundation.training.optim import build_optimiser

DINOV2_BASE = TokenShape(depth=4, patch=256, width=768)
N_VOXEL, N_ROI = 16_000, 30
RECIPE = recipe_named("base")


class OperatorCount(TorchDispatchMode):
    """Counts the operators that reach a device, views aside: on a GPU each is a kernel at least."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and go on."""
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))


def model_of(n_subjects: int) -> EncodingModel:
    """Return the recipe's model for subjects of 16,000 voxels in 30 ROIs."""
    torch.manual_seed(0)
    parcel = torch.arange(N_VOXEL) % N_ROI
    return EncodingModel(DINOV2_BASE, RECIPE.backbone, {f"s{i}": parcel for i in range(n_subjects)}).train()


def loss_of(model: EncodingModel, n_images: int, n_seen: int = 1) -> Tensor:
    """Return the objective of a step; the first `n_seen` subjects have equal shares of its images, others none."""
    cls = torch.randn(n_images, DINOV2_BASE.depth, DINOV2_BASE.width)
    patch = torch.randn(n_images, DINOV2_BASE.depth, DINOV2_BASE.patch, DINOV2_BASE.width)
    ends = [min(i, n_seen) * n_images // n_seen for i in range(len(model.subjects) + 1)]
    rows = {name: slice(*ends[i : i + 2]) for i, name in enumerate(model.subjects)}
    responses = {name: torch.randn(where.stop - where.start, N_VOXEL) for name, where in rows.items()}
    output = model(cls, patch, rows, sample=True)
    return objective(model, output, responses, RECIPE.loss, image=torch.arange(n_images)).total


def n_parameters() -> dict[str, int]:
    """Trained numbers of the backbone and of an adapter, and those of an adapter that are solved and only kept."""
    model = model_of(1)
    trained = sum(p.numel() for p in model.adapters.parameters() if p.requires_grad)
    return {
        "backbone": sum(p.numel() for p in model.backbone_parameters()),
        "adapter": trained,
        "adapter_kept": model.adapter("s0").n_numbers - trained,
    }


def step_flops(n_images: int) -> int:
    """Return the floating-point operations of matrix products, forward and backward (a multiply-add is two)."""
    with FlopCounterMode(display=False) as counter:
        loss_of(model_of(1), n_images).backward()
    return counter.get_total_flops()


def saved_bytes(n_images: int) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, parameters and buffers aside."""
    model = model_of(1)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, n_images)
    del loss
    return sum(kept.values())


def step_operators(n_subjects: int, *, n_seen: int) -> int:
    """Return the operators of a step, forward and backward; what the optimiser does is fused on a GPU."""
    model = model_of(n_subjects)
    with OperatorCount() as count:
        loss_of(model, 2 * n_seen, n_seen).backward()
    return count.n


def encoder_flops() -> int:
    """Return the operations with which DINOv2-base encodes an image of 224 x 224."""
    with torch.device("meta"):
        encoder = Dinov2Model(Dinov2Config(image_size=224, patch_size=14)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops()


def images_per_s(n_images: int = 32, n_steps: int = 5) -> float:
    """Return the rate of training steps on one thread, without reading."""
    torch.set_num_threads(1)
    model = model_of(1)
    optimiser = build_optimiser(model, RECIPE.optim)
    seconds = []
    for _ in range(n_steps):
        since = time.perf_counter()
        loss_of(model, n_images).backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - since)
    return n_images / sorted(seconds)[n_steps // 2]


def saved_bytes_per_s(n_times: int = 3) -> float:
    """Return the rate at which a model of two subjects is written to a local disk."""
    model, seconds, size = model_of(2), [], 0
    for _ in range(n_times):
        with tempfile.TemporaryDirectory() as directory:
            since = time.perf_counter()
            save_model(model, Path(directory), made_from={})
            seconds.append(time.perf_counter() - since)
            size = sum(file.stat().st_size for file in Path(directory).iterdir())
    return size / min(seconds)


def bytes_on_disk(path: Path) -> int:
    """Return the bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure the constants."""

    store: Path | None = None
    """A store on this machine with an encoder's tokens."""
    encoder: str = "encoder-vits14"
    """The encoder."""


def of_store(path: Path, encoder: str) -> dict[str, float]:
    """Bytes on disk of a store's tokens and responses, for each byte that is in them."""
    store = PooledStore.open(str(path))
    depth, patch, width = store.tokens(encoder).shape
    in_tokens = 2 * len(store.image_ids()) * depth * (1 + patch) * width
    subjects = [store.subject(name) for name in store.subjects]
    in_responses = 2 * sum(len(subject.image) * subject.n_voxels for subject in subjects)
    on_disk = sum(bytes_on_disk(file) for file in path.glob("subjects/*/parts/*/responses"))
    return {
        "token_bytes_ratio": bytes_on_disk(path / "features" / encoder) / in_tokens,
        "response_bytes_ratio": on_disk / in_responses,
    }


def main(options: Measure) -> None:
    """Print the constants."""
    few, many = 8, 16
    flops, kept, operators = step_flops, saved_bytes, step_operators
    found: dict[str, float] = {**n_parameters()}
    found["flops_per_image"] = (flops(many) - flops(few)) // (many - few)
    found["saved_bytes_per_image"] = (kept(many) - kept(few)) // (many - few)
    found["saved_bytes_fixed"] = kept(few) - few * int(found["saved_bytes_per_image"])
    found["operators_per_subject"] = operators(3, n_seen=3) - operators(2, n_seen=2)
    found["operators_fixed"] = operators(1, n_seen=1) - int(found["operators_per_subject"])
    found["encoder_flops"] = encoder_flops()
    found["images_per_s"] = images_per_s()
    found["saved_bytes_per_s"] = saved_bytes_per_s()
    if options.store is not None:
        found |= of_store(options.store, options.encoder)
    for name, value in found.items():
        print(f"{name} {value:_.5g}" if isinstance(value, float) else f"{name} {value:_}")


if __name__ == "__main__":
    main(tyro.cli(Measure))
