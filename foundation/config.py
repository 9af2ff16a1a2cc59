"""What a run is made of: frozen dataclasses, each component with its own. Docstrings of fields are the help texts."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

ScanOrder = Literal["raster", "reversed", "column", "column-reversed"]


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
    chunk_size: int = 64
    """Tokens per chunk of the chunked scan; changes speed and memory only."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Everything that all subjects share."""

    width: int = 128
    """Width of both streams."""
    n_cls_layer: int = 2
    """Blocks of the CLS stream."""
    n_patch_layer: int = 4
    """Blocks of the patch stream."""
    scan_orders: tuple[ScanOrder, ...] = ("raster", "reversed")
    """Orders in which the patch stream's blocks scan the grid, in turn."""
    n_encoder_layer: int = 1
    """Blocks of the Stage-2 encoder."""
    n_decoder_layer: int = 1
    """Blocks of the Stage-2 decoder."""
    n_query: int = 4
    """Query tokens of the holistic decoder."""
    latent: int = 32
    """Dimensions of the VAE's latent."""
    n_component: int = 64
    """Response components that a voxel's embedding reads: the rank of the holistic readout."""
    n_local: int = 24
    """Patch channels that a voxel reads through its own receptive field."""
    n_residual: int = 8
    """Channels of the ROI token that a voxel's residual reads."""
    n_gate: int = 16
    """Width of the gate's trunk."""
    dropout: float = 0.1
    """Dropout on the streams' inputs."""
    mamba: MambaConfig = field(default_factory=MambaConfig)
    """The blocks."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objective: voxel MSE + the rest."""

    roi: float = 0.5
    """Stage 1: mean squared error of the ROI values."""
    pearson: float = 0.3
    """Stage 1: one minus the correlation over ROIs (the paper's gamma)."""
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
    parcels: str = "auto:30"
    """ROIs of Stage 1: sequential:30, compact:30, auto:30 (compact where positions are known), functional:30,
    roi:FAMILY or atlas:PATH."""
    shuffle_buffer: int | None = None
    """Samples of each subject within which the order is shuffled; None: the whole epoch. A number suits tokens on a
    slow disk or far away: neighbouring images are then read together, and up to twice that many are held."""


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
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    seed: int = 0
    """Seed of everything random."""

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON."""
        return dataclasses.asdict(self)
