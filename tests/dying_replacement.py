"""A directory's replacement that is killed at a chosen operation."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from foundation.checkpoint import new_directory

SWAP = ["remove", "rename", "rename", "remove"]
"""Operations of a replacement, in order."""


class Killed(BaseException):
    """Stands for kill -9."""


def replace_until_killed(directory: Path, write: Callable[[Path], None], at: int | None = None) -> list[str]:
    """Replace a directory; once `write` has written the new one, be killed before operation `at`. Return those done."""
    done: list[str] = []

    def dying(name: str, operation):
        def operate(*args, **options):
            if len(done) == at:
                raise Killed
            done.append(name)
            return operation(*args, **options)

        return operate

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed), new_directory(directory) as made:
        write(made)
        patch.setattr(Path, "rename", dying("rename", Path.rename))
        patch.setattr(shutil, "rmtree", dying("remove", shutil.rmtree))
    return done
