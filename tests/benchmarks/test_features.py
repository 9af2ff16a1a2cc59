"""Encoding photographs: images per second, and the share of the machine's own rate of fp32 matrix products.

The rate is measured before every round, on the same threads, since it changes with what else the machine does.
"""

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.encoders.huggingface import HuggingFaceEncoder
from data.features import compute_features
from data.sources import ImageBlock
from data.store import PooledStore

pytestmark = pytest.mark.slow
N_PHOTOS, SIDE, ROUNDS = 32, 2048, 5


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """As many threads as there are cores for us, which is what torch takes by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(shared_data) -> np.ndarray:
    files = sorted((shared_data / "photos").glob("*.jpg"))[:N_PHOTOS]
    return np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])


@pytest.fixture(scope="module")
def encoder(shared_data) -> HuggingFaceEncoder:
    return HuggingFaceEncoder(str(shared_data / "encoder-vits14"))


def operations(n_blocks: int = 12, n: int = 257, width: int = 384, patch: int = 14) -> int:
    """Return the floating-point operations of the matrix products of one image, of `n` tokens."""
    dense = 24 * n * width**2  # queries, keys, values, output: 4 products; MLP: two of four times the width
    attention = 4 * n**2 * width  # of queries and keys, of weights and values
    return n_blocks * (dense + attention) + 2 * (n - 1) * 3 * patch**2 * width


def product_rate(seconds: float = 0.5) -> float:
    """Return the rate of large fp32 matrix products, in operations per second."""
    a, b = torch.randn(2, SIDE, SIDE)
    started, n = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        torch.mm(a, b)
        n += 1
    return n * 2 * SIDE**3 / passed


def measure(benchmark, work, threads: int, capsys) -> None:
    """Run `work`, which encodes all photos; note images per second and share of the product rate."""
    rates: list[float] = []
    shares: list[float] = []

    def timed() -> None:
        started = time.perf_counter()
        work()
        passed = time.perf_counter() - started
        shares.append(N_PHOTOS * operations() / passed / rates[-1])

    def before() -> None:
        rates.append(product_rate())

    benchmark.pedantic(timed, setup=before, rounds=ROUNDS, warmup_rounds=1)
    share = statistics.median(shares)
    benchmark.extra_info |= {
        "threads": threads,
        "product GFLOP/s": [round(rate / 1e9) for rate in rates],
        "share of the product rate": [round(share, 2) for share in shares],
        "median share": round(share, 2),
    }
    told = f"{share:.2f} of the product rate, {statistics.median(rates) / 1e9:.0f} GFLOP/s on {threads} threads"
    with capsys.disabled():
        print(f"\n{benchmark.name}: {told}")


@pytest.mark.benchmark(group=f"{N_PHOTOS} photos through ViT-S/14 at 224 px, depths 3 6 9 12")
def test_encoding(benchmark, encoder, photos, threads, capsys):
    measure(benchmark, lambda: encoder.encode(photos), threads, capsys)
    assert np.isfinite(encoder.encode(photos[:2]).patch).all()


@pytest.mark.benchmark(group=f"{N_PHOTOS} photos through ViT-S/14 at 224 px, depths 3 6 9 12")
def test_the_whole_command_store_to_store(benchmark, encoder, photos, threads, tmp_path: Path, capsys):
    store = PooledStore.create(tmp_path / "photos.zarr", name="photos")
    store.add_images(ImageBlock(ids=[str(k) for k in range(N_PHOTOS)], roles=[""] * N_PHOTOS, pixels=photos))
    names = (f"run-{k}" for k in range(ROUNDS + 2))
    measure(benchmark, lambda: compute_features(store, encoder, name=next(names)), threads, capsys)
    reader = store.tokens(store.encoders[0])
    assert reader.shape == (4, 256, 384)
