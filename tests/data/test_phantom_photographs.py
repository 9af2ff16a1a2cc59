"""The phantom on photographs in place of invented pictures: whose labels count, how they are shared, what's refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.phantom import PhantomConfig, read_truth, write_phantom
from data.phantom.images import draw_images
from data.rois import families
from data.store import PooledStore


@pytest.fixture
def photographs(tmp_path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, picture in enumerate(draw_images(40, rng=np.random.default_rng(8))[0]):
        Image.fromarray(picture).resize((160, 140)).save(folder / f"{index:03d}.png")
    return folder


def write_labels(folder: Path, *, columns=("file", "scene", "category", "x", "y", "size", "visible_area")) -> None:
    with (folder / "labels.csv").open("w", newline="") as lines:
        table = csv.DictWriter(lines, columns, extrasaction="ignore")
        table.writeheader()
        for index, path in enumerate(sorted(folder.glob("*.png"))):
            row = {"file": path.name, "scene": "indoors" if index % 2 else "outdoors", "category": ""}
            if index % 3:
                row |= {
                    "category": ("face", "cup")[index % 3 - 1],
                    "x": 0.5,
                    "y": 0.4,
                    "size": 0.2,
                    "visible_area": 0.1,
                }
            table.writerow(row)


def with_images(folder: Path, **options) -> PhantomConfig:
    return PhantomConfig(
        **{"subjects": 1, "sessions": 1, "trials_per_session": 60, "voxels": 40} | options, images=folder
    )


def test_photographs_without_labels_give_early_voxels_only(photographs, tmp_path, caplog):
    write_phantom(tmp_path / "p.zarr", with_images(photographs))
    subject = PooledStore.open(tmp_path / "p.zarr").subject(1)
    assert set(families(subject)) == {"early"}
    truth = read_truth(tmp_path / "p.zarr")
    assert truth.labels is None
    assert truth.subjects["subj01"].content.shape == (40, 0)
    assert "only early voxels" in caplog.text


def test_photographs_with_labels_give_all_families(photographs, tmp_path):
    write_labels(photographs)
    write_phantom(tmp_path / "p.zarr", with_images(photographs))
    subject = PooledStore.open(tmp_path / "p.zarr").subject(1)
    assert set(families(subject)) == {"early", "mid", "higher"}
    assert "floc-faces" in subject.rois
    assert read_truth(tmp_path / "p.zarr").labels.category_names == ("cup", "face")


def test_scarce_photographs_are_shared_among_subjects_but_never_between_roles(photographs, tmp_path, caplog):
    write_phantom(tmp_path / "p.zarr", with_images(photographs, subjects=3))
    store = PooledStore.open(tmp_path / "p.zarr")
    assert "they have some in common" in caplog.text
    assert store.n_images <= 40
    roles = np.array(store.image_roles())
    for name in store.subjects:
        assert set(np.bincount(store.subject(name).image, minlength=len(roles))[roles == "test"]) == {3}


def test_too_few_photographs_are_refused_with_the_number_needed(photographs, tmp_path):
    with pytest.raises(ValueError, match=r"40 images are too few for 600 trials .* give at least"):
        write_phantom(tmp_path / "p.zarr", with_images(photographs, trials_per_session=600))


def test_a_folder_that_is_no_folder_of_photographs_is_named(photographs, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        write_phantom(tmp_path / "p.zarr", with_images(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no photographs"):
        write_phantom(tmp_path / "p.zarr", with_images(tmp_path / "empty"))
    (photographs / "torn.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"torn\.jpg can't be read"):
        write_phantom(tmp_path / "p.zarr", with_images(photographs))


def test_a_table_of_labels_that_does_not_fit_is_named(photographs, tmp_path):
    write_labels(photographs, columns=("file", "scene", "category"))
    with pytest.raises(ValueError, match=r"lacks the columns \['size'"):
        write_phantom(tmp_path / "p.zarr", with_images(photographs))
    write_labels(photographs)
    text = (photographs / "labels.csv").read_text()
    (photographs / "labels.csv").write_text(text.replace("001.png", "other.png"))
    with pytest.raises(ValueError, match=r"no row for 1 photographs, the first '001\.png'"):
        write_phantom(tmp_path / "p.zarr", with_images(photographs))
    (photographs / "labels.csv").write_text(text.replace("0.4", "middle"))
    with pytest.raises(ValueError, match="must be numbers"):
        write_phantom(tmp_path / "p.zarr", with_images(photographs))
