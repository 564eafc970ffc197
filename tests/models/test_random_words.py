"""Random words are those of SplitMix64, have the same bits on every device, and pass tests of randomness."""

import numpy as np
import pytest
import torch
from scipy import stats

from patchloom.models import random_words
from patchloom.models.random_words import (
    GAMMA,
    Key,
    draw_words,
    key_of,
    normals,
    numpy_words,
    signed,
    uniforms,
    words_from,
)

CPU = torch.device("cpu")
KEY = key_of(3, "test")


def test_without_a_high_word_the_sequence_is_that_of_splitmix64() -> None:
    published = [  # rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert [Key(1234567).at(counter) for counter in range(5)] == published
    assert draw_words(Key(1234567), 0, 5, CPU).numpy().view(np.uint64).tolist() == published


@pytest.mark.parametrize("count", [1, 1000, 16_384, 16_385, 40_000])
@pytest.mark.parametrize("start", [0, 7, 5 << 48, 2**64 - 1000])
def test_numpy_and_tensor_operations_give_the_same_bits(
    count: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_numpy = draw_words(KEY, start, count, CPU)
    counters = (start + np.arange(count, dtype=object)) % 2**64
    assert np.array_equal(by_numpy.numpy().view(np.uint64), numpy_words(KEY, counters.astype(np.uint64)))
    monkeypatch.setattr(random_words, "NUMPY_DEVICES", ())
    assert torch.equal(draw_words(KEY, start, count, CPU), by_numpy)


def test_keys_as_tensors_give_the_same_bits_as_numbers() -> None:
    low, high = (torch.tensor(signed(word)) for word in (KEY.low + GAMMA * 10, KEY.high))
    assert torch.equal(words_from(torch.arange(100), low, high), draw_words(KEY, 9, 100, CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_same_words_and_uniforms_and_normals_within_two_ulp() -> None:
    cpu, gpu = (draw_words(KEY, 12345, 200_000, torch.device(name)) for name in ("cpu", "cuda"))
    assert torch.equal(gpu.cpu(), cpu)
    assert torch.equal(uniforms(gpu).cpu(), uniforms(cpu))
    one, other = normals(cpu), normals(gpu).cpu()
    ulp = torch.nextafter(one.abs(), torch.tensor(torch.inf)) - one.abs()
    assert ((one - other).abs() <= 2 * ulp).all()


def test_a_value_does_not_depend_on_what_else_is_drawn() -> None:
    values = 10_001
    whole = draw_words(KEY, 0, values, CPU)
    for first, last in ((0, 1), (1, 8), (5000, 5017), (3, 9000)):
        part = draw_words(KEY, first, last - first, CPU)
        assert torch.equal(part, whole[first:last])
        assert torch.equal(normals(part), normals(whole)[2 * first : 2 * last])
        assert torch.equal(uniforms(part), uniforms(whole)[2 * first : 2 * last])


def test_all_bits_are_balanced_and_independent_of_the_next_words() -> None:
    words = draw_words(KEY, 0, 40_000, CPU).numpy().view(np.uint64)
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).astype(np.float32)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / len(bits) ** 0.5
    for lag in (0, 1, 2):
        correlations = np.corrcoef(bits[: len(bits) - lag].T, bits[lag:].T)[:64, 64:] - (np.eye(64) if lag == 0 else 0)
        assert np.abs(correlations).max() < 5.5 / len(bits) ** 0.5


@pytest.mark.parametrize("bit", range(0, 64, 3))
def test_every_bit_of_a_counter_or_key_changes_half_of_the_bits_of_a_word(bit: int) -> None:
    counters = np.arange(1000, dtype=np.uint64) * np.uint64(12345)
    words = numpy_words(KEY, counters)
    changed = (
        numpy_words(KEY, counters ^ np.uint64(1 << bit)),
        numpy_words(Key(KEY.low ^ (1 << bit), KEY.high), counters),
        numpy_words(Key(KEY.low, KEY.high ^ (1 << bit)), counters),
    )
    for others in changed:
        flips = np.unpackbits((words ^ others).view(np.uint8)).reshape(-1, 64).mean(0)
        assert flips.mean() == pytest.approx(0.5, abs=0.02)
        assert flips.min() > 0.3 and flips.max() < 0.7


def test_streams_of_other_keys_and_kinds_are_independent() -> None:
    keys = [key_of(3, step) for step in range(20)]
    streams = [uniforms(draw_words(key, kind << 48, 5000, CPU)) for key in keys for kind in range(20)]
    correlations = np.corrcoef(np.stack(streams))[np.triu_indices(400, 1)]
    assert np.abs(correlations).max() < 6 / 10_000**0.5
    assert stats.kstest(correlations * 10_000**0.5, "norm").pvalue > 1e-4


@pytest.mark.parametrize("bits", [8, 16])
def test_lanes_of_words_are_uniform_in_pairs(bits: int) -> None:
    kind = {8: np.uint8, 16: np.uint16}[bits]
    lanes = draw_words(KEY, 1 << 50, 500_000, CPU).numpy().view(kind) >> (bits - 5)
    for distance in (1, 2, 4):
        pairs = lanes[:-distance].astype(int) * 32 + lanes[distance:]
        counts = np.bincount(pairs[:: 2 * distance], minlength=1024)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_uniforms_are_uniform_and_multiples_of_a_power_of_two() -> None:
    values = uniforms(draw_words(KEY, 0, 100_000, CPU))
    assert values.dtype == torch.float32 and values.shape == (200_000,)
    assert values.min() >= 0 and values.max() < 1
    assert torch.equal((values.double() * 2**24).round() / 2**24, values.double())
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-4


def test_normals_are_normal_and_independent() -> None:
    values = normals(draw_words(KEY, 0, 200_000, CPU)).double().numpy()
    assert values.shape == (400_000,) and np.isfinite(values).all()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert abs(stats.kurtosis(values)) < 5 * (24 / len(values)) ** 0.5
    for distance in (1, 2, 3):
        assert abs(np.corrcoef(values[:-distance], values[distance:])[0, 1]) < 5 / len(values) ** 0.5
        assert abs(np.corrcoef(values[:-distance] ** 2, values[distance:] ** 2)[0, 1]) < 5 / len(values) ** 0.5


@pytest.mark.parametrize(("word", "wanted"), [(0x7FFFFFFF, 0.0), (0x80000000, (64 * np.log(2)) ** 0.5)])
def test_the_largest_and_smallest_uniforms_have_finite_normals(word: int, wanted: float) -> None:
    one, other = normals(torch.tensor([word])).tolist()  # the low half is the radius, and the high half the angle 0
    assert one == pytest.approx(wanted, abs=1e-6)
    assert other == 0
