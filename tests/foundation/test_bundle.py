"""A bundle is its model, bit for bit; whatever isn't one is refused in one line, before it costs anything."""

import json
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.places import load_place
from data.voxels import Volume
from foundation.bundle import METADATA, _tensors_digest, load_bundle, read_bundle, unpack, write_bundle
from foundation.checkpoint import load_model, save_model
from foundation.safetensors_header import read_header
from foundation.tracking.packaging import load_parts
from tests.tiny_version import ADAPTED, random_model, save_parts, volume

ADAPTER, PLACE = f"{METADATA}.adapter", f"{METADATA}.place"
A_TENSOR = "vae.queries"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a backbone and of an adapter with places."""
    backbone, adapter, _ = save_parts(tmp_path_factory.mktemp("parts"))
    return backbone, adapter


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an adapter with its backbone."""
    out = tmp_path_factory.mktemp("bundle") / "whole.safetensors"
    write_bundle(parts[0], out, adapter=parts[1], card={"name": "tiny"})
    return out


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with."""
    copy = tmp_path / "tampered.safetensors"
    copy.write_bytes(whole.read_bytes())
    return copy


# -- what is written is read -------------------------------------------------------------------------------------------


def test_an_adapter_and_its_backbone_are_one_model_again(parts, whole):
    model, lineage = load_bundle(whole)
    expected, expected_lineage = load_parts(*parts)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0, equal_nan=True)
    assert model.subjects == expected.subjects
    assert lineage == expected_lineage
    tokens = torch.randn(3, 4, 48), torch.randn(3, 4, 64, 48)
    assert torch.equal(model.predict(*tokens, ADAPTED), expected.predict(*tokens, ADAPTED))


def test_unpacked_it_is_the_same_files_byte_for_byte(parts, whole, tmp_path):
    backbone, adapter = unpack(read_bundle(whole), tmp_path)
    assert adapter is not None
    for mine, theirs in zip((backbone, adapter), parts, strict=True):
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        assert json.loads((mine / "model.json").read_text()) == json.loads((theirs / "model.json").read_text())
    place = load_place(adapter)
    assert isinstance(place, Volume)
    assert (place.index == volume().index).all()


def test_an_adapter_of_a_subject_that_the_backbone_has_takes_its_place(tmp_path):
    model = random_model("subj01", ADAPTED)
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    save_model(model, tmp_path / "model", made_from={})
    model.adapter(ADAPTED).voxel_bias.data.add_(1)
    save_model(model, tmp_path / "adapter", made_from={}, only=ADAPTED)
    write_bundle(tmp_path / "model", tmp_path / "out.safetensors", adapter=tmp_path / "adapter")
    found, _ = load_bundle(tmp_path / "out.safetensors")
    assert found.subjects == ["subj01", ADAPTED]
    assert torch.equal(found.adapter(ADAPTED).voxel_bias, model.adapter(ADAPTED).voxel_bias)


def slower(description: dict[str, Any]) -> None:
    description["backbone"]["mamba"]["chunk_size"] *= 2


def of_an_older_version(description: dict[str, Any]) -> None:
    del description["backbone"]["drop_path"]


@pytest.mark.parametrize("change", [slower, of_an_older_version])
def test_an_adapter_may_be_fitted_by_another_backend_or_version_than_its_backbone(path, change):
    described(METADATA, change)(path)
    assert load_bundle(path)[0].subjects == ["subj01", "subj02", ADAPTED]


@pytest.mark.parametrize("rank", [None, 3])
def test_a_model_that_is_not_finished_or_has_low_rank_updates_comes_back(tmp_path, rank):
    model = random_model("subj01")
    model.adapter("subj01").noise_sd.fill_(torch.nan)
    if rank:
        model.add_lora("subj01", rank)
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model", made_from={"validation_voxel_r": float("nan")})
    write_bundle(tmp_path / "model", tmp_path / "out.safetensors")
    found, _ = load_bundle(tmp_path / "out.safetensors")
    torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), rtol=0, atol=0, equal_nan=True)


def with_population(directory: Path, landmark: list[list[int]]) -> Path:
    """Write a model whose second subject reads landmarks."""
    model = random_model("subj01", "subj02")
    path = model.add_population("subj02", len(landmark), 2)
    path.landmark.copy_(torch.tensor(landmark))
    for buffer in (path.mean, path.basis, path.weight):
        buffer.normal_()
    directory.mkdir()
    save_model(model, directory, made_from={})
    return directory


def test_a_population_path_comes_back(tmp_path):
    source = with_population(tmp_path / "model", [[0, 3], [0, 13], [1, 8]])
    write_bundle(source, tmp_path / "out.safetensors")
    found, expected = load_bundle(tmp_path / "out.safetensors")[0], load_model(source)[0]
    tokens = torch.randn(3, 4, 48), torch.randn(3, 4, 64, 48)
    assert torch.equal(found.predict(*tokens, "subj02"), expected.predict(*tokens, "subj02"))


@pytest.mark.parametrize("landmark", [[2, 0], [-1, 0], [0, 14], [1, 9], [0, -1]])
def test_landmarks_that_the_model_does_not_have_are_refused(tmp_path, landmark):
    source = with_population(tmp_path / "model", [[0, 3], landmark])
    with pytest.raises(ValueError, match="names voxels that the model doesn't have"):
        write_bundle(source, tmp_path / "out.safetensors")


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    model = random_model("subj01")
    model.adapter("subj01").voxel_bias.data[0] = torch.inf
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model", made_from={})
    with pytest.raises(ValueError, match=r"voxel_bias' holds values that are NaN or infinite"):
        write_bundle(tmp_path / "model", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_header_whose_length_begins_as_a_pickle_does_is_none(path):
    header, numbers = header_of(path)
    header["__metadata__"]["padding"] = ""
    n = len(json.dumps(header))
    header["__metadata__"]["padding"] = "x" * ((0x80 - n) % 256)
    write_raw(path, header, numbers)
    assert path.read_bytes().startswith(b"\x80")
    assert read_bundle(path).adapter is not None


# -- what isn't whole, or isn't ours -----------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header's JSON and the numbers behind it."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def write_raw(path: Path, header: Any, numbers: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """A tampering with the header alone."""

    def tamper(path: Path) -> None:
        header, numbers = header_of(path)
        change(header)
        write_raw(path, header, numbers)

    return tamper


def described(key: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """A tampering with a description."""

    def inside(header: dict[str, Any]) -> None:
        description = json.loads(header["__metadata__"][key])
        change(description)
        header["__metadata__"][key] = json.dumps(description)

    return in_header(inside)


def resealed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """A tampering with the tensors by someone who makes the digest right."""

    def tamper(path: Path) -> None:
        tensors, metadata = load_file(path), read_header(path).metadata
        change(tensors)
        save_file(tensors, path)
        description = json.loads(metadata[METADATA]) | {"weights": _tensors_digest(path)}
        save_file(tensors, path, metadata=metadata | {METADATA: json.dumps(description)})

    return tamper


def renamed(old: str, new: str) -> Callable[[Path], Any]:
    return in_header(lambda header: header.update({new: header.pop(old)}))


def entry(**changes: Any) -> Callable[[Path], Any]:
    return in_header(lambda header: header[A_TENSOR].update(changes))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0]}))


def zipped(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def nested(header: dict[str, Any]) -> None:
    header["__metadata__"][METADATA] = "[" * 5000 + "]" * 5000


def poked(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


PARCEL = "adapters.subj01.parcel"
TAMPERINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # the file
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "it is cut off"),
    "cut within the header": (lambda p: p.write_bytes(p.read_bytes()[:50]), "cut off within its header"),
    "a few bytes": (lambda p: p.write_bytes(b"abc"), "cut off within its header"),
    "empty": (lambda p: p.write_bytes(b""), "cut off within its header"),
    "bytes behind the end": (lambda p: p.write_bytes(p.read_bytes() + b"more"), "take .* bytes and it has"),
    "missing": (Path.unlink, "it is no file"),
    "a directory": (a_directory, "it is no file"),
    "a pickle": (pickled, "is a pickle .* never opens pickles"),
    "a zip of pickles": (zipped, "is a pickle .* never opens pickles"),
    "header longer than the file": (
        lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "cut off within its head",
    ),
    "header of no length": (lambda p: p.write_bytes(struct.pack("<Q", 0) + b"{}"), "its header has 0 bytes"),
    "header not JSON": (lambda p: write_raw(p, b"nothing", b""), "can't be read: Expecting value"),
    "header not text": (lambda p: write_raw(p, b"\xff\xfe{}", b""), "can't be read"),
    "header a list": (lambda p: write_raw(p, [], b""), "isn't that of a safetensors file"),
    "a name twice": (lambda p: write_raw(p, b'{"a": 1, "a": 2}', b""), "a name stands in it twice"),
    "a number of a million digits": (lambda p: write_raw(p, b'{"a": ' + b"9" * 10**6 + b"}", b""), "can't be read"),
    # what it declares
    "a huge shape": (entry(shape=[2**40, 2**40]), "aren't those of its declared shape"),
    "a huge shape and place": (
        entry(shape=[2**40], data_offsets=[0, 2**42]),
        r"starts at byte \d+, not at|aren't those|take .* bytes",
    ),
    "a negative size": (entry(shape=[-1, 8]), "aren't whole numbers"),
    "a size that is a text": (entry(shape=["4", 8]), "aren't whole numbers"),
    "a size that is a truth": (entry(shape=[True, 16]), "aren't whole numbers"),
    "a type that we don't write": (entry(dtype="BF16"), "has type 'BF16'"),
    "a type that is no text": (entry(dtype=["F32"]), "has type"),
    "no place": (in_header(lambda h: h[A_TENSOR].pop("data_offsets")), "in no way we know"),
    "a tensor that is a text": (in_header(lambda h: h.update({A_TENSOR: "x"})), "in no way we know"),
    "two tensors in one place": (
        in_header(lambda h: h[A_TENSOR].update(data_offsets=[0, 4 * h[A_TENSOR]["shape"][0] * 8])),
        "starts at byte",
    ),
    # names
    "a path for a tensor": (renamed(A_TENSOR, "../../etc/passwd"), "can't be the name of a tensor"),
    "an absolute path for a tensor": (renamed(A_TENSOR, "/etc/passwd"), "can't be the name of a tensor"),
    "dots for a tensor": (renamed(A_TENSOR, "vae..queries"), "can't be the name of a tensor"),
    "a control character in a name": (renamed(A_TENSOR, "vae\x1b[2J"), "can't be printed|can't be the name"),
    "another name": (renamed(A_TENSOR, "vae.other"), "lacks 1 tensors, such as 'vae.queries'"),
    "a tensor too many": (resealed(lambda t: t.update({"vae.more": torch.zeros(2)})), "are none of its model's"),
    "a tensor of no part": (resealed(lambda t: t.update({"other:more": torch.zeros(2)})), "belongs to no part"),
    "a tensor too few": (resealed(lambda t: t.pop(A_TENSOR)), "lacks 1 tensors, such as 'vae.queries'"),
    "a tensor of another shape": (resealed(lambda t: t.update({A_TENSOR: torch.zeros(3, 3)})), "its model has"),
    "a subject's name that is a path": (
        described(METADATA, lambda d: d.update(subjects=["../subj01", "subj02"])),
        "must start with a letter or digit",
    ),
    "an adapter's subject that is a path": (
        described(ADAPTER, lambda d: d.update(subjects=["a/b"])),
        "must start with a letter or digit",
    ),
    "a subject that isn't there": (
        described(METADATA, lambda d: d.update(subjects=["subj01", "x"])),
        "lacks 'adapters.x",
    ),
    "subjects that are a number": (described(METADATA, lambda d: d.update(subjects=3)), "aren't a list of names"),
    "a subject twice": (described(METADATA, lambda d: d.update(subjects=["subj01"] * 2)), "aren't a list of names"),
    # numbers
    "a number changed": (flipped, "is damaged: its tensors aren't those described"),
    "another digest": (
        described(METADATA, lambda d: d.update(weights="sha256:0")),
        "its tensors aren't those described",
    ),
    "a NaN": (resealed(poked(A_TENSOR, torch.nan)), "holds values that are NaN or infinite"),
    "an infinity": (resealed(poked("adapter:adapters.subj05.noise_sd", torch.inf)), "are NaN or infinite"),
    "an ROI far out": (resealed(poked(PARCEL, 2**60)), "the parcels of subj01 are"),
    "an ROI below zero": (resealed(poked(PARCEL, -1)), "the parcels of subj01 are"),
    "an ROI without voxels": (resealed(lambda t: t[PARCEL].fill_(1)), "the parcels of subj01 are"),
    # descriptions
    "no description": (in_header(lambda h: h.pop("__metadata__")), "holds tensors only"),
    "metadata that aren't text": (in_header(lambda h: h["__metadata__"].update(x=3)), "isn't that of a safetensors"),
    "metadata that we don't know": (
        in_header(lambda h: h["__metadata__"].update({"manybrains.x": "1"})),
        "doesn't know",
    ),
    "a description nested deeply": (in_header(nested), "nested too deeply"),
    "a newer format": (described(METADATA, lambda d: d.update(format_version=99)), "reads up to"),
    "something else": (described(METADATA, lambda d: d.update(format="other")), "doesn't describe a manybrains model"),
    "an escape sequence": (described(METADATA, lambda d: d["made_from"].update(store="\x1b[2J")), "can't be printed"),
    "a layer too many": (
        described(METADATA, lambda d: d["backbone"].update(n_patch_layer=3)),
        "another backbone|lacks",
    ),
    "a billion layers": (described(METADATA, lambda d: d["backbone"].update(n_patch_layer=10**9)), "out of bounds"),
    "a huge width": (described(METADATA, lambda d: d["backbone"].update(width=10**12)), "out of bounds"),
    "a negative width": (described(METADATA, lambda d: d["backbone"].update(width=-8)), "out of bounds"),
    "heads of no width": (described(METADATA, lambda d: d["backbone"]["mamba"].update(headdim=0)), "is refused"),
    "a huge chunk": (described(METADATA, lambda d: d["backbone"]["mamba"].update(chunk_size=2**20)), "out of bounds"),
    "a huge grid": (described(METADATA, lambda d: d["token_shape"].update(patch=10**10)), "out of bounds"),
    "a grid that isn't square": (
        described(METADATA, lambda d: d["token_shape"].update(patch=63)),
        "another backbone|built",
    ),
    "a setting of another type": (described(METADATA, lambda d: d["backbone"].update(readout=["x"])), "BackboneConfig"),
    "a setting that we don't know": (described(METADATA, lambda d: d["backbone"].update(new=1)), "BackboneConfig"),
    "no lineage": (described(METADATA, lambda d: d.update(made_from=[])), "doesn't say what it was made from"),
    "an adapter of another backbone": (
        described(ADAPTER, lambda d: d["backbone"].update(n_component=5)),
        "its adapter is of another backbone",
    ),
    "an adapter of two subjects": (
        described(ADAPTER, lambda d: d.update(subjects=["subj05", "subj06"])),
        "isn't that of one subject",
    ),
    "an adapter that isn't described": (
        in_header(lambda h: h["__metadata__"].pop(ADAPTER)),
        "that it doesn't describe",
    ),
    "an adapter that is a model": (described(ADAPTER, lambda d: d.update(kind="model")), "isn't that of one subject"),
    "places that aren't text": (in_header(lambda h: h["__metadata__"].update({PLACE: "[1]"})), "places of voxels"),
}


@pytest.mark.parametrize(("tamper", "said"), TAMPERINGS.values(), ids=TAMPERINGS)
def test_whatever_is_tampered_with_is_refused_in_one_line(path, tamper, said):
    tamper(path)
    with pytest.raises(ValueError, match=said) as refused:
        load_bundle(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def large_header(n: int) -> Callable[[Path], Any]:
    def tamper(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", n))
            file.truncate(8 + n)

    return tamper


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (large_header(101 * 2**20), "its header has .* bytes, where 2 to"),
        (entry(shape=[2**40, 2**40]), "aren't those of its declared shape"),
        (described(METADATA, lambda d: d["backbone"].update(n_gate=2**23, n_component=2**23)), "refused"),
    ],
    ids=["header", "shape", "described model"],
)
def test_what_is_huge_is_refused_without_being_allocated(path, tamper, said):
    tamper(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=said):
        load_bundle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_places_of_other_voxels_or_in_an_absurd_volume_are_refused(path, tmp_path):
    def spread(place: dict[str, Any]) -> None:
        place["manybrains-place"] = json.dumps(json.loads(place["manybrains-place"]) | {"shape": [2**20] * 3})

    described(PLACE, spread)(path)
    with pytest.raises(ValueError, match=r"places 12 voxels among \d+, and subj05 has 12; at most"):
        unpack(read_bundle(path), tmp_path / "absurd")


def test_a_place_is_needed_for_each_voxel(path, tmp_path):
    resealed(lambda t: t.update({"place:index": t["place:index"][:-1].clone()}))(path)
    with pytest.raises(ValueError, match="places 11 voxels among 60, and subj05 has 12"):
        unpack(read_bundle(path), tmp_path / "short")


def test_whatever_bytes_of_the_header_are_changed_it_is_a_clear_error_or_the_same_numbers(whole, path):
    rng = np.random.default_rng(0)
    content, expected = whole.read_bytes(), read_bundle(whole).model.tensors
    n_header = read_header(whole).start
    refused = 0
    for _ in range(200):
        changed = bytearray(content)
        for at in rng.integers(0, n_header, rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            found = read_bundle(path)
        except ValueError:
            refused += 1
        else:
            torch.testing.assert_close(found.model.tensors, expected, rtol=0, atol=0)
    assert refused > 150
