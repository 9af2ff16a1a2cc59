"""Tokens are computed once per image block, resume by block, and never mix encoders."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from data.encoders import Encoder, Tokens
from data.encoders.gabor import GaborEncoder
from data.features import compute_features, load_encoder
from data.store import PooledStore


@dataclass
class CountingEncoder:
    """Tokens that spell the mean colour of the image; remembers how many it has encoded."""

    name: str = "counting"
    depths: tuple[int, ...] = (2,)
    width: int = 3
    grid: tuple[int, int] = (1, 1)
    scale: float = 1.0
    seen: list[int] = field(default_factory=list)
    stop_after: int | None = None

    def spec(self):
        return {"kind": "counting", "scale": self.scale, "depths": list(self.depths)}

    def encode(self, images):
        if self.stop_after is not None and sum(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(len(images))
        mean = images.mean((1, 2), dtype=np.float32) * np.float32(self.scale)
        return Tokens(cls=mean[:, None], patch=mean[:, None, None])


def colours(store: PooledStore) -> np.ndarray:
    return np.concatenate([pixels[:, 0, 0] for _, _, pixels in store.pixels()])


def test_every_image_has_its_own_tokens(store, make_block):
    store.add_images(make_block([f"more-{k}" for k in range(5)]))
    done = []
    assert compute_features(store, CountingEncoder(), progress=done.append) == "counting"
    cls, patch = store.tokens("counting").read(np.arange(65))
    np.testing.assert_array_equal(cls[:, 0], colours(store))
    np.testing.assert_array_equal(patch[:, 0, 0], colours(store))
    assert sum(done) == 65


def test_what_is_there_is_not_encoded_again(store, make_block, monkeypatch):
    compute_features(store, CountingEncoder())
    again = CountingEncoder()
    with monkeypatch.context() as patch:
        patch.setattr(PooledStore, "pixels", None)  # nor is a picture read
        compute_features(store, again)
    assert again.seen == []
    store.add_images(make_block(["later"]))
    compute_features(store, again)
    assert again.seen == [1]


def test_an_interrupted_run_goes_on_at_its_block(store, make_block):
    store.add_images(make_block([f"more-{k}" for k in range(40)]))
    with pytest.raises(KeyboardInterrupt):
        compute_features(store, CountingEncoder(stop_after=70))
    assert store.missing_tokens("counting") == ["0001"]
    rest = CountingEncoder()
    compute_features(PooledStore.open(store.path, writable=True), rest)
    assert sum(rest.seen) == 40
    np.testing.assert_array_equal(store.tokens("counting").read(np.arange(100))[0][:, 0], colours(store))


def test_another_encoder_needs_another_name(store):
    compute_features(store, CountingEncoder())
    other = CountingEncoder(scale=0.5)
    with pytest.raises(ValueError, match="'counting' from another encoder or other depths; pass --name"):
        compute_features(store, other)
    assert other.seen == []
    assert compute_features(store, other, name="half") == "half"
    assert store.encoders == ["counting", "half"]


def test_what_half_precision_cannot_hold_is_refused(store):
    with pytest.raises(
        ValueError, match="'counting' gives tokens that half precision can't hold, within images 0 to 31"
    ):
        compute_features(store, CountingEncoder(scale=1e6))
    assert store.missing_tokens("counting") == ["0000"]


def test_images_without_pixels_are_refused(tmp_path, make_block):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.add_images(make_block(["a"], pixels=False))
    with pytest.raises(ValueError, match="without pixels"):
        compute_features(store, CountingEncoder())


def test_an_encoder_is_found_by_name():
    assert load_encoder("gabor").spec() == GaborEncoder().spec()
    assert load_encoder("gabor", depths=(2, 4)).depths == (2, 4)
    found: Encoder = load_encoder("gabor")
    assert len(found.depths) == 4


def test_an_encoder_that_is_nowhere_is_said_to_be(tmp_path):
    with pytest.raises(ValueError, match=r"no encoder .*nowhere.*: neither a local directory nor reachable"):
        load_encoder(str(tmp_path / "nowhere"))
