"""What an import is going to do, found out before the first byte is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.importers.findings import Findings
from data.schema import resolve_subject, told_runs
from data.sources import SubjectSource


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """Subjects to import, and everything that is missing or odd.

    `problems` stop an import; `warnings` don't. Each is one line that names the file or value, and the remedy.
    """

    subjects: list[SubjectSource] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def choose_subjects(given: tuple[str, ...] | None, have: Sequence[str], where: object, findings: Findings) -> list[str]:
    """Return the names of the wanted subjects, in the order of those that `where` has; all of them if None is given.

    Each is given by name or number; one that isn't there, or could be two, is noted. That `where` has no subject at all
    is the caller's to note.
    """
    if given is None or not have:
        return list(have)
    wanted = set()
    for text in given:
        with findings.noting():
            wanted.add(resolve_subject(text, have, where))
    return [name for name in have if name in wanted]


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
                raise ValueError(f"{whose} has no session {missing[0]}; it has {told_runs(have)}")
            return sorted(set(self.numbered))
        if self.n is None:
            return have
        if self.n > len(have):
            raise ValueError(f"{whose} has {len(have)} sessions ({told_runs(have)}); --sessions {self.n} asks for more")
        return have[: self.n]
