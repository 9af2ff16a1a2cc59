"""One writer at a time: two that appended at once would take the same place in the store.

On a local file system the group's own ``zarr.json`` is locked (flock), so nothing is left behind when a process dies.
Object stores have no such thing; there it is for the user to see to it.
"""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zarr
from zarr.storage import LocalStore


@contextmanager
def one_writer(group: zarr.Group) -> Iterator[None]:
    """Hold `group` for writing.

    Raises
    ------
    ValueError
        If another process holds it.
    """
    if not isinstance(group.store, LocalStore):
        yield
        return
    path = Path(group.store.root) / group.path / "zarr.json"
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {path.parent}; wait until it is done") from error
        except OSError as error:  # some network file systems have no locks
            logging.getLogger(__name__).warning("%s can't be locked (%s); write from one process only", path, error)
        yield
