"""Shards: statistics that are exact, and decoding in threads that keeps the order."""

import threading
import time

import numpy as np
import pytest

from patchloom.pipelines.prepare import shard_maker as shards
from patchloom.pipelines.prepare.shard_maker import Decoders, sums


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (700, 1, 5, 3), (3, 4, 400, 401)])
def test_sums_of_pixels_are_exact(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels[0] = 255
    exact = pixels.astype(np.int64)
    found = sums({"image": pixels})
    assert found["sum"] == exact.sum((0, 2, 3)).tolist()
    assert found["squares"] == (exact**2).sum((0, 2, 3)).tolist()
    assert found["count"] == [pixels[:, 0].size] * shape[1]
    assert shards.VALUES_PER_SUM < 400 * 401  # larger images are summed whole


def test_sums_of_latents_include_their_std() -> None:
    random = np.random.default_rng(0)
    mean, std = (random.standard_normal((9, 2, 4, 4)).astype(np.float16) for _ in range(2))
    found = sums({"mean": mean, "std": std})
    z = mean.astype(np.float64), std.astype(np.float64)
    np.testing.assert_allclose(found["sum"], z[0].sum((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["squares"], (z[0] ** 2 + z[1] ** 2).sum((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("threads", [1, 3])
def test_decoders_keep_the_order_and_return_errors(threads: int) -> None:
    read: list[int] = []
    made_by = set()

    def contents():
        for number in range(40):
            read.append(number)
            yield (OSError("not there") if number == 7 else bytes([number])), bytes([number])

    def decoded(content: bytes) -> np.ndarray:
        made_by.add(threading.get_ident())
        time.sleep(0.002 if content[0] % 3 else 0.006)
        if content[0] == 11:
            raise ValueError("broken")
        return np.full((2, 2, 3), content[0])

    for number, (found, digest) in enumerate(Decoders(threads).map(decoded, contents())):
        assert digest == bytes([number])
        assert len(read) <= number + 1 + 3 * threads  # few prefetched images: decoded images are large
        if number in (7, 11):
            assert isinstance(found, OSError if number == 7 else ValueError)
        else:
            assert isinstance(found, np.ndarray) and found.max() == number
    assert len(made_by) == threads and len(read) == 40
