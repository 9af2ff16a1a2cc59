"""The pooled store on disk (Zarr v3): create, append, open, read. ``docs/store-format.md`` is its specification.

A write is atomic at the level of an image block, an encoder's tokens of a block, or an import of one subject's
sessions together with the images that they showed: its group gets the attribute ``complete`` last, and readers pass
over groups that lack it. That holds on object stores too, where nothing can be renamed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import zarr
from jaxtyping import Int, UInt8
from zarr.errors import BaseZarrError, GroupNotFoundError

from data.schema import (
    FORMAT,
    FORMAT_VERSION,
    check_name,
    json_digest,
    resolve_subject,
)
from data.sources import ImageBlock, ImageSource, SessionSource, SubjectData, SubjectSource
from data.store.images import (
    Progress,
    check_still_ours,
    image_blocks,
    image_ids,
    image_roles,
    picture_digests,
    write_images,
)
from data.store.lock import one_writer
from data.store.shards import files_of, size_of
from data.store.subjects import (
    SubjectStore,
    commit_part,
    draft_part,
    plan_digest,
    write_head,
    write_session,
)
from data.store.tokens import NamedTokens, TokenReader, rows_written, write_tokens
from data.store.zarr_arrays import (
    array_at,
    attribute,
    check_whole,
    complete_members,
    group_at,
    members,
)


class _NoStoreError(ValueError):
    """Nothing is at the path: the one case in which a store may be made there."""


class OldStoreError(ValueError):
    """The store has an older format, which `data.store.migrate` brings up to date."""


def written_by() -> str:
    """Return the name and version of what writes a store."""
    try:
        return f"manybrains {version('manybrains')}"
    except PackageNotFoundError:
        return "manybrains"


def format_version(root: zarr.Group) -> Any:
    """Return a store's format version; 0 for those from before the format was specified, which call themselves 1."""
    found = attribute(root, "format_version")
    return 0 if found == 1 and attribute(root, "written_by") is None else found


def _nothing(n_bytes: int) -> None:
    """Show no progress."""


def _occupied(path: str | Path) -> bool:
    """Return whether a local path holds more than what a kill left of creating a store; a URL is taken to be free."""
    local = Path(path)
    return local.is_file() or (local.is_dir() and any(file.suffix != ".partial" for file in local.iterdir()))


def _check_protocol(path: str | Path) -> None:
    """Raise ValueError where a URL is of a kind that fsspec doesn't know, or needs a package that isn't installed."""
    protocol, url, _ = str(path).partition("://")
    if not url:
        return
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path} can't be opened: {error}; install what it needs, or check the URL") from error


class PooledStore:
    """Many subjects and the images that they saw, under one root."""

    def __init__(self, path: str, root: zarr.Group) -> None:
        self.path = path
        self._root = root

    @classmethod
    def create(cls, path: str | Path, *, name: str, provenance: dict[str, Any] | None = None) -> "PooledStore":
        """Create an empty store at a path or fsspec URL.

        Raises
        ------
        ValueError
            If something is there already.
        """
        attrs = {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "provenance": provenance or {}}
        attrs |= {"written_by": written_by()}
        _check_protocol(path)
        refusal = f"{path} exists already; choose another path or remove it first"
        if _occupied(path):
            raise ValueError(refusal)
        try:
            root = zarr.create_group(str(path), zarr_format=3, attributes=attrs)
        except (FileExistsError, BaseZarrError) as error:
            raise ValueError(refusal) from error
        return cls(str(path), root)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> "PooledStore":
        """Open a store, read-only unless `writable`.

        Raises
        ------
        ValueError
            If nothing is there, if it is something else, or if a newer version of manybrains wrote it.
        """
        _check_protocol(path)
        try:
            root = zarr.open_group(str(path), mode="r", zarr_format=3)
        except (FileNotFoundError, GroupNotFoundError) as error:
            if _occupied(path):
                raise ValueError(f"{path} is there but is not a manybrains store (no Zarr v3 group)") from error
            raise _NoStoreError(f"no store at {path}; `python -m data phantom {path}` makes one to try") from error
        except ValueError as error:  # an array, or metadata that zarr can't read
            raise ValueError(f"{path} is there but is not a manybrains store ({error})") from error
        if attribute(root, "format") != FORMAT:
            raise ValueError(f"{path} is a Zarr group but not a manybrains store (no format attribute {FORMAT!r})")
        found = format_version(root)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            raise ValueError(
                f"{path} has store format {found!r}; this manybrains reads up to {FORMAT_VERSION}: update it"
            )
        if found < FORMAT_VERSION:
            raise OldStoreError(
                f"{path} has store format {found}, which this manybrains no longer reads as it is; "
                f"`python -m data migrate {path}` brings it to format {FORMAT_VERSION}"
            )
        if writable:  # only now: "r+" would leave an empty directory where nothing was
            root = zarr.open_group(str(path), mode="r+", zarr_format=3)
        return cls(str(path), root)

    @classmethod
    def open_or_create(cls, path: str | Path, *, name: str, provenance: dict[str, Any] | None = None) -> "PooledStore":
        """Open a store for writing, made first if nothing is there.

        Raises
        ------
        ValueError
            If something else is there, or a store that this version can't read.
        """
        try:
            return cls.open(path, writable=True)
        except _NoStoreError:
            return cls.create(path, name=name, provenance=provenance)

    @classmethod
    def open_if_there(cls, path: str | Path) -> "PooledStore | None":
        """Open a store read-only, or return None where nothing is; anything else there is an error, as in `open`."""
        try:
            return cls.open(path)
        except _NoStoreError:
            return None

    @property
    def name(self) -> str:
        """Name given at creation."""
        return attribute(self._root, "name")

    @property
    def provenance(self) -> dict[str, Any]:
        """How the store was made."""
        return attribute(self._root, "provenance")

    def _writing(self) -> AbstractContextManager[None]:
        """Hold images and subjects for writing."""
        if self._root.read_only:
            raise ValueError(f"{self.path} is opened read-only; open it with writable=True to add to it")
        return one_writer(self._root)

    def file_sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file, by its path within the store."""
        files = self._root.store
        return {key: size_of(files, key) for key in files_of(files)}

    def draft_bytes(self) -> int:
        """Return the size of what interrupted imports left, which the same imports go on with."""
        counted = [f"images/{name}/" for name, _ in image_blocks(self._root)]
        for subject, group in complete_members(self._root, "subjects"):
            counted += [f"subjects/{subject}/parts/{part}/" for part, _ in complete_members(group, "parts")]
        drafts = {key: size for key, size in self.file_sizes().items() if key.startswith(("images/", "subjects/"))}
        return sum(size for key, size in drafts.items() if not key.startswith(tuple(counted)))

    # -- images ------------------------------------------------------------------------------------------------------

    def image_blocks(self) -> list[tuple[str, int, tuple[int, int] | None]]:
        """Return each block's name, number of images, and the pictures' height and width (None without pixels)."""
        found = []
        for name, group in image_blocks(self._root):
            shape = array_at(group, "pixels").shape[1:3] if "pixels" in group else None
            found.append((name, array_at(group, "id").shape[0], shape))
        return found

    @property
    def n_images(self) -> int:
        """Number of images over all blocks."""
        return sum(array_at(group, "id").shape[0] for _, group in image_blocks(self._root))

    def image_ids(self) -> list[str]:
        """Return the identity of every image, by global row."""
        return image_ids(self._root)

    def image_roles(self) -> list[str]:
        """Return the split that the data set prescribes for every image ("" where it prescribes none)."""
        return image_roles(self._root)

    def picture_digests(self) -> dict[int, str]:
        """Return the digest of each image's pixels by global row, for the images that have pictures."""
        return picture_digests(self._root)

    def check_images(self, images: ImageBlock | ImageSource) -> None:
        """Raise ValueError if `images` contradict themselves, or the store on the role of an image."""
        images.check()
        there = dict(zip(self.image_ids(), self.image_roles(), strict=True))
        for identity, role in zip(images.ids, images.roles, strict=True):
            if there.get(identity, role) != role:
                raise ValueError(
                    f"image {identity!r} is in {self.path} with role {there[identity]!r}, not {role!r}; roles are "
                    f"global, so import it with the same role or into another store"
                )

    def add_images(self, block: ImageBlock) -> Int[np.ndarray, " image"]:
        """Append the images that aren't there yet and return the global row of each of `block`'s.

        An image that is there already keeps its row; the block must then agree on its role.
        """
        with self._writing():
            self.check_images(block)
            return write_images(self._root, block.source(), part=None, progress=_nothing)[0]

    def pixels(
        self, batch: int = 256, *, block: str | None = None, start: int = 0
    ) -> Iterator[tuple[str, int, UInt8[np.ndarray, "image height width 3"]]]:
        """Yield (block, first row within it, pixels) over all images, or over those of one block from `start` on.

        Raises
        ------
        ValueError
            If a block was stored without pixels.
        """
        for name, group in image_blocks(self._root):
            if block not in (None, name):
                continue
            if "pixels" not in group:
                raise ValueError(f"images of block {name} of {self.path} were stored without pixels; nothing to encode")
            array = array_at(group, "pixels")
            check_whole(array)
            for first in range(start, array.shape[0], batch):
                yield name, first, np.asarray(array[first : first + batch])

    # -- features ----------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> list[str]:
        """Names of the encoders whose tokens are there, of all images or of some."""
        return [name for name, group in members(self._root, "features") if attribute(group, "digest")]

    def _features(self, encoder: str) -> zarr.Group:
        return group_at(self._root, f"features/{encoder}")

    def missing_tokens(self, encoder: str) -> list[str]:
        """Return the image blocks that have no tokens of `encoder` yet."""
        have = {name for name, _ in complete_members(self._root, f"features/{encoder}")}
        return [name for name, _ in image_blocks(self._root) if name not in have]

    def begin_tokens(self, encoder: str, spec: dict[str, Any], *, provenance: dict[str, Any] | None = None) -> None:
        """Open an encoder's place in the store; `provenance` is kept beside `spec`, and identifies nothing.

        Raises
        ------
        ValueError
            If tokens of another encoder, or of other depths, bear that name.
        """
        check_name(encoder, "encoder")
        digest = json_digest(spec)
        if encoder not in self.encoders:
            attributes = {"spec": spec, "digest": digest, "provenance": provenance or {}}
            self._root.create_group(f"features/{encoder}", overwrite=True, attributes=attributes)
        elif attribute(self._features(encoder), "digest") != digest:
            raise ValueError(
                f"{self.path} has tokens named {encoder!r} from another encoder or other depths; "
                f"pass --name to keep both"
            )

    def tokens_written(self, encoder: str, block: str) -> int:
        """Return how many of a block's images an interrupted run has encoded already."""
        return rows_written(self._features(encoder), block)

    def n_encoded(self, encoder: str) -> int:
        """Return how many images have tokens of `encoder`, what an interrupted run has encoded included."""
        if encoder not in self.encoders:
            return 0
        missing = self.missing_tokens(encoder)
        sizes = {name: array_at(group, "id").shape[0] for name, group in image_blocks(self._root)}
        return sum(self.tokens_written(encoder, name) if name in missing else n for name, n in sizes.items())

    def write_tokens(self, encoder: str, block: str, batches: Iterable[NamedTokens]) -> None:
        """Write one block's tokens as they come, from image `tokens_written` on; they count when all are in."""
        n_images = array_at(self._root, f"images/{block}/id").shape[0]
        with one_writer(self._features(encoder)):
            write_tokens(self._features(encoder), block, n_images, batches)

    def tokens(self, encoder: str) -> TokenReader:
        """Return a reader of `encoder`'s tokens.

        Raises
        ------
        ValueError
            If the encoder's tokens are not there. Images added since they were computed are refused when read.
        """
        blocks = [(name, array_at(group, "id").shape[0]) for name, group in image_blocks(self._root)]
        if encoder not in self.encoders or not blocks:
            have = ", ".join(self.encoders) or "none"
            raise ValueError(
                f"{self.path} has no tokens of {encoder!r} (it has: {have}); run `python -m data features`"
            )
        missing = self.missing_tokens(encoder)
        if len(missing) == len(blocks):
            raise ValueError(
                f"{self.path} lacks {encoder!r} tokens of image block {missing[0]}; run `python -m data features` again"
            )
        return TokenReader(encoder, self.path, self._features(encoder), blocks, missing=set(missing))

    # -- subjects ----------------------------------------------------------------------------------------------------

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects, sorted."""
        return [name for name, group in complete_members(self._root, "subjects") if complete_members(group, "parts")]

    def add_subject(self, data: SubjectData) -> None:
        """Append a subject whose images are there, whole or not at all.

        Raises
        ------
        ValueError
            If it is there already, or contradicts itself.
        """
        with self._writing():
            if data.name in self.subjects:
                raise ValueError(
                    f"{data.name!r} is in {self.path} already; import it into another store or under another name"
                )
            ids = self.image_ids()
            data.check(n_images=len(ids))
            source = data.source(ids)
            rows = {identity: row for row, identity in enumerate(ids)}
            of_images = np.array([rows[identity] for identity in source.images.ids], np.int32)
            self._write_part(source, list(source.sessions), of_images, None, _nothing)

    def new_sessions(self, source: SubjectSource) -> list[SessionSource]:
        """Return the sessions of `source` that aren't there yet.

        Raises
        ------
        ValueError
            If the subject is there with other voxels, scale or trial columns, or a session with other trials.
        """
        if source.name not in self.subjects:
            return list(source.sessions)
        there = self.subject(source.name)
        where = f"{source.name!r} is in {self.path} already"
        if there.attrs["head_digest"] != source.head_digest():
            measures = {there.attrs.get("measure", ""), source.measure}
            what = "voxels, labels or units" if len(measures) == 1 else f"responses: {' and '.join(sorted(measures))}"
            raise ValueError(f"{where} with other {what}; import it into another store or under another name")
        new = [session for session in source.sessions if session.key not in there.session_digests]
        rows = {identity: row for row, identity in enumerate(self.image_ids())}
        if new and ("all" in there.session_digests or new[0].key == "all"):
            raise ValueError(f"{where}, and without a session index nothing can be told apart to append")
        for session in source.sessions:
            if session.key in there.session_digests:
                there.check_session(session, [rows.get(identity, -1) for identity in source.images.ids])
        return new

    def write_subject(self, source: SubjectSource, *, progress: Progress = _nothing) -> list[SessionSource]:
        """Append the sessions of `source` that aren't there, with the images that they showed: all of it or nothing.

        What an interrupted call left is gone on with, if it is the same. `progress` is told the bytes of responses and
        pictures as they are written. Returns the sessions that were new.

        Raises
        ------
        ValueError
            If the source contradicts itself or the store.
        """
        source.check()
        with self._writing():
            self.check_images(source.images)
            sessions = self.new_sessions(source)
            if sessions:
                part = f"subjects/{source.name}/parts/{self._next_part(source.name)}"
                rows, block = write_images(self._root, source.images, part=part, progress=progress)
                self._write_part(source, sessions, rows, block, progress)
        return sessions

    def _next_part(self, subject: str) -> str:
        return f"{len(complete_members(self._root, f'subjects/{subject}/parts')):04d}"

    def _write_part(
        self,
        source: SubjectSource,
        sessions: list[SessionSource],
        rows: Int[np.ndarray, " image"],
        image_block: str | None,
        progress: Progress,
    ) -> None:
        name = self._next_part(source.name)
        head = write_head(self._root.require_group("subjects"), source)
        part = draft_part(head, name, plan=plan_digest(source, sessions))
        digests = {session.key: write_session(part, source, session, progress) for session in sessions}
        check_still_ours(self._root, image_block, part=part.path)
        commit_part(part, source, sessions, digests, rows, image_block)

    def subject(self, name: str | int) -> SubjectStore:
        """Return a subject by name (``subj05``) or number (5).

        Raises
        ------
        ValueError
            If the store has no such subject.
        """
        name = self.resolve_subject(name)
        return SubjectStore(name, group_at(self._root, f"subjects/{name}"))

    def resolve_subject(self, subject: str | int) -> str:
        """Return the name of a subject given by name or number: 5 is ``subj05`` or, as BIDS has it, ``sub-05``."""
        return resolve_subject(str(subject), self.subjects, self.path)

    def digest(self, subjects: Sequence[str], encoder: str) -> str:
        """Return the digest of what a model uses: its encoder and its subjects, each with its own digest."""
        parts = {f"subject/{name}": self.subject(name).digest for name in subjects}
        parts[f"encoder/{encoder}"] = self.tokens(encoder).digest
        return json_digest(parts)
