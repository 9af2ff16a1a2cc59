"""A vision transformer's tokens are its blocks' outputs after its own final layer norm, each told apart and named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from data.encoders import huggingface
from data.encoders.hub import Location
from data.encoders.huggingface import HuggingFaceEncoder
from data.schema import json_digest
from tests.tiny_encoder import (
    BLOCKS,
    COMMIT,
    MEAN,
    PATCH,
    SD,
    SIDE,
    SIZES,
    WIDTH,
    randomise,
    save_model,
    save_processor,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
PATCHES = (SIDE // PATCH) ** 2
TEXT = dict(
    **dict(hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20),
    **dict(bos_token_id=0, eos_token_id=1, pad_token_id=2),
)


def save_pair(path: Path, kind: str) -> torch.nn.Module:
    """Save a model with a vision and a text tower; return the vision tower."""
    more = dict(projection_size=WIDTH) if kind == "Siglip" else {}
    config = getattr(transformers, f"{kind}Config")(vision_config=SIZES, text_config=TEXT | more)
    model = randomise(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(path)
    save_processor(path)
    return model.vision_model


SAVED = {
    "dinov2": lambda path: save_model(path, "Dinov2"),
    "dinov2-with-registers": lambda path: save_model(path, "Dinov2WithRegisters", num_register_tokens=4),
    "dinov3": lambda path: save_model(path, "DINOv3ViT", num_register_tokens=4),
    "clip": lambda path: save_pair(path, "CLIP"),
    "clip-vision": lambda path: save_model(path, "CLIPVision"),
    "siglip": lambda path: save_pair(path, "Siglip"),
    "siglip-vision": lambda path: save_model(path, "SiglipVision"),
    "vit": lambda path: save_model(path, "ViT"),
    "vit-msn": lambda path: save_model(path, "ViTMSN"),
}
N_REGISTERS = {"dinov2-with-registers": 4, "dinov3": 4}


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoders") / request.param
    return path, SAVED[request.param](path)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "dinov2"
    save_model(path, "Dinov2")
    return path


def pixel_values(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((images / 255 - np.array(MEAN)) / np.array(SD)).permute(0, 3, 1, 2).float()


def block_outputs(model, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return each block's output after the final layer norm, by `transformers`' own `output_hidden_states`."""
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        norm = getattr(model, "layernorm", None) or getattr(model, "post_layernorm", None) or model.norm
        return [norm(tokens) for tokens in hidden[1:]]


def test_depths_are_the_blocks_outputs_after_the_layer_norm_told_apart(saved):
    path, model = saved
    tokens = HuggingFaceEncoder(str(path), depths=(1, 2, 3)).encode(IMAGES)
    expected = np.stack(block_outputs(model, pixel_values=pixel_values(IMAGES)), axis=1)
    n_registers = N_REGISTERS.get(path.name, 0)
    has_cls = not path.name.startswith("siglip")
    assert set(tokens.named()) == {
        "patch",
        "cls" if has_cls else "pooled",
        *(["register"] if n_registers else []),
    }
    assert expected.shape == (3, BLOCKS, has_cls + n_registers + PATCHES, WIDTH)
    np.testing.assert_allclose(tokens.patch, expected[:, :, has_cls + n_registers :], atol=1e-4)
    if has_cls:
        np.testing.assert_allclose(tokens.cls, expected[:, :, 0], atol=1e-4)
    if n_registers:
        np.testing.assert_allclose(tokens.register, expected[:, :, 1 : 1 + n_registers], atol=1e-4)


def test_the_last_depth_is_what_the_model_gives(saved):
    path, model = saved
    with torch.no_grad():
        found = model(pixel_values=pixel_values(IMAGES))
    tokens = HuggingFaceEncoder(str(path), depths=(BLOCKS,)).encode(IMAGES)
    if path.name.startswith("clip"):  # CLIP norms only the token that it pools
        np.testing.assert_allclose(tokens.cls[:, 0], found.pooler_output, atol=1e-4)
        return
    np.testing.assert_allclose(tokens.patch[:, 0], found.last_hidden_state[:, -PATCHES:], atol=1e-4)
    if tokens.pooled is None:
        np.testing.assert_allclose(tokens.cls[:, 0], found.last_hidden_state[:, 0], atol=1e-4)
    else:
        np.testing.assert_allclose(tokens.pooled[:, 0], found.pooler_output, atol=1e-4)


def test_each_depths_pooled_token_is_the_models_own_pooling_of_its_tokens(tmp_path):
    """Oracle: the same weights in a model that is only so deep."""
    whole = save_model(tmp_path / "siglip", "SiglipVision")
    tokens = HuggingFaceEncoder(str(tmp_path / "siglip"), depths=(1, 2, 3)).encode(IMAGES)
    for depth in (1, 2, 3):
        config = transformers.SiglipVisionConfig(**(SIZES | {"num_hidden_layers": depth}))
        shallow = transformers.SiglipVisionModel(config).eval()
        shallow.load_state_dict({k: v for k, v in whole.state_dict().items() if k in shallow.state_dict()})
        with torch.no_grad():
            expected = shallow(pixel_values=pixel_values(IMAGES)).pooler_output
        np.testing.assert_allclose(tokens.pooled[:, depth - 1], expected, atol=1e-4)


@pytest.mark.parametrize("max_patches", [9, 10])
def test_siglip2_of_any_resolution_gives_the_square_grid_without_padding(tmp_path, max_patches):
    config = transformers.Siglip2VisionConfig(**{k: v for k, v in SIZES.items() if k != "image_size"}, num_patches=16)
    model = randomise(transformers.Siglip2VisionModel(config))
    model.save_pretrained(tmp_path)
    settings = dict(image_processor_type="Siglip2ImageProcessor", patch_size=PATCH, max_num_patches=max_patches)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = HuggingFaceEncoder(str(tmp_path), depths=(1, 3))
    tokens = encoder.encode(IMAGES)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    inputs = processor(list(IMAGES), return_tensors="pt")
    assert inputs["pixel_attention_mask"].sum(1).tolist() == [9, 9, 9]
    expected = block_outputs(model, **inputs)
    with torch.no_grad():
        pooled = model(**inputs).pooler_output
    assert encoder.grid == (3, 3)
    np.testing.assert_allclose(tokens.patch[:, 0], expected[0][:, :9], atol=1e-4)
    np.testing.assert_allclose(tokens.patch[:, 1], expected[2][:, :9], atol=1e-4)
    np.testing.assert_allclose(tokens.pooled[:, 1], pooled, atol=1e-4)
    with pytest.raises(ValueError, match="gives 8 patches of images of 20 x 40 pixels, not the 3 x 3 of square ones"):
        encoder.encode(np.zeros((2, 20, 40, 3), np.uint8))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_text_tower_is_not_loaded(tmp_path, kind, capfd):
    save_pair(tmp_path, kind)
    capfd.readouterr()
    encoder = HuggingFaceEncoder(str(tmp_path))
    assert not [name for name, _ in encoder._tower.model.named_parameters() if "text" in name]
    assert capfd.readouterr().err == "", "and transformers says nothing of it"


def test_blocks_past_the_deepest_depth_are_not_run(saved):
    path, _ = saved
    whole, shallow = HuggingFaceEncoder(str(path), depths=(1, 3)), HuggingFaceEncoder(str(path), depths=(1,))
    assert len(shallow._tower.blocks) == 1
    assert shallow.spec()["weights"] == whole.spec()["weights"], "the weights that identify it are all of them"
    np.testing.assert_array_equal(shallow.encode(IMAGES).patch[:, 0], whole.encode(IMAGES).patch[:, 0])


def test_batches_within_do_not_show(saved):
    path, _ = saved
    encoder = HuggingFaceEncoder(str(path))
    many = np.random.default_rng(1).integers(0, 256, (7, 40, 33, 3), np.uint8)
    whole = encoder.encode(many).named()
    encoder.batch = 2
    for name, values in encoder.encode(many).named().items():
        np.testing.assert_allclose(values, whole[name], atol=1e-5)


# -- identity ----------------------------------------------------------------------------------------------------------


def test_what_an_encoder_says_of_itself(saved):
    path, _ = saved
    encoder = HuggingFaceEncoder(str(path))
    assert encoder.name == path.name
    assert (encoder.depths, encoder.width, encoder.grid) == ((1, 2, 3), WIDTH, (2, 2))
    spec = encoder.spec()
    assert json.loads(json.dumps(spec)) == spec
    assert spec == HuggingFaceEncoder(str(path) + "/").spec()
    assert spec["preprocessing"]["image_mean"] == list(MEAN)
    assert spec.get("registers", 0) == N_REGISTERS.get(path.name, 0)
    told = encoder.provenance()
    assert told["processor"] == "BitImageProcessorPil"
    assert told["transformers"] == transformers.__version__
    assert json.loads(json.dumps(told)) == told


def test_weights_normalisation_and_depths_identify_an_encoder(tmp_path):
    specs = []
    for k, change in enumerate([{}, {"seed": 1}]):
        path = tmp_path / str(k) / "vit"
        save_model(path, "Dinov2", **change)
        specs.append(HuggingFaceEncoder(str(path)).spec())
    specs.append(HuggingFaceEncoder(str(tmp_path / "0" / "vit"), depths=(2,)).spec())
    save_processor(tmp_path / "0" / "vit", image_mean=(0.5, 0.5, 0.5))
    specs.append(HuggingFaceEncoder(str(tmp_path / "0" / "vit")).spec())
    save_processor(
        tmp_path / "0" / "vit", "DINOv3ViTImageProcessor", do_center_crop=None, size={"height": 28, "width": 28}
    )
    specs.append(HuggingFaceEncoder(str(tmp_path / "0" / "vit")).spec())
    assert len({json.dumps(spec) for spec in specs}) == 5


def test_neither_directory_nor_hub_name_identifies_an_encoder(saved, tmp_path, monkeypatch):
    path, _ = saved
    copy = shutil.copytree(path, tmp_path / "copy")
    ours, theirs = HuggingFaceEncoder(str(path)), HuggingFaceEncoder(str(copy))
    monkeypatch.setattr(huggingface, "locate", lambda source: Location(source=str(path), revision=COMMIT))
    hub = HuggingFaceEncoder("lab/from-hub")
    assert json_digest(ours.spec()) == json_digest(theirs.spec()) == json_digest(hub.spec())
    assert [e.name for e in (ours, theirs, hub)] == [path.name, "copy", "from-hub"]
    assert [e.provenance()["source"] for e in (ours, theirs, hub)] == [path.name, "copy", "lab/from-hub"]
    assert hub.provenance()["revision"] == COMMIT


def test_a_pooler_that_a_checkpoint_lacks_changes_nothing(tmp_path):
    """`transformers` draws it at random at each load; no token passes through it."""
    transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path)
    save_processor(tmp_path)
    first, second = HuggingFaceEncoder(str(tmp_path)), HuggingFaceEncoder(str(tmp_path))
    assert first.spec() == second.spec()
    np.testing.assert_array_equal(first.encode(IMAGES).cls, second.encode(IMAGES).cls)


# -- preprocessing -----------------------------------------------------------------------------------------------------

SQUARE = dict(size={"height": SIDE, "width": SIDE}, do_center_crop=None, crop_size=None)
PROCESSORS = {
    "dinov2": ("BitImageProcessor", {}),
    "dinov2-as-published": ("BitImageProcessor", {"size": {"shortest_edge": 36}}),
    "clip": ("CLIPImageProcessor", {}),
    "clip-as-first-published": (
        "",
        {
            "image_processor_type": None,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": SIDE,
            "crop_size": SIDE,
        },
    ),
    "siglip": ("SiglipImageProcessor", SQUARE),
    "vit": ("ViTImageProcessor", SQUARE | {"resample": 2}),
    "no-normalisation": ("BitImageProcessor", {"do_normalize": False}),
    "no-rescaling": ("BitImageProcessor", {"do_rescale": False}),
}


@pytest.mark.parametrize("shape", [(28, 28), (61, 61), (40, 75), (75, 41), (20, 31)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_that_of_transformers_own_pillow_processor(tmp_path, name, shape):
    from data.encoders.hub import locate
    from data.encoders.preprocessing import Preprocessing

    kind, settings = PROCESSORS[name]
    save_processor(tmp_path, kind, **settings)
    images = np.random.default_rng(2).integers(0, 256, (3, *shape, 3), np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(list(images), return_tensors="pt")
    ours = Preprocessing(locate(str(tmp_path)))(images)
    assert ours.keys() == theirs.keys() == {"pixel_values"}
    assert ours["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(ours["pixel_values"], theirs["pixel_values"], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("resample", "pillow"), [(2, Image.Resampling.BILINEAR), (3, Image.Resampling.BICUBIC)])
@pytest.mark.parametrize("shape", [(28, 28), (61, 61), (40, 75), (20, 31)])
def test_dinov3_resizes_in_floating_point_after_rescaling(tmp_path, shape, resample, pillow):
    """Oracle: Pillow's own resize of floating-point channels. (The processor itself needs torchvision.)"""
    from data.encoders.hub import locate
    from data.encoders.preprocessing import Preprocessing

    settings = dict(size={"height": SIDE, "width": SIDE}, do_center_crop=None, crop_size=None, resample=resample)
    save_processor(tmp_path, "DINOv3ViTImageProcessorFast", **settings)
    images = np.random.default_rng(2).integers(0, 256, (2, *shape, 3), np.uint8)
    found = Preprocessing(locate(str(tmp_path)))
    assert found.processor == found.settings["processor"] == "DINOv3ViTImageProcessor"
    for image, ours in zip(images, found(images)["pixel_values"], strict=True):
        for channel in range(3):
            plane = Image.fromarray(np.float32(image[..., channel] / 255))
            expected = (np.asarray(plane.resize((SIDE, SIDE), pillow)) - MEAN[channel]) / SD[channel]
            np.testing.assert_allclose(ours[channel], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("BitImageProcessor", {"crop_size": {"height": 30, "width": 30}}, "crops 30 x 30 out of 28 x 28 pixels"),
        ("BitImageProcessor", {"size": {"longest_edge": 28, "shortest_edge": 20}}, "resizes to .*longest_edge"),
        ("BitImageProcessor", {"do_pad": True}, "an image processor that pads"),
        ("DINOv3ViTImageProcessor", {}, "settings of DINOv3ViTImageProcessor that this command doesn't understand"),
        ("EfficientNetImageProcessor", {}, "the image processor EfficientNetImageProcessorPil, which this command"),
        (
            "BitImageProcessor",
            {"crop_size": {"height": 27, "width": 13}},
            "model and preprocessing of .* don't fit each other",
        ),
    ],
)
def test_preprocessing_that_would_be_got_wrong_is_refused(tmp_path, kind, settings, message):
    save_model(tmp_path, "Dinov2")
    save_processor(tmp_path, kind, **settings)
    with pytest.raises(ValueError, match=message):
        HuggingFaceEncoder(str(tmp_path))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, "Dinov2")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights 'layernorm.weight' of a dinov2"):
        HuggingFaceEncoder(str(tmp_path))


@pytest.mark.parametrize("depths", [(0,), (4,), (2, 1), (1, 1), ()])
def test_depths_that_do_not_exist_or_rise_are_refused(dinov2, depths):
    with pytest.raises(ValueError, match=r"must rise and lie within 1\.\.3"):
        HuggingFaceEncoder(str(dinov2), depths=depths)


def test_a_transformer_without_any_token_of_the_whole_image_is_refused(tmp_path):
    save_model(tmp_path, "SiglipVision", vision_use_head=False)
    with pytest.raises(ValueError, match="has neither a CLS token nor a pooling head"):
        HuggingFaceEncoder(str(tmp_path))


def test_a_grid_that_is_not_square_is_refused(tmp_path):
    save_model(tmp_path, "Dinov2")
    save_processor(tmp_path, crop_size={"height": SIDE, "width": PATCH})
    with pytest.raises(ValueError, match="gives 2 patch tokens, not a square grid of patches"):
        HuggingFaceEncoder(str(tmp_path))


def test_preprocessing_of_another_size_than_the_models_is_refused(tmp_path):
    save_model(tmp_path, "CLIPVision")
    save_processor(tmp_path, size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    with pytest.raises(ValueError, match=r"model and preprocessing of .* don't fit .*\(42\*42\) doesn't match model"):
        HuggingFaceEncoder(str(tmp_path))


def test_a_network_of_another_kind_is_refused(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ValueError, match=r"\(resnet\) is not a vision transformer that this command understands"):
        HuggingFaceEncoder(str(tmp_path))


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model that transformers .* knows \("):
        HuggingFaceEncoder(str(tmp_path))


@pytest.mark.parametrize("file", ["model.safetensors", "preprocessor_config.json"])
def test_a_directory_that_lacks_a_file_is_refused(tmp_path, file):
    save_model(tmp_path, "Dinov2")
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"lacks part of an encoder \(.*{file}.*\); save model and processor there"):
        HuggingFaceEncoder(str(tmp_path))


# -- a real encoder ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_encoder_gives_its_blocks(shared_data):
    source = shared_data / "encoder-vits14"
    files = sorted((shared_data / "photos").glob("*.jpg"))[:4]
    images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    encoder = HuggingFaceEncoder(str(source), depths=(3, 7, 12))
    tokens = encoder.encode(images)
    assert (encoder.width, encoder.grid) == (384, (16, 16))
    assert tokens.cls.shape == (4, 3, 384)
    assert tokens.patch.shape == (4, 3, 256, 384)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(source)(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model(pixel_values=pixels, output_hidden_states=True)
        expected = [model.layernorm(found.hidden_states[d]) for d in (3, 7, 12)]
    for k, block in enumerate(expected):
        np.testing.assert_allclose(tokens.cls[:, k], block[:, 0], atol=1e-3)
        np.testing.assert_allclose(tokens.patch[:, k], block[:, 1:], atol=1e-3)
    np.testing.assert_allclose(tokens.cls[:, 2], found.last_hidden_state[:, 0], atol=1e-3)
    np.testing.assert_allclose(tokens.patch[:, 2], found.last_hidden_state[:, 1:], atol=1e-3)
    cosine = np.einsum("bpw,bpw->bp", tokens.patch[:, 0], tokens.patch[:, 2])
    cosine /= np.linalg.norm(tokens.patch[:, 0], axis=-1) * np.linalg.norm(tokens.patch[:, 2], axis=-1)
    assert cosine.mean() < 0.9, "depths differ"
