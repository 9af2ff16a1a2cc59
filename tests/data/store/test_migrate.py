"""A store of the first layout becomes one of the current format in place, with all that was in it, at any interruption.

The old layout is written here by plain zarr calls: a subject had one array ``responses`` for all trials, in the order
that they were given, and ``trials/session`` as a column.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec

from data.__main__ import main
from data.store import PooledStore
from data.store.migrate import migrate
from data.store.validate import validate
from tests.dying_import import Stopped, counted, stop

IDS = ["a", "bee", "ç", "d", "e", "f"]
ROLES = ["", "train", "validation", "test"]
ROLE = np.array([0, 0, 1, 3, 2, 0], np.uint8)
SPEC = {"kind": "noise", "depths": [1, 2]}


def put(group: zarr.Group, name: str, values: np.ndarray, **attributes) -> None:
    """Write an array as the first layout had it: sharded, compressed, without checksums, chunks of zeros left out."""
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(2, *values.shape[1:]),
        shards=(4, *values.shape[1:]),
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
        attributes=attributes,
    )
    array[...] = values


def content() -> dict:
    """What is in the old store, per subject; the second's trials are not in the order of its sessions."""
    rng = np.random.default_rng(0)
    ordered, mixed = np.array([1, 1, 2, 2, 2], np.int16), np.array([2, 1, 2, 1, 1, 3], np.int16)
    return {
        "subj01": {
            "responses": rng.integers(-300, 300, (5, 3)).astype(np.int16),
            "trials": {"image": np.array([0, 3, 3, 1, 5], np.int32), "session": ordered, "run": ordered + np.int16(3)},
            "coordinates": rng.normal(size=(3, 3)).astype(np.float32),
            "rois": {"streams": (np.array([0, 5, 2], np.int16), {"5": "ventral", "2": "early"})},
            "attrs": {"scale": 1 / 300, "unit": "percent signal change", "provenance": {"importer": "old"}},
        },
        "subj02": {
            "responses": rng.normal(size=(6, 4)).astype(np.float32),
            "trials": {"image": np.array([5, 4, 3, 2, 1, 0], np.int32), "session": mixed},
            "attrs": {"scale": 1.0, "unit": "a.u.", "provenance": {}},
        },
        "averaged": {
            "responses": rng.normal(size=(4, 2)),
            "trials": {"image": np.array([0, 1, 2, 3], np.int32), "n_averaged": np.full(4, 3, np.float32)},
            "attrs": {"scale": 1.0, "unit": "z", "provenance": {}, "upstream_preprocessing": "averaged over repeats"},
        },
    }


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("old") / "s.zarr"
    head = {"format": "manybrains-store", "format_version": 1, "name": "old", "provenance": {"by": "hand"}}
    root = zarr.open_group(str(path), mode="w-", zarr_format=3, attributes=head)
    ids = np.array([list(i.encode().ljust(3, b"\0")) for i in IDS], np.uint8)
    block = root.create_group("images/0000")
    put(block, "id", ids)
    put(block, "role", ROLE)
    put(block, "pixels", pictures())
    digest = "sha256:" + hashlib.sha256(f"{ids.dtype.str}{ids.shape}".encode() + ids.tobytes() + b"\0").hexdigest()
    block.attrs.put({"complete": True, "digest": digest, "role_names": ROLES})
    canonical = json.dumps(SPEC, sort_keys=True, separators=(",", ":")).encode()
    digest = "sha256:" + hashlib.sha256(canonical + b"\0").hexdigest()
    tokens = root.create_group("features/noise/0000")
    root["features/noise"].attrs.put({"spec": SPEC, "digest": digest})
    for name, values in token_arrays().items():
        put(tokens, name, values)
    tokens.attrs.put({"complete": True})
    for name, subject in content().items():
        group = root.create_group(f"subjects/{name}")
        put(group, "responses", subject["responses"])
        for column, values in subject["trials"].items():
            put(group, f"trials/{column}", values)
        if "coordinates" in subject:
            put(group, "voxels/coordinates", subject["coordinates"])
        for family, (labels, names) in subject.get("rois", {}).items():
            put(group, f"rois/{family}", labels, names=names)
        attrs = {"complete": True, "digest": "sha256:of another making", "upstream_preprocessing": None}
        group.attrs.put(attrs | subject["attrs"])
    root.create_group("subjects/unfinished/trials")  # what an interrupted import left
    return path


def pictures() -> np.ndarray:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 4, 5, 3), np.uint8)
    pixels[:2] = [[[[1]]], [[[0]]]]
    return pixels


def token_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    shapes = {"cls": (6, 2, 3), "patch": (6, 2, 4, 3)}
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def check(path: Path) -> None:
    """Everything is there, trials in the order of sessions."""
    store = PooledStore.open(path)
    assert (store.name, store.provenance) == ("old", {"by": "hand"})
    assert store.image_ids() == IDS
    assert store.image_roles() == [ROLES[code] for code in ROLE]
    np.testing.assert_array_equal(np.concatenate([pixels for _, _, pixels in store.pixels()]), pictures())
    cls, patch = store.tokens("noise").read(np.array([4, 0, 2]))
    np.testing.assert_array_equal(cls, token_arrays()["cls"][[4, 0, 2]])
    np.testing.assert_array_equal(patch, token_arrays()["patch"][[4, 0, 2]])
    given = content()
    assert store.subjects == sorted(given)
    for name, record in given.items():
        subject, trials = store.subject(name), record["trials"]
        order = np.argsort(trials["session"], kind="stable") if "session" in trials else slice(None)
        expected = record["responses"].astype(np.float32) * np.float32(record["attrs"]["scale"])
        np.testing.assert_array_equal(subject.responses(), expected[order])
        for column in ("image", "session", "run", "repeat", "n_averaged", "time_s"):
            found = subject.trial_column(column)
            if column in trials:
                np.testing.assert_array_equal(found, trials[column][order])
            else:
                assert found is None
        if "coordinates" in record:
            np.testing.assert_array_equal(subject.coordinates, record["coordinates"])
        else:
            assert subject.coordinates is None
        assert set(subject.rois) == set(record.get("rois", {}))
        for family, (labels, names) in record.get("rois", {}).items():
            np.testing.assert_array_equal(subject.rois[family].labels, labels)
            assert subject.rois[family].names == {int(label): text for label, text in names.items()}
        assert subject.attrs["unit"] == record["attrs"]["unit"]
        assert subject.upstream_preprocessing == record["attrs"].get("upstream_preprocessing")
        assert subject.provenance == record["attrs"]["provenance"]
    left = [file for file in (path / "subjects").glob("*/*") if file.name in ("responses", "trials")]
    assert [file.parent.name for file in left] == ["unfinished"]


def bytes_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_old_store_is_refused_with_the_command_that_helps_and_left_alone(old):
    before = bytes_of(old)
    for writable in (False, True):
        with pytest.raises(
            ValueError, match=r"store format 0, .*`python -m data migrate .*s.zarr` brings it to format 1"
        ):
            PooledStore.open(old, writable=writable)
    with pytest.raises(ValueError, match="store format 0"):
        PooledStore.open_or_create(old, name="x")
    with pytest.raises(ValueError, match="store format 0"):
        validate(old)
    assert bytes_of(old) == before


def test_migration_keeps_everything_and_the_store_is_valid(old, tmp_path, monkeypatch, capsys):
    path = Path(shutil.copytree(old, tmp_path / "s.zarr"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["python -m data", "migrate", str(path)])
    main()
    out = capsys.readouterr().out
    assert f"{path}: format 0 is now format 1" in out
    check(path)
    remarks = []
    assert validate(path, remark=remarks.append) == []
    assert any("images/0000/pixels: written without checksums" in line for line in remarks)
    kept = {name: value for name, value in bytes_of(old).items() if name.startswith(("images", "features"))}
    kept = {name: value for name, value in kept.items() if not re.fullmatch(r"images/\d+/zarr.json", name)}  # digests
    assert any(name.startswith("images/0000/pixels") for name in kept)
    assert {name: bytes_of(path)[name] for name in kept} == kept


def test_a_second_migration_does_nothing(old, tmp_path):
    path = Path(shutil.copytree(old, tmp_path / "s.zarr"))
    migrate(path)
    before, told = bytes_of(path), []
    migrate(path, tell=told.append)
    assert (bytes_of(path), told) == (before, [])


def test_nothing_and_a_newer_store_are_not_migrated(tmp_path):
    with pytest.raises(ValueError, match="no store at"):
        migrate(tmp_path / "absent.zarr")
    PooledStore.create(tmp_path / "s.zarr", name="s")
    file = tmp_path / "s.zarr" / "zarr.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(ValueError, match="store format 7; this manybrains reads up to 1"):
        migrate(tmp_path / "s.zarr")


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_migration_interrupted_at_any_write_is_gone_on_with(old, tmp_path, every):
    """Digests of the subjects end as those of a migration that nothing interrupted; until then the store is refused."""
    whole = Path(shutil.copytree(old, tmp_path / "whole.zarr"))
    with counted() as done:
        migrate(whole)
    digests = {name: PooledStore.open(whole).subject(name).digest for name in content()}
    assert len(done) > 40
    for at in sorted({*range(0, len(done), every), len(done) - 2, len(done) - 1}):
        path = Path(shutil.copytree(old, tmp_path / f"{at}.zarr"))
        with counted(at, stop), pytest.raises(Stopped):
            migrate(path)
        migrate(path)
        check(path)
        assert validate(path) == []
        store = PooledStore.open(path)
        assert {name: store.subject(name).digest for name in store.subjects} == digests
        shutil.rmtree(path)
