"""A prediction from pixels is that from a store's tokens, whatever else is in the batch; another encoder is refused."""

import numpy as np
import pytest
import torch

from data.encoders.gabor import GaborEncoder
from data.features import compute_features, load_encoder
from data.schema import json_digest
from data.sources import ImageBlock
from data.store import PooledStore
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.prediction import Predictor, encoder_of
from tests.tiny_encoder import save_vit
from tests.tiny_store import TINY_BACKBONE
from tests.tiny_version import N_VOXELS, gabor_lineage, picture, random_model


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(random_model(*N_VOXELS), GaborEncoder(), "subj05")


def test_pixels_give_what_a_stores_tokens_give(predictor, tmp_path):
    pixels = np.stack([picture(k) for k in range(20)])
    store = PooledStore.create(tmp_path / "pictures.zarr", name="pictures")
    store.add_images(ImageBlock(ids=[f"image{k}" for k in range(20)], roles=[""] * 20, pixels=pixels))
    compute_features(store, GaborEncoder())
    cls, patch = (torch.from_numpy(tokens).float() for tokens in store.tokens("gabor").read(np.arange(20)))
    with torch.inference_mode():
        expected = random_model(*N_VOXELS).predict(cls, patch, "subj05").numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(predictor.predict(list(pixels)), expected, rtol=0, atol=1e-5)


def test_a_prediction_does_not_depend_on_its_neighbours_and_their_sizes(predictor):
    images = [picture(k, height=30 + 7 * (k % 3), width=40 + 5 * (k % 2)) for k in range(9)]
    together = predictor.predict(images)
    alone = np.concatenate([predictor.predict([image]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01
    streamed = np.concatenate(list(predictor.stream([images[:2], images[2:3], images[3:]])))
    np.testing.assert_allclose(streamed, together, rtol=0, atol=1e-4)


def test_samples_scatter_about_the_prediction_with_the_voxels_noise_and_come_again_by_their_seed(predictor):
    images = [picture(0), picture(1)]
    drawn, again, other = (
        np.concatenate(list(predictor.stream([images], n_samples=100, seed=seed))) for seed in (3, 3, 4)
    )
    assert drawn.shape == (2, 100, N_VOXELS["subj05"])
    np.testing.assert_array_equal(drawn, again)
    assert not np.array_equal(drawn, other)
    noise = random_model(*N_VOXELS).adapter("subj05").noise_sd.numpy()
    assert (drawn.std(1) > 0.7 * noise).all()
    assert np.abs(drawn.mean(1) - predictor.predict(images)).max() < 0.5


def test_noise_that_was_not_fitted_is_said(predictor):
    model = random_model("subj01")
    model.adapter("subj01").noise_sd.fill_(torch.nan)
    with pytest.raises(ValueError, match="the noise of 'subj01' hasn't been fitted"):
        list(Predictor(model, GaborEncoder(), "subj01").stream([[picture(0)]], n_samples=2))


def test_many_samples_shrink_the_batch(predictor):
    assert predictor.batch_size(32, None) == 32
    assert predictor.batch_size(32, 1_000_000) == 5
    assert predictor.batch_size(32, 1_000_000_000) == 1


def test_the_lineages_encoder_is_loaded_with_its_depths_and_another_one_is_refused(tmp_path):
    assert encoder_of({"encoder": gabor_lineage()}).spec() == GaborEncoder().spec()
    spec = GaborEncoder(depths=(2, 3)).spec()
    some = gabor_lineage() | {"spec": spec, "digest": json_digest(spec)}
    assert encoder_of({"encoder": some}).depths == (2, 3)
    wrong = gabor_lineage() | {"digest": "sha256:0", "spec": spec | {"size": 64}}
    with pytest.raises(ValueError, match=r"the encoder 'gabor' isn't the one .* not sha256:0 \(other: size\); name by"):
        encoder_of({"encoder": wrong})
    for partial in ({}, {"encoder": {"name": "gabor"}}, {"encoder": "gabor"}):
        with pytest.raises(ValueError, match="doesn't describe its encoder"):
            encoder_of(partial)


def test_an_encoder_from_a_directory_is_named_and_known_by_its_weights_wherever_it_lies(tmp_path):
    here, moved, other = tmp_path / "vit", tmp_path / "elsewhere", tmp_path / "other"
    for path, seed in ((here, 0), (moved, 0), (other, 1)):
        save_vit(path, seed=seed)
    encoder = load_encoder(str(here))
    known = {
        "name": "vit",
        "spec": encoder.spec(),
        "digest": json_digest(encoder.spec()),
        "source": "vit",
        "revision": None,
    }
    with pytest.raises(ValueError, match="from a directory 'vit', which isn't here; name it by --encoder DIR"):
        encoder_of({"encoder": known})
    assert encoder_of({"encoder": known}, str(moved)).spec() == encoder.spec()
    with pytest.raises(ValueError, match=r"other.* isn't the one .*, 'vit'.*\(other: weights\)"):
        encoder_of({"encoder": known}, str(other))


def test_an_unknown_subject_and_tokens_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="no adapter for 'subj09'; it has subj01"):
        Predictor(random_model("subj01"), GaborEncoder(), "subj09")
    with pytest.raises(ValueError, match=r"gives \(1, 64, 48\) depths, patches and features, the model takes"):
        Predictor(random_model("subj01"), GaborEncoder(depths=(1,)), "subj01")


@pytest.mark.slow
def test_a_real_encoders_pixels_give_what_its_stored_tokens_give(shared_data, tmp_path):
    encoder = load_encoder(str(shared_data / "encoder-vits14"))
    rows, columns = encoder.grid
    torch.manual_seed(0)
    shape = TokenShape(depth=len(encoder.depths), patch=rows * columns, width=encoder.width)
    model = EncodingModel(shape, TINY_BACKBONE, {"subj01": torch.arange(12) % 3})
    model.adapter("subj01").network_share.fill_(0.5)
    for tensor in model.adapter("subj01").linear.buffers():
        if tensor.is_floating_point():
            tensor.normal_(std=0.2)
    pixels = np.stack([picture(k, height=100, width=120) for k in range(10)])
    store = PooledStore.create(tmp_path / "pictures.zarr", name="pictures")
    store.add_images(ImageBlock(ids=[f"image{k}" for k in range(10)], roles=[""] * 10, pixels=pixels))
    name = compute_features(store, encoder)
    cls, patch = (torch.from_numpy(tokens).float() for tokens in store.tokens(name).read(np.arange(10)))
    with torch.inference_mode():
        expected = model.eval().predict(cls, patch, "subj01").numpy()
    predictor = Predictor(model, encoder, "subj01")
    assert expected.std() > 0.1
    np.testing.assert_allclose(predictor.predict(list(pixels)), expected, rtol=0, atol=1e-5)
    alone = np.concatenate([predictor.predict([image]) for image in pixels])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-4 * expected.std())
