"""The vision transformers that we understand, and where each keeps its blocks, its final norm and its pooling head.

Of a two-tower model (CLIP, SigLIP) only the vision tower is built and loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from data.encoders.hub import Location

CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "vit": "ViTModel",
    "vit_msn": "ViTMSNModel",
}
"""The class in `transformers` of each kind of vision transformer."""
_WITHOUT_CLS = ("siglip_vision_model", "siglip2_vision_model")
_NORMS = ("layernorm", "post_layernorm", "norm")

# Drawn at random where a checkpoint has none, and no token passes through it. (SigLIP's pooling is its `head`.)
UNUSED_WEIGHTS = "pooler."


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A loaded vision tower and its parts."""

    model: torch.nn.Module
    blocks: torch.nn.ModuleList
    norm: torch.nn.Module
    head: torch.nn.Module | None
    """Pools the tokens into one, in a model without CLS token."""
    kind: str
    width: int
    n_registers: int


def load_tower(location: Location) -> Tower:
    """Load the vision tower of the model at `location`, in single precision.

    Raises
    ------
    OSError
        If the files aren't there.
    ValueError
        If it is of another kind, lacks weights, or has no CLS token and no pooling head either.
    """
    import transformers

    source = location.source
    try:
        whole = transformers.AutoConfig.from_pretrained(source, **location.arguments())
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source!r} holds no model that transformers {transformers.__version__} knows ({reason})"
        ) from error
    config = getattr(whole, "vision_config", whole)
    kind = config.model_type
    if kind not in CLASSES:
        raise ValueError(
            f"{source!r} ({kind}) is not a vision transformer that this command understands; choose a DINOv2, DINOv3, "
            f"CLIP, SigLIP or ViT"
        )
    with _quiet(nothing_to_fetch=location.cached_only):
        model, loading = getattr(transformers, CLASSES[kind]).from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,  # never a pickle: a bundle from a stranger may name an encoder
            **location.arguments(),
        )
    if missing := sorted(key for key in loading["missing_keys"] if UNUSED_WEIGHTS not in key):
        raise ValueError(f"{source!r} lacks the weights {missing[0]!r} of a {kind}; get it anew")
    head = None
    if kind in _WITHOUT_CLS:
        if (head := getattr(model, "head", None)) is None:
            raise ValueError(
                f"{source!r} ({kind}) has neither a CLS token nor a pooling head, so no token of the whole image; "
                f"choose a model that has one"
            )
        model.use_head = False  # it is applied to each depth, not by the model
    depth = config.num_hidden_layers
    return Tower(
        model=model.eval(),
        blocks=next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth),
        norm=next(getattr(model, name) for name in _NORMS if hasattr(model, name)),
        head=head,
        kind=kind,
        width=int(config.hidden_size),
        n_registers=int(getattr(config, "num_register_tokens", 0)),
    )


@contextmanager
def _quiet(*, nothing_to_fetch: bool) -> Iterator[None]:
    """Leave out `transformers`' table of what was not loaded (it is the text tower; what lacks is checked here).

    Its progress bar stays only where there is something to fetch.
    """
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bar and nothing_to_fetch:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
