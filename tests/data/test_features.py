"""Tokens are computed once, go on after an interruption bit for bit, and never mix encoders."""

import hashlib
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import data.store.zarr_arrays
from data.encoders import Encoder, Tokens
from data.encoders.gabor import GaborEncoder
from data.features import compute_features, load_encoder, n_without_pixels
from data.sources import ImageBlock
from data.store import PooledStore
from tests.tiny_encoder import save_processor, save_vit


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

    def provenance(self):
        return {"made": "for the test"}

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
        compute_features(store, CountingEncoder(stop_after=60))
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
        ValueError, match="'counting' gives tokens that half precision can't hold, within images 0 to 59"
    ):
        compute_features(store, CountingEncoder(scale=1e6))
    assert store.missing_tokens("counting") == ["0000"]


def test_a_store_without_any_pixels_is_refused(tmp_path, make_block):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.add_images(make_block(["a", "b"], pixels=False))
    with pytest.raises(ValueError, match=r"all 2 images of .*s.zarr were stored without pixels.*without --no-pixels"):
        compute_features(store, CountingEncoder())
    assert store.encoders == []


def test_an_encoder_is_found_by_name():
    assert load_encoder("gabor").spec() == GaborEncoder().spec()
    assert load_encoder("gabor", depths=(2, 4)).depths == (2, 4)
    found: Encoder = load_encoder("gabor")
    assert len(found.depths) == 4


def test_an_encoder_that_is_nowhere_is_said_to_be(tmp_path):
    with pytest.raises(ValueError, match=r"no encoder .*nowhere.*: neither a local directory nor reachable"):
        load_encoder(str(tmp_path / "nowhere"))


# -- interruptions -----------------------------------------------------------------------------------------------------

N_IMAGES = 700
FIRST_OF_BATCH = """
import sys, time
import numpy as np
import data.store.zarr_arrays
from data.encoders import Tokens
from data.features import compute_features
from data.store import PooledStore

class FirstOfBatch:
    "Tokens that depend on what else is in the batch, as the last bits of a matrix product do."
    name, depths, width, grid = "first", (1,), 8, (4, 4)

    def spec(self): return {"kind": "first", "depths": [1]}
    def provenance(self): return {}
    def encode(self, images):
        colour = images.mean((1, 2), dtype=np.float32) + images[0].mean((0, 1), dtype=np.float32) / 7
        cls = np.resize(colour, (len(images), 1, 8))
        register = np.ascontiguousarray(np.broadcast_to(cls[:, :, None], (len(images), 1, 2, 8)))
        return Tokens(cls=cls, patch=np.repeat(register, 8, axis=2), register=register)

def run(path, wait_s):
    def told(n):
        print(n, flush=True)
        time.sleep(wait_s)
    data.store.zarr_arrays._SHARD_BYTES = 150 * 16 * 8 * 2
    data.store.zarr_arrays._CHUNK_BYTES["tokens"] = 10 * 16 * 8 * 2
    compute_features(PooledStore.open(path, writable=True), FirstOfBatch(), progress=told)
"""


def many_images(path: Path, n: int = N_IMAGES) -> PooledStore:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)
    store = PooledStore.create(path, name="many")
    store.add_images(ImageBlock(ids=[f"image{k}" for k in range(n)], roles=[""] * n, pixels=pixels))
    return store


def digests(path: Path) -> dict[str, str]:
    """Return the digest of every file below `path`, but for those that zarr was writing when it was killed."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".partial")
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def start(path: Path, *, wait_s: float) -> subprocess.Popen[str]:
    """Compute features in a process of its own, which tells of each batch."""
    code = FIRST_OF_BATCH + f"run({str(path)!r}, {wait_s})"
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)


def test_killed_runs_leave_the_bytes_of_one_that_was_not(tmp_path):
    whole, killed = many_images(tmp_path / "whole.zarr"), many_images(tmp_path / "killed.zarr")
    with start(Path(whole.path), wait_s=0) as process:
        assert process.wait() == 0
    assert whole.n_encoded("first") == N_IMAGES
    rng, reached = np.random.default_rng(0), [0]
    for _ in range(3):
        with start(Path(killed.path), wait_s=0.05) as process:
            assert process.stdout is not None
            for _ in range(rng.integers(3, 5)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert killed.missing_tokens("first") == ["0000"]
        reached.append(killed.n_encoded("first"))
    assert reached == sorted(reached)
    assert 0 < reached[-1] < N_IMAGES
    with start(Path(killed.path), wait_s=0) as process:
        rest, _ = process.communicate()
        assert process.returncode == 0
    assert sum(map(int, rest.split())) == N_IMAGES - reached[-1]
    assert digests(Path(killed.path) / "features") == digests(Path(whole.path) / "features")


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 10 images of `tiny_vit`'s tokens."""
    row = 3 * 4 * 32 * 2
    monkeypatch.setattr(data.store.zarr_arrays, "_SHARD_BYTES", 10 * row)
    monkeypatch.setitem(data.store.zarr_arrays._CHUNK_BYTES, "tokens", 5 * row)


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> Path:
    return save_vit(tmp_path_factory.mktemp("encoders") / "vit")


def test_a_vision_transformers_tokens_go_on_bit_for_bit(tmp_path, tiny_vit, small_shards):
    whole, cut = many_images(tmp_path / "whole.zarr", 150), many_images(tmp_path / "cut.zarr", 150)
    encoder = load_encoder(str(tiny_vit))
    compute_features(whole, encoder)
    told = []

    def stop(n: int) -> None:
        told.append(n)
        if sum(told) > 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_features(cut, encoder, progress=stop)
    assert cut.n_encoded("vit") == 60, "whole shards of the batches before the interruption"
    told.clear()
    compute_features(PooledStore.open(cut.path, writable=True), load_encoder(str(tiny_vit)), progress=told.append)
    assert sum(told) == 90
    assert digests(Path(cut.path) / "features") == digests(Path(whole.path) / "features")


def test_a_shard_that_was_written_but_not_counted_is_written_again(tmp_path, tiny_vit, small_shards):
    whole, cut = many_images(tmp_path / "whole.zarr", 75), many_images(tmp_path / "cut.zarr", 75)
    compute_features(whole, load_encoder(str(tiny_vit)))

    def stop(n: int) -> None:
        if cut.n_encoded("vit"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_features(cut, load_encoder(str(tiny_vit)), progress=stop)
    assert cut.n_encoded("vit") == 60
    of_whole, of_cut = (Path(store.path) / "features/vit/0000/patch/c" for store in (whole, cut))
    for shard in ("6/0/0/0", "7/0/0/0"):  # the last has room for images that there aren't
        (of_cut / shard).parent.mkdir(parents=True)
        (of_cut / shard).write_bytes((of_whole / shard).read_bytes())
    compute_features(cut, load_encoder(str(tiny_vit)))
    assert digests(Path(cut.path) / "features") == digests(Path(whole.path) / "features")


# -- what is refused ---------------------------------------------------------------------------------------------------


def other_weights(path: Path) -> dict:
    save_vit(path, seed=1)
    return {}


def other_preprocessing(path: Path) -> dict:
    save_processor(path, image_mean=(0.5, 0.5, 0.5))
    return {}


def other_resize(path: Path) -> dict:
    save_processor(path, resample=2)
    return {}


def other_depths(path: Path) -> dict:
    return {"depths": (1, 3)}


@pytest.mark.parametrize("change", [other_weights, other_preprocessing, other_resize, other_depths])
def test_tokens_of_a_changed_encoder_are_never_added(tmp_path, store, make_block, change):
    path = save_vit(tmp_path / "vit")
    compute_features(store, load_encoder(str(path)))
    before = digests(Path(store.path) / "features")
    store.add_images(make_block(["later"]))
    options = change(path)
    with pytest.raises(ValueError, match="'vit' from another encoder or other depths; pass --name to keep both"):
        compute_features(store, load_encoder(str(path), **options))
    assert digests(Path(store.path) / "features") == before
    assert compute_features(store, load_encoder(str(path), **options), name="vit-2") == "vit-2"


def test_the_same_encoder_goes_on_whatever_it_runs_on(store, make_block):
    """Libraries, commit and device are recorded, but don't make another encoder."""
    compute_features(store, CountingEncoder())
    store.add_images(make_block(["later"]))

    class Elsewhere(CountingEncoder):
        def provenance(self):
            return {"made": "elsewhere"}

    compute_features(store, Elsewhere())
    assert store.missing_tokens("counting") == []
    assert store._features("counting").attrs["provenance"] == {"made": "for the test"}


def test_image_blocks_may_differ_in_size(store, tiny_vit):
    rng = np.random.default_rng(1)
    large = rng.integers(0, 256, (3, 40, 50, 3), np.uint8)
    store.add_images(ImageBlock(ids=["a", "b", "c"], roles=[""] * 3, pixels=large))
    encoder = load_encoder(str(tiny_vit), depths=(2,))
    compute_features(store, encoder)
    cls, patch = store.tokens("vit").read(np.arange(60, 63))
    np.testing.assert_array_equal(cls, encoder.encode(large).cls.astype(np.float16))
    np.testing.assert_array_equal(patch, encoder.encode(large).patch.astype(np.float16))


def test_blocks_without_pixels_are_passed_over(store, make_block):
    store.add_images(make_block(["bare-1", "bare-2"], pixels=False))
    store.add_images(make_block(["later"]))
    encoder = CountingEncoder()
    compute_features(store, encoder)
    assert n_without_pixels(store) == 2
    assert sum(encoder.seen) == 61
    assert store.missing_tokens("counting") == ["0001"]
    later = next(pixels for _, _, pixels in store.pixels(block="0002"))
    np.testing.assert_array_equal(store.tokens("counting").read(np.array([62]))[0][0], later[:, 0, 0])
    with pytest.raises(ValueError, match="lacks 'counting' tokens of image block 0001"):
        store.tokens("counting").read(np.array([60]))
    compute_features(store, encoder)
    assert sum(encoder.seen) == 61


def test_tokens_that_another_run_finishes_meanwhile_are_left_alone(store, make_block, monkeypatch):
    """The second run has seen that both blocks lack tokens, when the first writes them."""
    store.add_images(make_block(["more"]))
    second, told, write, after = CountingEncoder(), [], PooledStore.write_tokens, {}

    def late(self, name, block, batches):
        monkeypatch.setattr(PooledStore, "write_tokens", write)
        compute_features(store, CountingEncoder())
        after.update(digests(Path(store.path) / "features"))
        monkeypatch.setattr(PooledStore, "write_tokens", late_again)
        write(self, name, block, batches)

    def late_again(self, name, block, batches):
        assert store.missing_tokens(name) == []
        write(self, name, block, batches)

    monkeypatch.setattr(PooledStore, "write_tokens", late)
    compute_features(store, second, progress=told.append)
    assert (second.seen, told) == ([], [])
    assert digests(Path(store.path) / "features") == after
    np.testing.assert_array_equal(store.tokens("counting").read(np.arange(61))[0][:, 0], colours(store))


def test_pictures_that_an_encoder_cannot_take_are_named(store):
    class Picky(CountingEncoder):
        def encode(self, images):
            raise ValueError("only squares, please")

    with pytest.raises(ValueError, match=r"images of block 0000 of .*pooled.zarr: only squares, please"):
        compute_features(store, Picky())


def test_batches_shrink_where_an_images_tokens_are_large(store):
    """Declared size, not real: 4 depths of 64 x 64 patches of width 1024 are 64 MB an image."""
    encoder = CountingEncoder(depths=(1, 2, 3, 4), grid=(64, 64), width=1024)

    def encode(images):
        encoder.seen.append(len(images))
        return Tokens(cls=np.zeros((len(images), 4, 2), np.float32), patch=np.zeros((len(images), 4, 1, 2), np.float32))

    encoder.encode = encode
    compute_features(store, encoder)
    assert max(encoder.seen) * 64 <= 256
    assert sum(encoder.seen) == 60


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_shows_progress_from_what_is_there_on(tmp_path, tiny_vit, small_shards, monkeypatch, capsys):
    from rich.progress import Progress

    from data.__main__ import features

    store, started = many_images(tmp_path / "s.zarr", 150), []
    encoder = load_encoder(str(tiny_vit))

    def stop(n: int) -> None:
        if store.n_encoded("vit"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_features(store, encoder, progress=stop)
    add = Progress.add_task

    def spy(self, *args, **options):
        started.append((options["completed"], options["total"]))
        return add(self, *args, **options)

    monkeypatch.setattr(Progress, "add_task", spy)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal; elsewhere no bar is shown
    there = store.n_encoded("vit")
    assert there % 10 == 0
    assert 0 < there < 150
    features(store.path, encoder=str(tiny_vit))
    assert started == [(there, 150)]
    told = capsys.readouterr()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", told.out)
    assert f"vit tokens of 150 images ({150 - there} computed now)" in " ".join(plain.split())
    assert "images/s" in told.err


def test_the_command_tells_of_images_without_pixels(tmp_path, tiny_vit, make_block, capsys):
    from data.__main__ import features

    store = many_images(tmp_path / "s.zarr", 5)
    store.add_images(make_block(["bare-1", "bare-2"], pixels=False))
    for how in ("5 computed now", "all there already, nothing to do"):
        features(store.path, encoder=str(tiny_vit))
        told = " ".join(capsys.readouterr().out.split())
        assert f"vit tokens of 5 images ({how})" in told
        assert "warn 2 images were skipped: they were stored without pixels (--no-pixels)" in told
