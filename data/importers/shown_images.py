"""The images that a table of trials shows: identities, parts of the split that it prescribes, pictures."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from data.importers.findings import Findings
from data.importers.named_pictures import NamedPictures
from data.importers.trial_tables import TrialTable
from data.schema import ROLES
from data.sources import ImageSource


@dataclass(frozen=True, kw_only=True)
class ShownImages:
    """A subject's images, and the place among them of each name."""

    source: ImageSource
    row: dict[str, int]


def shown_images(
    table: TrialTable, shown: Int64[np.ndarray, " trial"], pictures: NamedPictures | None, findings: Findings
) -> ShownImages | None:
    """Return the images of the trials `shown`; without `pictures`, by the table's ``image_id`` alone.

    None, with problems noted, if a picture is missing or of another size, or the table doesn't tell what an image is.
    """
    before = len(findings.problems)
    with findings.noting():
        found = _found(table, shown, pictures, findings)
        return found if len(findings.problems) == before else None
    return None


def _found(
    table: TrialTable, shown: np.ndarray, pictures: NamedPictures | None, findings: Findings
) -> ShownImages | None:
    if pictures is None and table.image_id is None:
        raise ValueError(
            f"{table.paths[0]} has no column image_id, and a file's name is no identity; add it, or import the pictures"
        )
    if pictures is not None and table.stimulus is None:
        raise ValueError(f"{table.paths[0]} names no pictures; add a column stim_file, or leave the pictures out")
    first = dict(zip(table.names[shown][::-1], shown[::-1], strict=True))  # the first trial of each name
    names = list(dict.fromkeys(table.names[shown]))
    file_of = {name: name if table.stimulus is None else str(table.stimulus[first[name]]) for name in names}
    shape = None if pictures is None else pictures.one_size(file_of.values())
    identities: list[str] = names
    if table.image_id is not None:
        _check_one_picture(table, shown, file_of)
    else:
        assert pictures is not None
        identities = []
        for name in names:
            with findings.noting():
                identities.append(pictures.identity(name))
        if len(identities) < len(names):
            return None
    ids = list(dict.fromkeys(identities))
    place = {identity: k for k, identity in enumerate(ids)}
    row = {name: place[identity] for name, identity in zip(names, identities, strict=True)}
    roles = _roles(table, shown, row, ids)
    if pictures is None:
        return ShownImages(source=ImageSource(ids=ids, roles=roles), row=row)
    files = [""] * len(ids)
    for name in reversed(names):
        files[row[name]] = file_of[name]

    def read(rows: np.ndarray) -> np.ndarray:
        return np.stack([pictures.pixels(files[int(k)]) for k in rows])

    source = ImageSource(ids=ids, roles=roles, shape=shape, files=pictures.files, read=read)
    return ShownImages(source=source, row=row)


def _check_one_picture(table: TrialTable, shown: np.ndarray, file_of: dict[str, str]) -> None:
    if table.stimulus is not None:
        for name, stimulus in zip(table.names[shown], table.stimulus[shown], strict=True):
            if file_of[name] != stimulus:
                raise ValueError(
                    f"{table.paths[0]}: image_id {name!r} goes with the pictures {file_of[name]!r} and {stimulus!r}; "
                    f"an id is one image"
                )


def _roles(table: TrialTable, shown: np.ndarray, row: dict[str, int], ids: list[str]) -> list[str]:
    if table.role is None:
        return [""] * len(ids)
    roles: dict[int, str] = {}
    for name, role in zip(table.names[shown], table.role[shown], strict=True):
        if role not in ROLES:
            raise ValueError(
                f"{table.paths[0]}: split {role!r} of {name!r} is none of train, validation and test; correct it"
            )
        if roles.setdefault(row[name], role) != role:
            raise ValueError(
                f"{table.paths[0]}: {name!r} is in the split {role!r} and in {roles[row[name]]!r}; an image has one"
            )
    return [roles[k] for k in range(len(ids))]
