"""What lies in a store, from one listing of its files: groups, arrays, chunk files, and what doesn't count.

Remains are what an interrupted write left: groups without ``complete``, and images whose subject never came. Readers
pass over them, and over files of zarr's that end in ``.partial``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import zarr

from data.store.shards import REMEDY, files_of
from data.store.zarr_arrays import attribute

CONTAINERS = ("images", "features", "subjects")


@dataclass
class StoreTree:
    """The files of a store by what they are; paths are those within the store."""

    groups: dict[str, zarr.Group] = field(default_factory=dict)
    arrays: dict[str, zarr.Array] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """What was wrong with metadata that can't be read."""
    chunks: dict[str, set[str]] = field(default_factory=dict)
    """Names of the chunk files of each array, such as ``c/0/0``."""
    partial: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    remains: set[str] = field(default_factory=set)

    def below(self, path: str) -> list[str]:
        """Return the names of the groups directly below a path, those with broken or missing metadata too."""
        start = f"{path}/" if path else ""
        paths = [key for key in (*self.groups, *self.broken, *self.arrays, *self.chunks) if key.startswith(start)]
        names = {key.removeprefix(start).partition("/")[0] for key in paths}
        return sorted(name for name in names if name and start + name not in {*self.arrays, *self.chunks})

    def attribute(self, path: str, name: str) -> Any:
        """Return an attribute of a group, None where there is no such thing."""
        return attribute(self.groups[path], name) if path in self.groups else None

    def counts(self, path: str) -> bool:
        """Return whether a path is outside all remains."""
        parts = path.split("/")
        return not any("/".join(parts[:n]) in self.remains for n in range(1, len(parts) + 1))


def read_tree(root: zarr.Group) -> StoreTree:
    """List a store's files, and open all of its groups and arrays."""
    tree = StoreTree()
    for key in files_of(root.store):
        head, _, name = key.rpartition("/")
        array, chunk, place = key.rpartition("/c/")
        if name == "zarr.json":
            _open(tree, root, head)
        elif key.endswith(".partial"):
            tree.partial.append(key)
        elif chunk and place.replace("/", "").isdecimal():
            tree.chunks.setdefault(array, set()).add(f"c/{place}")
        else:
            tree.others.append(key)
    tree.remains |= {*_unfinished_subjects(tree), *_unfinished_images(tree), *_unfinished_tokens(tree)}
    return tree


def _open(tree: StoreTree, root: zarr.Group, path: str) -> None:
    try:
        node = root[path] if path else root
    except Exception as error:  # noqa: BLE001  whatever zarr makes of broken metadata is something to tell
        tree.broken[path] = " ".join(str(error).split()) or repr(error)
        return
    if isinstance(node, zarr.Array):
        tree.arrays[path] = node
    else:
        tree.groups[path] = node


def _unfinished_subjects(tree: StoreTree) -> Iterator[str]:
    for name in tree.below("subjects"):
        path = f"subjects/{name}"
        parts = [f"{path}/parts/{part}" for part in tree.below(f"{path}/parts")]
        drafts = [part for part in parts if part in tree.groups and not tree.attribute(part, "complete")]
        yield from drafts
        if path in tree.groups and (not tree.attribute(path, "complete") or len(drafts) == len(parts)):
            yield path


def _unfinished_images(tree: StoreTree) -> Iterator[str]:
    for name in tree.below("images"):
        path = f"images/{name}"
        part = tree.attribute(path, "part")
        named = isinstance(part, str)
        committed = part is None or (named and (part in tree.broken or tree.attribute(part, "image_block") == name))
        if path in tree.groups and not (tree.attribute(path, "complete") and committed):
            yield path


def _unfinished_tokens(tree: StoreTree) -> Iterator[str]:
    for encoder in tree.below("features"):
        for block in tree.below(f"features/{encoder}"):
            path = f"features/{encoder}/{block}"
            if path in tree.groups and not tree.attribute(path, "complete"):
                yield path


def remarks(tree: StoreTree) -> list[str]:
    """Return, a line each, what is odd but does no harm."""
    lines = [f"{key}: left by an interrupted write, does no harm; remove it" for key in tree.partial]
    for path in sorted(tree.remains):
        again = "`python -m data features`" if path.startswith("features/") else "the import"
        lines.append(f"{path}: remains of an interrupted write, which do no harm; run {again} again")
    strange = [key for key in tree.others if tree.counts(key)]
    strange += [path for path in tree.below("") if path not in CONTAINERS]
    return lines + [f"{path}: this format knows no such thing, so it is passed over" for path in strange]


def loose_ends(tree: StoreTree) -> list[str]:
    """Return, a line each, metadata that can't be read or isn't there."""
    found = [
        f"{path}/zarr.json: unreadable ({error}); {REMEDY}" for path, error in tree.broken.items() if tree.counts(path)
    ]
    for path in sorted(set(tree.chunks) - set(tree.arrays) - set(tree.broken)):
        if tree.counts(path):
            found.append(f"{path}: chunks without an array, since its zarr.json is missing; {REMEDY}")
    paths = [*tree.groups, *tree.arrays, *tree.chunks]
    parents = {path[:at] for path in paths for at, letter in enumerate(path) if letter == "/"}
    for path in sorted(parents - set(tree.groups) - set(tree.arrays) - set(tree.broken)):
        if tree.counts(path) and _matters(tree, path):
            found.append(f"{path}/zarr.json: missing, so that nothing below it is seen; {REMEDY}")
    return found


def _matters(tree: StoreTree, path: str) -> bool:
    """Return whether a missing group is more than an interruption: zarr writes a group before its parents."""
    if path not in CONTAINERS and not path.endswith("/parts"):
        return True
    below = [f"{path}/{name}" for name in tree.below(path)]
    return any(tree.attribute(name, "complete") or tree.attribute(name, "digest") for name in below)
