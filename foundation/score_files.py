"""Where a command puts the rows of its scores: JSON, CSV, and the paired differences beside them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from foundation.evaluation.score import Comparison, Row
from foundation.evaluation.table import write_rows_csv, write_rows_json, write_whole


@dataclass(frozen=True, kw_only=True)
class ScoreFiles:
    """The files that are asked for, if any."""

    json: Path | None
    csv: Path | None

    def check(self) -> None:
        """Raise ValueError where a file's directory is missing, before anything is computed."""
        for path in (self.json, self.csv):
            if path is not None and not path.resolve().parent.is_dir():
                raise ValueError(f"there is no directory {path.resolve().parent} for {path}; make it first")

    def write(
        self,
        rows: Sequence[Row],
        comparisons: Sequence[Comparison],
        notes: Sequence[str],
        *,
        tell: Callable[[str], None],
    ) -> None:
        """Write the rows; beside ``NAME.json`` the paired differences, and what has to be known to read the numbers."""
        if self.json is not None:
            write_rows_json(rows, self.json)
            beside = self.json.with_suffix(".comparisons.json")
            write_rows_json(comparisons, beside)
            told = self.json.with_suffix(".notes.json")
            write_whole(json.dumps(list(notes), indent=1, ensure_ascii=False) + "\n", told)
            tell(f"{self.json}: {len(rows)} rows; {beside.name}: paired differences; {told.name}: what they mean")
        if self.csv is not None:
            write_rows_csv(rows, self.csv)
            tell(f"{self.csv}: {len(rows)} rows")
