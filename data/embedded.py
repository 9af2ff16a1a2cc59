"""The data set that stands in where no store is named: a phantom in our home, made when it is first asked for."""

from collections.abc import Callable

from data.features import compute_features, load_encoder
from data.home import stores_dir
from data.phantom import PRESETS, write_phantom
from data.store import PooledStore
from data.store.migrate import migrate


def embedded_phantom(preset: str, *, tell: Callable[[str], None] = lambda line: None) -> str:
    """Return the path of the embedded phantom with its gabor tokens; what is missing of it is made, each part whole."""
    path = stores_dir() / f"phantom-{preset}.zarr"
    if not path.exists():
        tell(f"making the embedded data set, phantom {preset} (once): {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_phantom(path, PRESETS[preset])
    migrate(path, tell=tell)
    encoder = load_encoder("gabor")
    store = PooledStore.open(path)
    if encoder.name not in store.encoders or store.missing_tokens(encoder.name):
        compute_features(PooledStore.open(path, writable=True), encoder)
    return str(path)
