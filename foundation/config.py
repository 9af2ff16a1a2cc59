"""What a run is made of: frozen dataclasses, each component with its own. Docstrings of fields are the help texts."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

ScanOrder = Literal["raster", "reversed", "column", "column-reversed"]
SpatialReadout = Literal["mean", "factorised", "gaussian"]
Depths = Literal["all", "last"]
RoiTarget = Literal["mean", "top-p", "reliability-weighted", "low-rank"]
Mixer = Literal["mamba", "transformer", "gru", "mlp"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A Mamba-2 block; the letters are the paper's (Dao & Gu 2024)."""

    d_state: int = 16
    """Size N of a head's state."""
    d_conv: int = 4
    """Width of the causal convolution."""
    expand: int = 2
    """Inner width as a multiple of the width."""
    headdim: int = 32
    """Width P of a head."""
    chunk_size: int = 32
    """Tokens per chunk of the scan, a power of two for mamba-ssm; changes speed and memory only."""
    backend: Literal["auto", "reference", "chunked", "mamba-ssm"] = "auto"
    """What computes the scan; auto: mamba-ssm on a GPU where it is installed, else chunked. Changes speed only."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Everything that all subjects share, and the sizes of what each of them owns (docs/model.md has the equations)."""

    streams: tuple[Literal["cls", "patch", "joint"], ...] = ("cls", "patch")
    """Streams of Stage 1; one alone is the model trained without the other. joint, alone: one stream over the CLS
    tokens and then the patches, with the blocks of the patch stream, read out at the patches."""
    mixer: Mixer = "mamba"
    """What mixes the tokens in the streams' blocks; Stage 2's are Mamba-2 in any case."""
    width: int = 128
    """Width of both streams."""
    n_cls_layer: int = 2
    """Blocks of the CLS stream."""
    n_patch_layer: int = 4
    """Blocks of the patch stream."""
    cls_depths: Depths = "all"
    """Encoder depths whose CLS tokens the CLS stream scans; last: one token, as in the paper."""
    patch_depths: Depths = "all"
    """Encoder depths that a patch token is made of."""
    token_budget: int | None = None
    """Cells along a side to which the patch grid is averaged before the patch stream; None: all patches."""
    scan_orders: tuple[ScanOrder, ...] = ("raster", "reversed")
    """Orders in which the patch stream's blocks scan the grid, in turn."""
    bidirectional: bool = False
    """Let each block of the patch stream scan both ways."""
    readout: SpatialReadout = "gaussian"
    """How an ROI or voxel weighs places: the mean of all, a free map, or a Gaussian population receptive field."""
    gate: Literal["image", "roi"] = "image"
    """What the share of the CLS stream depends on: the image alone (the paper), or image and ROI, which earned nothing
    in our experiments (docs/experiments.md, 2026-11-26)."""
    n_gate: int = 16
    """Width of the gate's trunk."""
    n_contrast: int | None = None
    """Dimensions in which image and measured ROIs are aligned by InfoNCE; None: they aren't, since it
    earned nothing (docs/experiments.md, 2026-11-26)."""
    n_encoder_layer: int = 1
    """Blocks of the Stage-2 encoder."""
    n_decoder_layer: int = 1
    """Blocks of the Stage-2 decoder."""
    n_query: int = 4
    """Query tokens of the holistic decoder."""
    latent: int | None = None
    """Dimensions of the VAE's latent, say 32; None: Stage 2 is deterministic, since a latent cost accuracy or earned
    nothing (docs/experiments.md, 2026-11-26)."""
    decoders: tuple[Literal["holistic", "residual"], ...] = ("holistic", "residual")
    """Decoders of Stage 2: from shared response components, and from the voxel's own ROI."""
    amplitude: bool = False
    """Recover the amplitude: scale all voxels by a factor of the image; earned nothing (docs/experiments.md,
    2026-11-26)."""
    n_component: int = 64
    """Response components that a voxel's embedding reads: the rank of the holistic readout."""
    n_local: int = 24
    """Patch channels that a voxel reads through its own receptive field."""
    n_residual: int = 8
    """Channels of the ROI token that a voxel's residual reads."""
    n_linear_whole: int = 32
    """Rank of the closed-form path from the whole image's tokens to voxels, at most."""
    n_linear_field: int = 32
    """Rank of the closed-form path from the patches in a voxel's field, at most."""
    linear_grid: int = 4
    """Cells along a side of the closed-form path's coarse grid, at most."""
    dropout: float = 0.1
    """Dropout on the streams' inputs."""
    token_dropout: float = 0.0
    """Dropout on the encoder's standardised tokens."""
    drop_path: float = 0.0
    """Share of images for which a stack's last block is left out in training; rises over the blocks."""
    mamba: MambaConfig = field(default_factory=MambaConfig)
    """The blocks."""

    def __post_init__(self) -> None:
        for name in ("streams", "decoders", "scan_orders"):
            chosen = getattr(self, name)
            if not chosen or (name != "scan_orders" and len(set(chosen)) < len(chosen)):
                raise ValueError(f"backbone.{name} is {chosen!r}; name one at least, and each once")
        if "joint" in self.streams and len(self.streams) > 1:
            raise ValueError(f"backbone.streams is {self.streams!r}; joint has the tokens of both, so it stands alone")
        sizes = ("width", "token_budget", "n_gate", "n_contrast", "latent", "n_query", "n_component", "n_local")
        for name in (*sizes, "n_residual", "n_linear_whole", "n_linear_field", "linear_grid"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"backbone.{name} is {size}; it must be 1 at least")
        for name in ("dropout", "token_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"backbone.{name} is {getattr(self, name)}; it is a share, from 0 to below 1")
        inner = self.mamba.expand * self.width
        if inner % self.mamba.headdim:
            raise ValueError(
                f"backbone.width {self.width} times backbone.mamba.expand {self.mamba.expand} is {inner}, no multiple "
                f"of backbone.mamba.headdim {self.mamba.headdim}; change one of them"
            )
        if self.mixer == "transformer" and self.width % self.mamba.headdim:
            raise ValueError(
                f"backbone.width {self.width} is no multiple of backbone.mamba.headdim {self.mamba.headdim}, the width "
                "of an attention head; change one of them"
            )

    @property
    def read_at(self) -> tuple[Literal["cls", "patch"], ...]:
        """Tokens at which the streams are read out."""
        return tuple("patch" if stream == "joint" else stream for stream in self.streams)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objective: voxel MSE + the rest."""

    roi: float = 0.5
    """Stage 1: mean squared error of the ROI values."""
    roi_target: RoiTarget = "mean"
    """What an ROI's value is of its voxels' responses; top-p: the mean of the highest 70 % of each trial, as in the
    paper, biased upwards by noise."""
    pearson: float = 0.3
    """Stage 1: one minus the correlation over ROIs (the paper's gamma)."""
    contrast: float = 0.1
    """Stage 1: InfoNCE of image and measured ROIs (the paper's lambda), where the backbone has it."""
    temperature: float = 0.1
    """Temperature of InfoNCE."""
    kl: float = 0.001
    """Stage 2: Kullback-Leibler divergence of the latent from a standard normal (the paper's beta)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to zero."""

    lr: float = 2e-3
    """Highest learning rate."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors and embeddings have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    warmup: float = 0.1
    """Share of the steps that warm up."""
    epochs: int = 12
    """Passes over the pooled training images."""
    batch_size: int = 32
    """Images per step over all workers."""
    stage1_share: float | None = None
    """Staged training: the share of the steps that train Stage 1 alone, after which it is frozen and Stage 2 trains,
    in one course of the learning rate; None: both train jointly."""
    patience: int | None = None
    """Early stopping: epochs without a better validation score after which training ends; None: it never does."""
    bad_step: Literal["skip", "stop"] = "skip"
    """What a loss or gradient that isn't finite, or a loss that explodes, does: the step is left out and said so (ten
    in a row end the run), or the run ends at once."""
    explosion: float | None = 10.0
    """A loss above so many times the median of the last 64 has exploded; None: only one that isn't finite is bad."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be 1 at least")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be above 0")
        if self.explosion is not None and self.explosion <= 1:
            raise ValueError(f"optim.explosion is {self.explosion}; it must be above 1, or None")
        if self.stage1_share is not None and not 0 < self.stage1_share < 1:
            raise ValueError(f"optim.stage1_share is {self.stage1_share}; it must lie between 0 and 1, or be None")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data come from, and who trains."""

    store: str | None = None
    """A store's path or URL; None: the phantom `phantom`, made if it is missing."""
    phantom: Literal["tiny", "standard"] = "tiny"
    """Preset of the phantom that stands in where no store is named."""
    encoder: str = "gabor"
    """Encoder whose tokens are read."""
    subjects: tuple[str, ...] = ("1", "2", "7")
    """Subjects to pool, by number or name."""
    sessions: int | None = None
    """Learn from the first N sessions of each subject; None: from all."""
    parcels: str = "auto:30"
    """ROIs of Stage 1: sequential:30, compact:30, auto:30 (compact where positions are known), functional:30,
    roi:FAMILY or atlas:PATH."""
    shuffle_buffer: int | None = None
    """Samples of each subject within which the order is shuffled; None: the whole epoch. A number suits tokens on a
    slow disk or far away: neighbouring images are then read together, and up to twice that many are held."""

    def __post_init__(self) -> None:
        if self.sessions is not None and self.sessions < 1:
            raise ValueError(f"data.sessions is {self.sessions}; it must be 1 at least")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a worker computes its share of a step. No part of the recipe: it changes memory and speed, and the last bits
    of numbers."""

    precision: Precision = "auto"
    """Precision of the network's matrix products; parameters, gradients and losses are single precision in any case.
    auto: bf16 on a GPU with units for it, else fp32."""
    accumulate: int = 1
    """Parts in which a worker takes its share of a batch, one after the other: so many times less memory for
    activations, for the same step."""
    recompute: bool = False
    """Activation checkpointing: blocks keep their inputs only, and are computed again in the backward pass."""

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"--cluster.accumulate {self.accumulate} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run, but for the cluster that it runs on."""

    name: str
    """Name of the recipe, and of the backbone in the registry."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Shared backbone."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and length."""
    start: Literal["ridge", "random"] = "ridge"
    """Start of the adapters: a closed-form path beside the network, its fields handed to the network; or neither."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best model by validation is kept besides."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Recipe":
        """Return the recipe that `to_json` and JSON turned into `plain`; settings that are newer have their default.

        Raises
        ------
        ValueError
            If it has settings that we don't know.
        """
        try:
            parts: dict[str, Any] = {
                "data": DataConfig(**_tuples(plain["data"])),
                "backbone": backbone_config(plain["backbone"]),
                "loss": LossConfig(**plain["loss"]),
                "optim": OptimConfig(**plain["optim"]),
            }
            return cls(**(plain | parts))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a recipe of another version of manybrains: {error}") from error


def _tuples(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def backbone_config(plain: dict[str, Any]) -> BackboneConfig:
    """Return the config that `dataclasses.asdict` and JSON turned into `plain`."""
    parts: dict[str, Any] = _tuples(plain) | {"mamba": MambaConfig(**plain["mamba"])}
    return BackboneConfig(**parts)


def differences(mine: Recipe, other: Recipe) -> list[str]:
    """Return the settings that differ, each with both values."""
    return _differences(mine.to_json(), other.to_json())


def _differences(mine: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in mine.items():
        if isinstance(value, dict):
            found += _differences(value, other[key], f"{prefix}{key}.")
        elif value != other[key]:
            found.append(f"{prefix}{key} {value!r} for the run's {other[key]!r}")
    return found
