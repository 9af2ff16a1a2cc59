"""Models on disk: what is read is what was written, bit for bit, or a clear error."""

import dataclasses
import json
import pickletools
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from foundation.bundle import load_bundle, write_bundle
from foundation.checkpoint import (
    FORMAT_VERSION,
    load_adapter,
    load_model,
    new_directory,
    read_description,
    save_model,
)
from foundation.config import BackboneConfig
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from tests.dying_replacement import SWAP, replace_until_killed
from tests.tiny_store import TINY_BACKBONE

MADE_FROM = {"store": "somewhere.zarr", "step": 7}


def fresh(*subjects: str, seed: int = 0, width: int = 5, backbone: BackboneConfig = TINY_BACKBONE) -> EncodingModel:
    torch.manual_seed(seed)
    parcels = {name: torch.arange(7 + len(name)) // 3 for name in subjects}
    model = EncodingModel(TokenShape(depth=2, patch=4, width=width), backbone, parcels)
    model.streams.set_statistics([(torch.randn(9, 2, width), torch.randn(9, 2, 4, width))])
    return model


def write(model: EncodingModel, directory: Path) -> None:
    save_model(model, directory, made_from={})


def saved(directory: Path, model: EncodingModel, **options) -> Path:
    directory.mkdir(parents=True)
    save_model(model, directory, made_from=MADE_FROM, **options)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with two subjects."""
    return saved(tmp_path / "model", fresh("subj01", "subj02"))


def assert_same(one: EncodingModel, other: EncodingModel) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0, equal_nan=True, msg=key)


def test_a_model_comes_back_bit_for_bit_with_its_lineage(directory):
    found, made_from = load_model(directory)
    assert_same(found, fresh("subj01", "subj02"))
    assert made_from == MADE_FROM
    assert (found.config, found.shape, found.subjects) == (
        TINY_BACKBONE,
        TokenShape(depth=2, patch=4, width=5),
        ["subj01", "subj02"],
    )
    assert not found.training


def test_the_order_of_subjects_survives(tmp_path):
    found, _ = load_model(saved(tmp_path / "model", fresh("subj07", "subj01")))
    assert found.subjects == ["subj07", "subj01"]


@pytest.mark.parametrize("name", ["sub-01.ses", "values"])
def test_a_subject_may_have_any_name_that_a_store_allows(tmp_path, name):
    model = fresh("subj01", name)
    found, _ = load_model(saved(tmp_path / "model", model))
    assert_same(found, model)
    backbone = fresh("subj01")
    assert load_adapter(backbone, saved(tmp_path / "adapter", model, only=name))[0] == name


def backbone_of(whole: EncodingModel, *, backbone: BackboneConfig = TINY_BACKBONE) -> EncodingModel:
    """Return `whole` without subj02."""
    rest = fresh("subj01", backbone=backbone)
    rest.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("adapters.subj02")})
    return rest.eval()


def test_an_adapter_alone_completes_its_backbone(tmp_path):
    whole = fresh("subj01", "subj02")
    adapter = saved(tmp_path / "adapter", whole, only="subj02")
    backbone = backbone_of(whole)
    assert load_adapter(backbone, adapter) == ("subj02", MADE_FROM)
    assert_same(backbone, whole)
    with safe_open(adapter / "model.safetensors", "pt") as file:
        assert {key.split(".")[1] for key in file.keys()} == {"subj02"}  # noqa: SIM118


def test_an_adapter_is_no_model_and_a_model_no_adapter(tmp_path, directory):
    adapter = saved(tmp_path / "adapter", fresh("subj01"), only="subj01")
    with pytest.raises(ValueError, match="adapter only"):
        load_model(adapter)
    with pytest.raises(ValueError, match="whole model, not an adapter"):
        load_adapter(fresh(), directory)


def test_an_adapter_of_another_backbone_is_refused_and_the_model_is_as_it_was(tmp_path):
    adapter = saved(tmp_path / "adapter", fresh("subj01", width=6), only="subj01")
    model = fresh("subj02")
    with pytest.raises(ValueError, match="backbone with other sizes"):
        load_adapter(model, adapter)
    assert model.subjects == ["subj02"]


SETTINGS = {
    "one stream": {"streams": ("cls",)},
    "joint stream": {"streams": ("joint",)},
    "transformer": {"streams": ("joint",), "mixer": "transformer"},
    "gru": {"mixer": "gru"},
    "mlp": {"streams": ("patch",), "mixer": "mlp"},
    "free maps": {"readout": "factorised"},
    "mean of patches": {"readout": "mean"},
    "gate per image": {"gate": "image"},
    "aligned": {"n_contrast": 3},
    "no latent": {"latent": None},
    "one decoder": {"decoders": ("residual",)},
    "scan orders": {"scan_orders": ("column", "raster", "reversed"), "token_budget": 2},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_a_model_of_any_setting_comes_back_from_a_directory_and_from_a_bundle(tmp_path, changes):
    model = fresh("subj01", backbone=dataclasses.replace(TINY_BACKBONE, **changes))
    directory, bundle = saved(tmp_path / "model", model), tmp_path / "model.safetensors"
    write_bundle(directory, bundle)
    for found, _ in (load_model(directory), load_bundle(bundle)):
        assert_same(found, model)
        assert found.config == model.config


def test_a_description_of_before_the_mixers_is_one_of_mamba(directory):
    path = directory / "model.json"
    description = json.loads(path.read_text())
    del description["backbone"]["mixer"]
    path.write_text(json.dumps(description))
    found, _ = load_model(directory)
    assert found.config.mixer == "mamba"
    assert_same(found, fresh("subj01", "subj02"))


def finished(model: EncodingModel, subject: str) -> EncodingModel:
    """Give a subject everything that fitting does: closed-form paths, shares, noise and low-rank updates."""
    adapter = model.adapter(subject)
    for buffer in (*adapter.linear.buffers(), adapter.network_share, adapter.noise_sd, adapter.target_weight):
        buffer.copy_(torch.rand(buffer.shape))
    for up in model.add_lora(subject, 2).up.values():
        torch.nn.init.normal_(up)
    path = model.add_population(subject, 6, 4)
    path.landmark[:, 1] = torch.arange(6)  # of the first subject
    for buffer in (path.mean, path.basis, path.weight):
        buffer.normal_()
    return model


def test_a_finished_adapter_comes_back_with_its_model_and_alone(tmp_path):
    model = finished(fresh("subj01", "subj02"), "subj02").eval()
    found, _ = load_model(saved(tmp_path / "model", model))
    assert_same(found, model)
    assert found.adapter("subj01").lora is found.adapter("subj01").population is None
    backbone = backbone_of(model)
    load_adapter(backbone, saved(tmp_path / "adapter", model, only="subj02"))
    assert_same(backbone, model)
    tokens = torch.randn(3, 2, 5), torch.randn(3, 2, 4, 5)
    expected = model.predict(*tokens, "subj02")
    assert torch.equal(backbone.predict(*tokens, "subj02"), expected)
    model.adapter("subj02").population = None
    assert not torch.allclose(model.predict(*tokens, "subj02"), expected)


def test_the_numbers_of_an_adapter_are_those_in_its_file(tmp_path):
    model = finished(fresh("subj02", "subj01"), "subj01")
    with safe_open(saved(tmp_path / "adapter", model, only="subj01") / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == model.adapter("subj01").n_numbers  # noqa: SIM118


def test_an_adapter_replaces_one_that_had_a_population_path_and_updates(tmp_path):
    plain, model = fresh("subj01", "subj02"), finished(fresh("subj01", "subj02"), "subj02")
    load_adapter(model, saved(tmp_path / "adapter", plain, only="subj02"))
    assert_same(model, plain)


@pytest.mark.parametrize("speed", [{"backend": "reference"}, {"chunk_size": 64}])
def test_an_adapter_loads_into_its_backbone_whatever_computes_the_scan(tmp_path, speed):
    model = fresh("subj01", "subj02")
    backbone = dataclasses.replace(TINY_BACKBONE, mamba=dataclasses.replace(TINY_BACKBONE.mamba, **speed))
    other = backbone_of(model, backbone=backbone)
    load_adapter(other, saved(tmp_path / "adapter", model, only="subj02"))
    assert_same(other, model)


@pytest.mark.parametrize("changes", [{"n_component": 5}, {"gate": "image"}, {"latent": None}, {"readout": "mean"}])
def test_an_adapter_of_another_setting_is_refused(tmp_path, changes):
    adapter = saved(tmp_path / "adapter", fresh("subj01"), only="subj01")
    model = fresh("subj02", backbone=dataclasses.replace(TINY_BACKBONE, **changes))
    with pytest.raises(ValueError, match="backbone with other sizes; load it into the one it came from"):
        load_adapter(model, adapter)
    assert model.subjects == ["subj02"]


def test_subjects_dropped_and_renamed_stay_so_on_disk(tmp_path):
    model = fresh("subj01", "subj02", "subj05")
    model.drop_subject("subj01")
    model.rename_subject("subj02", "amy.v2")
    found, _ = load_model(saved(tmp_path / "model", model))
    assert found.subjects == ["amy.v2", "subj05"]
    assert_same(found, model)


def test_saving_the_adapter_of_a_subject_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no adapter for 'subj09'"):
        saved(tmp_path / "adapter", fresh("subj01"), only="subj09")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a weight's bit flipped": lambda d: flip_a_bit(d / "model.safetensors"),
    "weights cut off": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:100]),
    "weights missing": lambda d: (d / "model.safetensors").unlink(),
    "description missing": lambda d: (d / "model.json").unlink(),
    "description cut off": lambda d: (d / "model.json").write_text((d / "model.json").read_text()[:50]),
    "description not text": lambda d: (d / "model.json").write_bytes(b"\xff\xfe\x00"),
    "description of something else": lambda d: (d / "model.json").write_text('{"format": "other"}'),
    "description a list": lambda d: (d / "model.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_a_clear_error_that_names_where_it_is(directory, damage):
    damage(directory)
    with pytest.raises(ValueError, match=re.escape(str(directory))):
        load_model(directory)


def described(directory: Path, **changes) -> None:
    path = directory / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "two", None])
def test_a_newer_format_is_refused_with_both_versions(directory, version):
    described(directory, format_version=version)
    with pytest.raises(ValueError, match=rf"format {version}; this manybrains reads up to {FORMAT_VERSION}: update"):
        load_model(directory)


def test_the_first_format_is_refused_in_one_line(directory):
    described(directory, format_version=1)
    with pytest.raises(ValueError, match="has model format 1, of before the first release; train it again") as refused:
        load_model(directory)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["format", "format_version", "kind", "token_shape", "backbone", "subjects", "weights"])
def test_a_description_that_lacks_an_entry_is_a_clear_error(directory, key):
    path = directory / "model.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(ValueError, match=re.escape(str(directory))):
        load_model(directory)


def test_an_interrupted_save_leaves_the_old_model_whole(tmp_path, directory):
    def interrupted() -> None:
        with new_directory(directory) as new:
            save_model(fresh("subj01", seed=1), new, made_from={})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same(load_model(directory)[0], fresh("subj01", "subj02"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_finished_save_replaces_the_old_model_and_leaves_nothing_beside_it(tmp_path, directory):
    (tmp_path / ".model.tmp").mkdir()  # what a killed save left
    with new_directory(directory) as new:
        save_model(fresh("subj05", seed=1), new, made_from={})
        assert read_description(directory)["subjects"] == ["subj01", "subj02"]  # until the end, the old one
    assert read_description(directory)["subjects"] == ["subj05"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("at", range(len(SWAP)))
@pytest.mark.parametrize("again", range(len(SWAP)))
def test_however_often_a_replacement_is_killed_the_old_model_or_the_new_is_read(tmp_path, directory, at, again):
    def read() -> list[str]:
        return load_model(directory)[0].subjects

    old, new, newest = ["subj01", "subj02"], ["subj05"], ["subj07"]
    assert replace_until_killed(directory, partial(write, fresh(*new)), at) == SWAP[:at]
    first = read()
    assert first == (new if at == 3 else old)
    # Where the old one is already aside, the second replacement is but a renaming and a removal.
    whole = SWAP[2:] if at == 2 else SWAP
    assert replace_until_killed(directory, partial(write, fresh(*newest)), again) == whole[:again]
    assert read() == (newest if again > len(whole) - 2 else first)
    assert replace_until_killed(directory, partial(write, fresh(*newest))) in (SWAP, SWAP[2:])
    assert read() == newest
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_between_the_renames_finds_the_old_model_and_does_not_disturb_the_writer(directory, monkeypatch):
    """The fallback must leave `path` free: renaming onto a directory that holds something fails."""
    rename, read = Path.rename, []

    def reading(self, target):
        rename(self, target)
        read.append(load_model(directory)[0].subjects)

    monkeypatch.setattr(Path, "rename", reading)
    with new_directory(directory) as made:
        save_model(fresh("subj05"), made, made_from={})
    assert read == [["subj01", "subj02"], ["subj05"]]


def test_an_adapter_and_a_description_are_read_where_a_killed_replacement_left_them(tmp_path):
    model = fresh("subj01", "subj02")
    adapter = saved(tmp_path / "adapter", model, only="subj02")
    replace_until_killed(adapter, partial(write, model), 2)
    assert not adapter.exists()
    assert read_description(adapter)["subjects"] == ["subj02"]
    assert load_adapter(fresh(), adapter) == ("subj02", MADE_FROM)


def test_nothing_in_a_model_directory_is_pickled(directory):
    assert sorted(path.name for path in directory.iterdir()) == ["model.json", "model.safetensors"]
    json.loads((directory / "model.json").read_text())
    weights = (directory / "model.safetensors").read_bytes()
    json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])  # the header of safetensors, then raw numbers
    with pytest.raises(ValueError, match=r"pickle|opcode"):
        list(pickletools.genops(weights))
