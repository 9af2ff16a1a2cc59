"""``docs/store-format.md`` suffices: with zarr, numpy and hashlib alone one finds everything, and the same digests."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import zarr

from data.schema import pixel_identity
from data.sources import ImageBlock, SessionSource, SubjectSource
from data.store import PooledStore
from data.voxels import Rois, Surface, Volume, VoxelTable

VOLUME = Volume(
    shape=(2, 3, 2), affine=np.diag([1.8, 1.8, 1.8, 1.0]), index=np.array([[0, 0, 1], [1, 2, 0], [1, 1, 1]], np.int32)
)
SURFACE = Surface(
    space="fsaverage",
    n_vertices=(11, 9),
    hemisphere=np.array([0, 1, 1], np.int8),
    vertex=np.array([10, 0, 8], np.int32),
)
TABLES = {
    "volume": VoxelTable(n_voxels=3, place=VOLUME, coordinates=VOLUME.coordinates()),
    "surface": VoxelTable(n_voxels=3, place=SURFACE),
    "positions": VoxelTable(n_voxels=3, coordinates=np.arange(9, dtype=np.float32).reshape(3, 3)),
    "labels": VoxelTable(
        n_voxels=3,
        rois={
            "streams": Rois(labels=np.array([0, 10, 2], np.int16), names={2: "early", 10: "ventral"}),
            "area": Rois(labels=np.array([1, 0, 0], np.int16), names={1: "V1"}),
        },
    ),
}


def source(voxels: VoxelTable) -> SubjectSource:
    roles = ["test", *["train"] * 4]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)

    def session(number: int) -> SessionSource:
        responses = np.random.default_rng(number).integers(-900, 900, (4, 3), dtype=np.int16)
        columns = {
            "image": ((np.arange(4) + number) % 5).astype(np.int32),
            "run": np.array([1, 1, 2, 2], np.int16),
            "time_s": np.arange(4, dtype=np.float32) * 4,
        }
        return SessionSource(session=number, columns=columns, read=lambda: iter([responses]))

    return SubjectSource(
        name="subj01",
        dtype=np.dtype(np.int16),
        scale=1 / 300,
        unit="percent signal change",
        measure="b3",
        voxels=voxels,
        images=ImageBlock(ids=[f"nsd-{k:05d}" for k in range(5)], roles=roles, pixels=pixels).source(),
        sessions=(session(1), session(2)),
    )


# -- the page's rules, written out once more ---------------------------------------------------------------------------


def digest(*parts: str | np.ndarray) -> str:
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype.str}{part.shape}".encode() + part.tobytes())
        else:
            sha.update(part.encode())
        sha.update(b"\0")
    return "sha256:" + sha.hexdigest()


def json_digest(value: object) -> str:
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":")))


def voxel_digest(group: zarr.Group) -> str:
    n_voxels = next(iter(next(iter(dict(group["parts"].groups()).values()))["responses"].arrays()))[1].shape[1]
    parts: list[str | np.ndarray] = [str(n_voxels)]
    place = group.attrs["place"]
    if place is None and "voxels" in group:
        parts += ["coordinates", group["voxels/coordinates"][...]]
    elif place is not None and place["kind"] == "volume":
        affine = np.array(place["affine"], np.float64)
        parts += ["volume", str(tuple(place["shape"])), affine, group["voxels/index"][...]]
    elif place is not None:
        parts += ["surface", place["space"], str(tuple(place["n_vertices"]))]
        parts += [group["voxels/hemisphere"][...], group["voxels/vertex"][...]]
    if "rois" in group:
        for family in sorted(group["rois"].array_keys()):
            labels = group[f"rois/{family}"]
            parts += [family, labels[...], json_digest(dict(labels.attrs["names"]))]
    return digest(*parts)


def subject_digest(root: zarr.Group, name: str) -> str:
    group = root[f"subjects/{name}"]
    attrs = group.attrs
    upstream = attrs["upstream_preprocessing"] or ""
    head = digest(name, repr(attrs["scale"]), attrs["unit"], attrs["measure"], upstream, voxel_digest(group))
    ids = image_ids(root)
    sessions = {}
    for _, part in sorted(group["parts"].groups()):
        start = 0
        for key in sorted(part.attrs["n_trials"]):
            rows = slice(start, start := start + part.attrs["n_trials"][key])
            responses = part[f"responses/{key}"][...]
            bare = hashlib.sha256(f"{responses.dtype.str}{responses.shape}".encode() + responses.tobytes()).hexdigest()
            shown = "\n".join(ids[row] for row in part["trials/image"][rows])
            columns = [c for c in ("run", "repeat", "n_averaged", "time_s") if c in part["trials"]]
            sessions[key] = digest(bare, key, shown, *(p for c in columns for p in (c, part[f"trials/{c}"][rows])))
    return digest(head, *(p for key in sorted(sessions) for p in (key, sessions[key])))


def image_ids(root: zarr.Group) -> list[str]:
    found = []
    for name, block in sorted(root["images"].groups()):
        part = block.attrs["part"]
        if block.attrs.get("complete") and (part is None or root[part].attrs["image_block"] == name):
            found += [bytes(row).rstrip(b"\0").decode() for row in block["id"][...]]
    return found


# -- and what they find ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TABLES)
def test_digests_follow_from_the_page(tmp_path, kind):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    whole = source(TABLES[kind])
    store.write_subject(replace(whole, sessions=whole.sessions[:1]))
    store.write_subject(whole)
    root = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert subject_digest(root, "subj01") == PooledStore.open(store.path).subject("subj01").digest
    block = root["images/0000"]
    roles = [block.attrs["role_names"][code] for code in block["role"][...]]
    assert block.attrs["digest"] == digest(block["id"][...], "\n".join(roles))


def test_responses_pictures_and_tokens_are_where_the_page_says(tmp_path):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    given = source(TABLES["volume"])
    store.write_subject(given)
    store.begin_tokens("enc", {"depths": [3]})
    cls, patch = np.full((5, 1, 2), 0.5, np.float16), np.full((5, 1, 4, 2), 2, np.float16)
    store.write_tokens("enc", "0000", [{"cls": cls, "patch": patch}])
    root = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert root.attrs["format"] == "manybrains-store"
    assert image_ids(root) == given.images.ids
    group = root["subjects/subj01"]
    percent = group["parts/0000/responses/0002"][...] * group.attrs["scale"]
    np.testing.assert_allclose(percent, next(given.sessions[1].read()) / 300)
    picture = root["images/0000/pixels"][3]
    np.testing.assert_array_equal(picture, given.images.read(np.array([3]))[0])
    assert root["images/0000/pixel_digest"][3].tobytes().hex() == pixel_identity(picture).removeprefix("sha256:")
    np.testing.assert_array_equal(root["features/enc/0000/patch"][4], patch[4])
    assert root["features/enc"].attrs["digest"] == json_digest(dict(root["features/enc"].attrs["spec"]))
    for _, array in root.members(max_depth=None):
        if isinstance(array, zarr.Array):
            assert array.metadata.codecs[0].to_dict()["configuration"]["codecs"][-1]["name"] == "crc32c"
