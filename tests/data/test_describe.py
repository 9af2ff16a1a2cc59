"""What `info` tells is what was put in, in JSON and in print; what can't be told has its reason."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data.describe import describe, show
from data.phantom import PhantomConfig, read_truth, write_phantom
from data.store import PooledStore
from data.voxels import Rois, Surface, Volume


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("phantom") / "p.zarr"
    write_phantom(path, PhantomConfig(subjects=2, sessions=4, trials_per_session=200, voxels=90))
    return path


def printed(found, width: int) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=width))
    return out.getvalue()


def test_counts_are_those_of_the_design(phantom):
    store = PooledStore.open(phantom)
    found = describe(store)
    assert found["images"] == {"n": store.n_images, "with_pixels": store.n_images, "sizes": ["128 x 128"]}
    roles = store.image_roles()
    assert {part: found["split"][part] for part in ("train", "validation", "test")} == {
        part: roles.count(part) for part in ("train", "validation", "test")
    }
    subject = found["subjects"]["subj01"]
    assert (subject["sessions"], subject["trials"], subject["voxels"], subject["dtype"]) == (4, 800, 90, "int16")
    assert sum(int(times) * n for times, n in subject["images_by_repeats"].items()) == 800
    assert subject["rois"]["prf-visualrois"]["V1v"] == store.subject(1).rois["prf-visualrois"].mask("V1v").sum()
    assert subject["digest"] == store.subject(1).digest


def test_medians_of_ncsnr_and_ceilings_are_the_phantoms_truth(phantom):
    found, truth = describe(PooledStore.open(phantom)), read_truth(phantom)
    for name, known in truth.subjects.items():
        ceiling = found["subjects"][name]["ceiling"]
        assert (ceiling["voxels"], ceiling["of"]) == (90, 90)
        assert ceiling["ncsnr"]["50%"] == pytest.approx(np.median(known.ncsnr), abs=0.06)
        single = known.ncsnr**2 / (known.ncsnr**2 + 1)
        assert ceiling["single_trial"]["50%"] == pytest.approx(np.median(single), abs=0.04)
        assert ceiling["mean_of_repeats"]["50%"] > ceiling["single_trial"]["50%"]


def test_a_sample_of_voxels_is_said_to_be_one_and_always_the_same(phantom, monkeypatch):
    whole = describe(PooledStore.open(phantom))["subjects"]["subj01"]["ceiling"]
    monkeypatch.setattr("data.describe.N_VOXELS", 60)
    found = describe(PooledStore.open(phantom))
    some = found["subjects"]["subj01"]["ceiling"]
    assert (some["voxels"], some["of"]) == (60, 90)
    assert some == describe(PooledStore.open(phantom))["subjects"]["subj01"]["ceiling"]
    assert some["ncsnr"]["50%"] == pytest.approx(whole["ncsnr"]["50%"], abs=0.1)
    assert "(quantiles over 60 voxels drawn of 90)" in printed(found, 200)


def test_sizes_add_up_to_what_is_on_the_disk(phantom):
    found = describe(PooledStore.open(phantom), ceilings=False)
    on_disk = {file: file.stat().st_size for file in phantom.rglob("*") if file.is_file()}
    assert found["bytes"]["total"] == sum(on_disk.values())
    assert found["bytes"]["pixels"] == sum(n for file, n in on_disk.items() if "pixels" in file.parts)
    responses = sum(n for file, n in on_disk.items() if "responses" in file.parts and "subj02" in file.parts)
    assert found["subjects"]["subj02"]["bytes"]["responses"] == responses > 800 * 90


@pytest.mark.parametrize("width", [80, 200])
def test_print_fits_the_terminal_and_json_holds_the_same(phantom, width):
    found = describe(PooledStore.open(phantom))
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width
    for told in ("subj02", "percent signal change", "made_by data.phantom", "prf-visualrois", "NCSNR", "thrice"):
        assert told in text
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_cannot_be_told_has_its_reason(tmp_path, make_block, make_subject):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    rows = store.add_images(make_block([str(k) for k in range(12)], pixels=False))
    twice = np.tile(rows, 2)
    store.add_subject(make_subject("once", rows))
    averaged = dict(n_averaged=np.full(24, 3, np.float32), upstream_preprocessing="averaged over repeats")
    store.add_subject(make_subject("averaged", twice, **averaged))
    store.add_subject(make_subject("few", twice, session=np.repeat([1, 2], [20, 4]).astype(np.int16)))
    store.add_subject(make_subject("flat", twice, responses=np.ones((24, 5), np.float32)))
    found = describe(store)
    reasons = {name: subject["ceiling"]["n/a"] for name, subject in found["subjects"].items()}
    assert reasons == {
        "once": "no image was shown twice",
        "averaged": "the data came averaged over repeats",
        "few": "a session has 4 trials, and at least 10 are needed to standardise it",
        "flat": "none of the 5 voxels looked at varies",
    }
    text = printed(found, 80)
    for told in ("none with pixels", "n/a: no image was shown twice", "place n/a: not told", "no session index"):
        assert told in text
    assert describe(store, ceilings=False)["subjects"]["once"]["ceiling"] == {"n/a": "not asked for"}


def test_places_tokens_and_long_lists_of_labels_are_told(tmp_path, make_block, make_subject):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    rows = store.add_images(make_block([str(k) for k in range(4)]))
    index = np.arange(15, dtype=np.int32).reshape(5, 3)
    labels = Rois(labels=np.ones(5, np.int16), names={k: f"area{k}" for k in range(1, 31)})
    volume = Volume(shape=(20, 21, 22), affine=np.eye(4), index=index)
    store.add_subject(make_subject("volume", rows, place=volume, rois={"atlas": labels}))
    surface = Surface(space="fsaverage", n_vertices=(30, 31), hemisphere=np.zeros(5, np.int8), vertex=index[:, 0])
    store.add_subject(make_subject("surface", rows, place=surface))
    store.begin_tokens("enc", {"depths": [3, 6]})
    assert describe(store)["encoders"]["enc"]["blocks_without_tokens"] == ["0000"]
    tokens = {"pooled": np.zeros((4, 2, 3), np.float16), "patch": np.zeros((4, 2, 16, 3), np.float16)}
    store.write_tokens("enc", "0000", [tokens])
    text = printed(describe(store), 200)
    for told in ("in a volume of 20 x 21 x 22", "vertices of fsaverage (30 left, 31 right)", "and 18 more labels"):
        assert told in text
    assert "tokens enc: depths 3, 6; pooled and 16 patches of width 3" in text
