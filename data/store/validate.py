"""Is a store what ``docs/store-format.md`` says, and every byte as it was written? Findings name what and where."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from data.audit import same_pictures
from data.schema import TRIAL_COLUMNS, json_digest, pixel_identity
from data.sources import ImageSource, SessionSource, SubjectSource, session_digest
from data.splits import split_images
from data.store.images import block_digest, decode_ids
from data.store.pooled import PooledStore
from data.store.shards import REMEDY, has_checksums, read_shards
from data.store.subjects import SubjectStore
from data.store.tokens import GLOBAL_TOKENS
from data.store.tree import loose_ends, read_tree, remarks
from data.store.zarr_arrays import attribute

ENCODE_AGAIN = "remove that directory and run `python -m data features` again"


def validate(
    path: str | Path,
    *,
    deep: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    remark: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Check a store and return what is wrong with it, a line each; nothing if it is valid.

    Parameters
    ----------
    deep
        Read every chunk of every array, recompute the digests of content, and look for pictures under two identities.
        Else only metadata, the tables of images, trials and voxels, and the shards' presence and indices are checked.
    progress
        Told how many bytes of arrays are checked, and of how many.
    remark
        Told, a line each, what is odd but does no harm.

    Raises
    ------
    ValueError
        If there is no store, or none that this version reads.
    """
    PooledStore.open(path)
    check = _Check(zarr.open_group(str(path), mode="r", zarr_format=3), progress, remark, deep=deep)
    check.run()
    return check.found


class _Check:
    """One pass over a store: what is in it, and what was found so far."""

    def __init__(
        self, root: zarr.Group, progress: Callable[[int, int], None], remark: Callable[[str], None], *, deep: bool
    ) -> None:
        self.root, self.progress, self.remark, self.deep = root, progress, remark, deep
        self.found: list[str] = []
        self.tree = read_tree(root)
        self.done = 0
        self.total = sum(array.nbytes for path, array in self.tree.arrays.items() if self.tree.counts(path))
        self.seen: set[str] = set()
        self.ids: list[str] = []
        self.roles: list[str] = []
        self.pictures: dict[int, str] = {}
        self.n_of_block: dict[str, int] = {}
        self.read_blocks: set[str] = set()
        self.images_whole = False

    def run(self) -> None:
        for line in remarks(self.tree):
            self.remark(line)
        self.found += loose_ends(self.tree)
        for name, kind in (("name", str), ("provenance", dict), ("written_by", str)):
            if not isinstance(attribute(self.root, name), kind):
                self.found.append(f"zarr.json: attribute {name!r} must be a {kind.__name__}; {REMEDY}")
        for container, check in (
            ("images", self._image_block),
            ("features", self._encoder),
            ("subjects", self._subject),
        ):
            names = [n for n in self.tree.below(container) if self.tree.counts(f"{container}/{n}")]
            if container == "images":
                self._in_a_row("images", names)
            for name in names:
                path = f"{container}/{name}"
                if path in self.tree.groups:
                    with self._telling(path):
                        check(path, name)
            if container == "images":
                self.images_whole = self.read_blocks == set(names)
                self._image_identities()
        for path in sorted(self.tree.arrays):
            if path not in self.seen and self.tree.counts(path):
                self.remark(f"{path}: this format knows no such array, so it is passed over")
                with self._telling(path):
                    self._read(path)

    @contextmanager
    def _telling(self, path: str) -> Iterator[None]:
        """Turn whatever goes wrong inside into a finding about `path`."""
        try:
            yield
        except ValueError as error:
            self._found(path, " ".join(str(error).split()))
        except Exception as error:  # noqa: BLE001  damage that nobody foresaw is a finding, not a traceback
            self._found(path, f"can't be checked ({type(error).__name__}: {' '.join(str(error).split())})")

    def _found(self, path: str, what: str, remedy: str = REMEDY) -> None:
        told = what if remedy in what else f"{what}; {remedy}"
        self.found.append(f"{path}: {told}")

    def _in_a_row(self, container: str, names: list[str]) -> None:
        """Blocks and parts are numbered as they come, so a gap is something lost."""
        if gone := sorted({f"{n:04d}" for n in range(len(names))} - set(names)):
            self._found(f"{container}/{gone[0]}", f"missing or not complete, though {container}/{names[-1]} is there")

    # -- arrays --------------------------------------------------------------------------------------------------------

    def _array(self, path: str, n_rows: int | None, dtype: Any = None, ndim: int = 1) -> zarr.Array | None:
        """Return an array if it is there with this type, these dimensions and rows; else tell."""
        self.seen.add(path)
        array = self.tree.arrays.get(path)
        if array is None:
            if path not in self.tree.broken and path not in self.tree.chunks:
                self._found(path, "the array is missing")
            return None
        wrong = []
        if dtype is not None and array.dtype != np.dtype(dtype):
            wrong.append(f"dtype {array.dtype} instead of {np.dtype(dtype)}")
        if array.ndim != ndim:
            wrong.append(f"{array.ndim} dimensions instead of {ndim}")
        if n_rows is not None and array.shape[:1] != (n_rows,):
            wrong.append(f"shape {array.shape}, which should begin with {n_rows}")
        if wrong:
            self._found(path, " and ".join(wrong))
        return None if wrong else array

    def _stream(self, path: str, *, deep: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of an array's good shards, and tell of the others."""
        array = self.tree.arrays[path]
        self.seen.add(path)
        if not has_checksums(array):
            self.remark(f"{path}: written without checksums by an older version, so damage may go unnoticed")
        for start, rows in read_shards(array, self.tree.chunks.get(path, set()), deep=deep, found=self.found):
            self.progress(self.done + start * array.nbytes // max(1, array.shape[0]), self.total)
            yield start, rows
        self.done += array.nbytes
        self.progress(self.done, self.total)

    def _read(self, path: str) -> None:
        """Check an array whose values nobody asks for."""
        for _ in self._stream(path, deep=self.deep):
            pass

    def _table(self, path: str, n_rows: int | None, dtype: Any = None, ndim: int = 1) -> np.ndarray | None:
        """Return a whole small array, None if anything is wrong with it."""
        if self._array(path, n_rows, dtype, ndim) is None:
            return None
        before = len(self.found)
        blocks = [rows for _, rows in self._stream(path, deep=True)]
        return np.concatenate(blocks) if len(self.found) == before and blocks else None

    # -- images --------------------------------------------------------------------------------------------------------

    def _image_block(self, path: str, name: str) -> None:
        attrs, first = self.tree.groups[path].attrs.asdict(), len(self.ids)
        encoded = self._table(f"{path}/id", None, np.uint8, 2)
        if f"{path}/id" in self.tree.arrays:
            self.n_of_block[name] = self.tree.arrays[f"{path}/id"].shape[0]
        roles = self._table(f"{path}/role", None if encoded is None else len(encoded), np.uint8)
        names: Any = attrs.get("role_names")
        if not isinstance(names, list) or not set(names) <= {"", "train", "validation", "test"}:
            self._found(path, f"attribute 'role_names' is {names!r}")
        elif roles is not None and roles.max() >= len(names):
            self._found(f"{path}/role", f"role {roles.max()} of row {roles.argmax()} is not among {names}")
        elif roles is not None and encoded is not None:
            self.roles += [names[code] for code in roles]
        if encoded is not None:
            known = roles is not None and isinstance(names, list) and roles.max() < len(names)
            named = [names[code] for code in roles] if roles is not None and known else None
            if named is not None and block_digest(encoded, named) != attrs.get("digest"):
                self._found(path, "the ids and roles are not those of the attribute 'digest'")
            self.ids += decode_ids(encoded)
            ImageSource(ids=self.ids[first:], roles=[""] * len(encoded)).check()
            self.read_blocks.add(name)
        if f"{path}/pixels" in self.tree.arrays or attrs.get("pixel_shape"):
            self._pixels(f"{path}/pixels", attrs.get("pixel_shape"), first, None if encoded is None else len(encoded))

    def _pixels(self, path: str, shape: Any, first: int, n_images: int | None) -> None:
        array = self._array(path, n_images, np.uint8, 4)
        if array is None:
            return
        if array.shape[3] != 3 or (shape and list(array.shape[1:3]) != shape):
            self._found(path, f"shape {array.shape} instead of ({n_images}, {', '.join(map(str, shape or 'hw'))}, 3)")
        digests = None
        if shape:  # stores from before the format was specified have no digests of pictures
            digests = self._table(path.replace("pixels", "pixel_digest"), n_images, np.uint8, 2)
        for start, rows in self._stream(path, deep=self.deep):
            for k, pixels in enumerate(rows):
                found = self.pictures[first + start + k] = pixel_identity(pixels)
                if digests is not None and found != f"sha256:{digests[start + k].tobytes().hex()}":
                    self._found(path, f"the picture of row {start + k} is not the one that 'pixel_digest' speaks of")

    def _image_identities(self) -> None:
        """Every image has one row, and no picture stands in two parts of the split under two names."""
        rows: dict[str, int] = {}
        for row, identity in enumerate(self.ids):
            if identity in rows:
                self._found("images", f"image id {identity!r} is on rows {rows[identity]} and {row}")
            rows.setdefault(identity, row)
        if self.images_whole and len(self.ids) == len(self.roles):
            self.found += same_pictures(self.ids, split_images(self.ids, self.roles), self.pictures)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _encoder(self, path: str, name: str) -> None:
        spec, digest = self.tree.attribute(path, "spec"), self.tree.attribute(path, "digest")
        blocks = [block for block in self.tree.below(path) if f"{path}/{block}" in self.tree.groups]
        blocks = [block for block in blocks if self.tree.counts(f"{path}/{block}")]
        if digest is None and not blocks:
            return
        if not isinstance(spec, dict) or json_digest(spec) != digest:
            self._found(path, "attribute 'spec' is not what its 'digest' says", ENCODE_AGAIN)
        depths = spec.get("depths") if isinstance(spec, dict) else None
        shapes = {}
        for block in blocks:
            with self._telling(f"{path}/{block}"):
                shapes[block] = self._tokens(f"{path}/{block}", self.n_of_block.get(block), depths)
        if len(set(shapes.values())) > 1:
            (block, shape), *others = shapes.items()
            other = next((name, found) for name, found in others if found != shape)
            self._found(path, f"tokens {shape} of block {block} but {other[1]} of block {other[0]}", ENCODE_AGAIN)

    def _tokens(self, path: str, n_images: int | None, depths: Any) -> str:
        """Check a block's tokens, and return what has to be alike in all blocks."""
        if n_images is None:
            self._found(path, "tokens of images that aren't there", ENCODE_AGAIN)
        named = self.tree.attribute(path, "tokens")
        here = [n for n in ("patch", "register", *GLOBAL_TOKENS) if f"{path}/{n}" in self.tree.arrays]
        wanted = set(named if named is not None else here) | {"patch"}
        if not wanted & set(GLOBAL_TOKENS):
            self._found(path, f"no token of the whole image, neither {' nor '.join(GLOBAL_TOKENS)}", ENCODE_AGAIN)
        shapes = {}
        for name in sorted(wanted | set(here)):
            array = self._array(f"{path}/{name}", n_images, np.float16, 3 if name in GLOBAL_TOKENS else 4)
            if array is None:
                continue
            shapes[name] = array.shape[1:]
            if isinstance(depths, list) and array.shape[1] != len(depths):
                self._found(f"{path}/{name}", f"{array.shape[1]} depths, but the encoder has {depths}", ENCODE_AGAIN)
            self._read(f"{path}/{name}")
        if len({shape[-1] for shape in shapes.values()}) > 1:
            self._found(path, f"tokens of different widths: {shapes}", ENCODE_AGAIN)
        return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))

    # -- subjects ------------------------------------------------------------------------------------------------------

    def _subject(self, path: str, name: str) -> None:
        parts = [p for p in self.tree.below(f"{path}/parts") if self.tree.counts(f"{path}/parts/{p}")]
        self._in_a_row(f"{path}/parts", parts)
        parts = [f"{path}/parts/{p}" for p in parts if f"{path}/parts/{p}" in self.tree.groups]
        before = len(self.found)
        for head in ("voxels", "rois", "reliability"):
            for array in sorted(a for a in self.tree.arrays if a.startswith(f"{path}/{head}/")):
                self._table(array, None, np.int16 if head == "rois" else None, self.tree.arrays[array].ndim)
                if head == "rois" and not isinstance(attribute(self.tree.arrays[array], "names"), dict):
                    self._found(array, "attribute 'names' is missing")
        if self.tree.attribute(path, "coordinates") and f"{path}/voxels/coordinates" not in self.seen:
            self._found(f"{path}/voxels/coordinates", "the array is missing")
        for reliability in self.tree.attribute(path, "reliability") or []:
            if f"{path}/reliability/{reliability}" not in self.seen:
                self._found(f"{path}/reliability/{reliability}", "the array is missing")
        source: SubjectSource | None = None
        with self._telling(path):
            source = self._head(path, name, parts) if len(self.found) == before else None
        sessions: dict[str, str] = {}
        for part in parts:
            with self._telling(part):
                for key in self._part(part, source):
                    if key in sessions:
                        self._found(part, f"session {key} is in {sessions[key]} already")
                    sessions[key] = part

    def _head(self, path: str, name: str, parts: list[str]) -> SubjectSource | None:
        """Check what a subject has beside its sessions; return it as a source without any."""
        sessions = [f"{p}/responses/{key}" for p in parts for key in self.tree.attribute(p, "digests")]
        if not sessions or not set(sessions) <= set(self.tree.arrays):
            return None  # which is told where the sessions are checked
        attrs: dict[str, Any] = self.tree.groups[path].attrs.asdict()
        voxels = SubjectStore(name, self.tree.groups[path]).voxels
        source = SubjectSource(
            name=name,
            dtype=self.tree.arrays[sessions[0]].dtype,
            voxels=voxels,
            images=ImageSource(ids=self.ids, roles=self.roles),
            sessions=(),
            scale=attrs["scale"],
            unit=attrs["unit"],
            measure=attrs.get("measure", ""),
            upstream_preprocessing=attrs["upstream_preprocessing"],
        )
        voxels.check()
        if source.head_digest() != attrs["head_digest"]:
            self._found(path, "scale, unit, places or labels of voxels are not what the attribute 'head_digest' says")
        return source

    def _part(self, path: str, source: SubjectSource | None) -> list[str]:
        """Check one import's sessions and return their keys."""
        attrs: dict[str, Any] = self.tree.groups[path].attrs.asdict()
        n_trials, digests = attrs["n_trials"], attrs["digests"]
        if list(n_trials) != list(digests):
            self._found(path, f"attribute 'n_trials' has sessions {list(n_trials)}, 'digests' {list(digests)}")
        for name in ("files", "provenance"):
            if not isinstance(attrs.get(name), dict):
                self._found(path, f"attribute {name!r} is missing")
        block = attrs.get("image_block")
        if block is not None and block not in self.n_of_block:
            self._found(path, f"the images that came with it, images/{block}, are missing or not complete")
        before = len(self.found)
        columns: dict[str, np.ndarray] = {}
        for name, kind in TRIAL_COLUMNS.items():
            where = f"{path}/trials/{name}"
            if (name != "session" and where in self.tree.arrays) or name == "image":
                column = self._table(where, sum(n_trials.values()), kind)
                columns |= {} if column is None else {name: column}
        image = columns.get("image")
        if image is not None and self.images_whole and not 0 <= image.min() <= image.max() < len(self.ids):
            bad = np.flatnonzero((image < 0) | (image >= len(self.ids)))[0]
            self._found(f"{path}/trials/image", f"trial {bad} shows image {image[bad]} of {len(self.ids)}")
        whole = self.images_whole and len(self.found) == before and source is not None
        start = 0
        for key, n in n_trials.items():
            there = {name: column[start : start + n] for name, column in columns.items()}
            start += n
            self._session(f"{path}/responses/{key}", key, n, digests.get(key), source, there if whole else None)
        return list(n_trials)

    def _session(
        self,
        path: str,
        key: str,
        n_trials: int,
        digest: str | None,
        source: SubjectSource | None,
        columns: dict[str, np.ndarray] | None,
    ) -> None:
        """Check one session's responses; without its `columns`, not against its digest."""
        array = self._array(path, n_trials, None if source is None else source.dtype, 2)
        if array is None:
            return
        if source is not None and array.shape[1] != source.voxels.n_voxels:
            self._found(path, f"{array.shape[1]} voxels instead of {source.voxels.n_voxels}")
        if attribute(array, "digest") != digest:
            self._found(path, "the attribute 'digest' differs from its part's")
        if not self.deep or source is None or columns is None:
            return self._read(path)
        session = SessionSource(session=None if key == "all" else int(key), columns=columns, read=lambda: iter(()))
        before = len(self.found)
        content = session_digest(source, session, (rows for _, rows in self._stream(path, deep=True)))
        if len(self.found) == before and content != digest:
            self._found(path, "responses or trials are not what the attribute 'digest' says")
