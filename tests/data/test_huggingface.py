"""A vision transformer's tokens are its blocks' outputs after its own final layer norm, without the registers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.encoders.huggingface import HuggingFaceEncoder

SIDE, PATCH, WIDTH, BLOCKS = 28, 14, 32, 3
MEAN, SD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


def save_processor(path: Path, **more) -> None:
    settings = {
        "image_processor_type": "BitImageProcessor",
        **dict(do_resize=True, size={"shortest_edge": SIDE}, resample=3, do_convert_rgb=True),
        **dict(do_center_crop=True, crop_size={"height": SIDE, "width": SIDE}),
        **dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=MEAN, image_std=SD),
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings | more))


def save_model(path: Path, kind: str, *, seed: int = 0, **more) -> torch.nn.Module:
    import transformers

    torch.manual_seed(seed)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    config = getattr(transformers, f"{kind}Config")(**(sizes | more))
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        model.layernorm.weight.uniform_(0.5, 2)
        model.layernorm.bias.normal_()
    model.save_pretrained(path)
    save_processor(path)
    return model


@pytest.fixture(scope="module", params=["Dinov2", "Dinov2WithRegisters"])
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoders") / request.param.lower()
    return path, save_model(path, request.param)


def block_outputs(model, images: np.ndarray) -> list[torch.Tensor]:
    """Return each block's output after the final layer norm, by hooks on the blocks."""
    found: list[torch.Tensor] = []

    def keep(module, inputs, output):
        found.append(model.layernorm(output[0] if isinstance(output, tuple) else output))

    hooks = [block.register_forward_hook(keep) for block in model.encoder.layer]
    pixels = (images / 255 - np.array(MEAN)) / np.array(SD)
    with torch.no_grad():
        model(pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    for hook in hooks:
        hook.remove()
    return found


def test_depths_are_the_blocks_outputs_after_the_layer_norm(saved):
    path, model = saved
    encoder = HuggingFaceEncoder(str(path), depths=(1, 2, 3))
    tokens, expected = encoder.encode(IMAGES), block_outputs(model, IMAGES)
    n_registers = getattr(model.config, "num_register_tokens", 0)
    assert tokens.cls.shape == (3, 3, WIDTH)
    assert tokens.patch.shape == (3, 3, (SIDE // PATCH) ** 2, WIDTH)
    for k, block in enumerate(expected):
        np.testing.assert_allclose(tokens.cls[:, k], block[:, 0], atol=1e-4)
        np.testing.assert_allclose(tokens.patch[:, k], block[:, 1 + n_registers :], atol=1e-4)


def test_the_last_depth_is_what_the_model_gives(saved):
    path, model = saved
    pixels = (IMAGES / 255 - np.array(MEAN)) / np.array(SD)
    with torch.no_grad():
        expected = model(pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).last_hidden_state
    tokens = HuggingFaceEncoder(str(path), depths=(BLOCKS,)).encode(IMAGES)
    np.testing.assert_allclose(tokens.cls[:, 0], expected[:, 0], atol=1e-4)


def test_what_an_encoder_says_of_itself(saved):
    path, _ = saved
    encoder = HuggingFaceEncoder(str(path))
    assert encoder.name == path.name
    assert (encoder.depths, encoder.width, encoder.grid) == ((1, 2, 3), WIDTH, (2, 2))
    spec = encoder.spec()
    assert json.loads(json.dumps(spec)) == spec
    assert spec == HuggingFaceEncoder(str(path) + "/").spec()
    assert spec["preprocessing"]["image_mean"] == list(MEAN)


def test_weights_normalisation_and_depths_identify_an_encoder(tmp_path):
    specs = []
    for k, change in enumerate([{}, {"seed": 1}]):
        path = tmp_path / str(k) / "vit"
        save_model(path, "Dinov2", **change)
        specs.append(HuggingFaceEncoder(str(path)).spec())
    specs.append(HuggingFaceEncoder(str(tmp_path / "0" / "vit"), depths=(2,)).spec())
    save_processor(tmp_path / "0" / "vit", image_mean=(0.5, 0.5, 0.5))
    specs.append(HuggingFaceEncoder(str(tmp_path / "0" / "vit")).spec())
    assert len({json.dumps(spec) for spec in specs}) == 4


def test_a_pooler_that_a_checkpoint_lacks_changes_nothing(tmp_path):
    """`transformers` draws it at random at each load; no token passes through it."""
    import transformers

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(tmp_path)
    save_processor(tmp_path)
    first, second = HuggingFaceEncoder(str(tmp_path)), HuggingFaceEncoder(str(tmp_path))
    assert first.spec() == second.spec()
    np.testing.assert_array_equal(first.encode(IMAGES).cls, second.encode(IMAGES).cls)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, "Dinov2")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights 'layernorm.weight' of a dinov2"):
        HuggingFaceEncoder(str(tmp_path))


@pytest.mark.parametrize("depths", [(0,), (4,), (2, 1), (1, 1)])
def test_depths_that_do_not_exist_or_rise_are_refused(saved, depths):
    with pytest.raises(ValueError, match=r"must rise and lie within 1\.\.3"):
        HuggingFaceEncoder(str(saved[0]), depths=depths)


def test_a_transformer_without_cls_is_refused(tmp_path):
    import transformers

    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)).save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ValueError, match="not a square grid of patches; choose a vision transformer with a CLS token"):
        HuggingFaceEncoder(str(tmp_path))


def test_a_network_of_another_kind_is_refused(tmp_path):
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ValueError, match=r"\(resnet\) is not a vision transformer that this command understands"):
        HuggingFaceEncoder(str(tmp_path))


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no encoder .*: neither a local directory nor reachable"):
        HuggingFaceEncoder(str(tmp_path))


@pytest.mark.slow
def test_a_trained_encoder_gives_its_blocks(shared_data):
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    source = shared_data / "encoder-vits14"
    files = sorted((shared_data / "photos").glob("*.jpg"))[:4]
    images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    encoder = HuggingFaceEncoder(str(source), depths=(3, 7, 12))
    tokens = encoder.encode(images)
    assert (encoder.width, encoder.grid) == (384, (16, 16))
    assert tokens.cls.shape == (4, 3, 384)
    assert tokens.patch.shape == (4, 3, 256, 384)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    pixels = AutoImageProcessor.from_pretrained(source)(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model(pixel_values=pixels, output_hidden_states=True)
        expected = [model.layernorm(found.hidden_states[d]) for d in (3, 7, 12)]
    for k, block in enumerate(expected):
        np.testing.assert_allclose(tokens.cls[:, k], block[:, 0], atol=1e-3)
        np.testing.assert_allclose(tokens.patch[:, k], block[:, 1:], atol=1e-3)
    np.testing.assert_allclose(tokens.cls[:, 2], found.last_hidden_state[:, 0], atol=1e-3)
    cosine = np.einsum("bpw,bpw->bp", tokens.patch[:, 0], tokens.patch[:, 2])
    cosine /= np.linalg.norm(tokens.patch[:, 0], axis=-1) * np.linalg.norm(tokens.patch[:, 2], axis=-1)
    assert cosine.mean() < 0.9, "depths differ"
