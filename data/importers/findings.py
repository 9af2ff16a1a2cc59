"""What is wrong or odd in a user's files, collected line by line, so that a person learns of all of it at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Lines about files: `problems` stop an import, `warnings` don't."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Take a ValueError of the block as a problem and go on after the block."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))
