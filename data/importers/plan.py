"""What an import is going to do, found out before the first byte is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.sources import SubjectSource


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """Subjects to import, and everything that is missing or odd.

    `problems` stop an import; `warnings` don't. Each is one line that names the file or value, and the remedy.
    """

    subjects: list[SubjectSource] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SessionChoice:
    """Which sessions to import: the first `n`, or those `numbered`; all where neither is given.

    Raises
    ------
    ValueError
        If both are given, or numbers that can't be.
    """

    n: int | None = None
    numbered: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.n is not None and self.numbered is not None:
            raise ValueError("give --sessions N for the first N or --session-numbers for some of them; not both")
        if self.n is not None and self.n < 1:
            raise ValueError(f"--sessions {self.n} must be at least 1")
        if self.numbered is not None and (not self.numbered or min(self.numbered) < 1):
            raise ValueError(f"--session-numbers {self.numbered} must be numbers from 1")

    def __bool__(self) -> bool:
        return self.n is not None or self.numbered is not None

    def of(self, available: Sequence[int], whose: str) -> list[int]:
        """Return the chosen ones of the `available` session numbers, in the order of scanning.

        Raises
        ------
        ValueError
            If a chosen session isn't there.
        """
        have = sorted(available)
        if self.numbered is not None:
            if missing := sorted(set(self.numbered) - set(have)):
                raise ValueError(f"{whose} has no session {missing[0]}; it has {_told(have)}")
            return sorted(set(self.numbered))
        if self.n is None:
            return have
        if self.n > len(have):
            raise ValueError(f"{whose} has {len(have)} sessions ({_told(have)}); --sessions {self.n} asks for more")
        return have[: self.n]


def _told(numbers: list[int]) -> str:
    """Return whole numbers in order, runs shortened: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
