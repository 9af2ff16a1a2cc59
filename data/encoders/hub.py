"""Where an encoder's files are: a directory, the hub at one commit, or what is cached of it if it can't be reached.

Left to itself, `transformers` asks an unreachable hub for each of its files, and each time it retries. We ask once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT_S = 5
_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Location:
    """What to hand to `from_pretrained`, so that all files are of one commit."""

    source: str
    revision: str | None = None
    """Commit on the hub; None for a directory."""
    cached_only: bool = False
    unreachable: str | None = None
    """Why the hub could not be asked."""

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `from_pretrained`."""
        return {"revision": self.revision, "local_files_only": self.cached_only}


def locate(source: str) -> Location:
    """Return where `source`, a directory or a name on the hub, is found now.

    Raises
    ------
    ValueError
        If it is neither, if the hub refuses to give it, or if the hub can't be reached and nothing of it is cached.
    """
    if Path(source).is_dir():
        return Location(source=source, cached_only=True)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import httpx

    unreachable = None
    try:
        try:
            HfApi().model_info(source, timeout=_TIMEOUT_S)
        except OfflineModeIsEnabled:
            unreachable = "HF_HUB_OFFLINE is set"
        except RepositoryNotFoundError:
            raise
        except (httpx.TransportError, HfHubHTTPError) as error:  # no network, no answer in time, or none of use
            unreachable = str(error).splitlines()[0] if str(error) else type(error).__name__
        config = hf_hub_download(source, _CONFIG, local_files_only=unreachable is not None)
    except HFValidationError as error:
        reason = "whose names look like facebook/dinov2-base"
        raise ValueError(
            f"no encoder {source!r}: neither a local directory nor reachable on the hub, {reason}"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"encoder {source!r} is gated: ask for access on https://huggingface.co/{source}, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"no encoder {source!r}: neither a local directory nor reachable on the hub; check the name, and for a "
            f"private model log in with `hf auth login`"
        ) from error
    except EntryNotFoundError as error:  # on the hub, or in the cache
        if unreachable is None:
            raise ValueError(f"{source!r} on the hub is no model of transformers: it has no {_CONFIG}") from error
        raise ValueError(
            f"no encoder {source!r}: neither a local directory nor reachable on the hub, nor cached ({unreachable}); "
            f"give a directory with the model, or fetch it once while online"
        ) from error
    return Location(
        source=source,
        revision=Path(config).parent.name,  # .../snapshots/<commit>/config.json
        cached_only=unreachable is not None,
        unreachable=unreachable,
    )
