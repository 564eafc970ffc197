"""Random words: 64 random bits as a pure function of a key and a counter, with the same bits on every device.

The function is SplitMix64 (Steele, Lea and Flood 2014): multiples of an odd constant, mixed by a finaliser of the kind
of MurmurHash3. It passes BigCrush and needs far fewer operations than Philox. A key has 128 bits. The low half is where
the counting starts, as in SplitMix64. The high half is XORed with each count, so that streams of different keys are not
shifted copies of each other.

On the CPU, numpy computes the words in pieces that stay in the cache, which is faster than torch's generators. Every
other device, and a compiled graph, uses a fixed number of tensor operations.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
GAMMA = 0x9E3779B97F4A7C15
ROUNDS, LAST_SHIFT = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), np.uint64(31)
NUMPY_ROUNDS = [(np.uint64(shift), np.uint64(multiplier)) for shift, multiplier in ROUNDS]
CHUNK = 8_192  # words; with two buffers 192 KiB
STEPS = np.arange(CHUNK, dtype=np.uint64) * np.uint64(GAMMA)
NUMPY_DEVICES = ("cpu",)  # devices whose words are computed by numpy


@dataclass(frozen=True)
class Key:
    """The key of a stream: two words. With a high word of 0, the low word is the seed of SplitMix64."""

    low: int
    high: int = 0

    def at(self, counter: int) -> int:
        """The word of one counter, as an unsigned number."""
        return int(numpy_words(self, np.array([counter], np.uint64))[0])


def key_of(*parts: int | str) -> Key:
    """The key of a stream with this name, such as a seed and a step."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return Key(int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))


def numpy_words(key: Key, counters: Words) -> Words:
    """The words of any counters, in their shape."""
    return _mixed(
        counters * np.uint64(GAMMA), key.low + GAMMA, key.high, np.empty_like(counters), np.empty_like(counters)
    )


def draw_words(key: Key, start: int, count: int, device: torch.device) -> Tensor:
    """The words of consecutive counters.

    Args:
        key: the key of the stream.
        start: first counter.
        count: number of words n.
        device: device of the words.

    Returns:
        (n,) int64.
    """
    if device.type not in NUMPY_DEVICES:
        low = signed(key.low + GAMMA * (start + 1))
        return words_from(torch.arange(count, device=device), low, signed(key.high))
    words, spare = np.empty(count, np.uint64), np.empty(min(CHUNK, count), np.uint64)
    for first in range(0, count, CHUNK):
        size = min(CHUNK, count - first)
        low = key.low + GAMMA * (start + first + 1)
        _mixed(STEPS[:size], low, key.high, words[first : first + size], spare[:size])
    return torch.from_numpy(words.view(np.int64))


def words_from(counters: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """The words of counters that start at 0, by tensor operations.

    Args:
        counters: int64 of any shape; overwritten.
        low: the low half of the key plus `GAMMA` times one more than the first counter, modulo 2^64 and signed.
        high: the high half of the key, signed.

    Returns:
        int64 in the shape of the counters.
    """
    words = counters.mul_(signed(GAMMA)).add_(low).bitwise_xor_(high)
    for shift, multiplier in ROUNDS:
        words.bitwise_xor_(_shifted(words, shift)).mul_(signed(multiplier))
    return words.bitwise_xor_(_shifted(words, 31))


def uniforms(words: Tensor) -> Tensor:
    """Two uniforms in [0, 1) per word, exact multiples of 2^-24: (..., n) int64 -> (..., 2 n) float32."""
    return words.view(torch.int32).bitwise_right_shift(8).bitwise_and(0xFFFFFF).float().mul_(2.0**-24)


def normals(words: Tensor) -> Tensor:
    """Two standard normals per word (Box and Muller 1958): (..., n) int64 -> (..., 2 n) float32.

    They are computed in float64, so that devices differ by at most one rounding.
    """
    halves = words.view(torch.int32).unflatten(-1, (-1, 2)).double()
    radius, turn = halves.unbind(-1)
    radius = radius.add(2.0**31 + 1).mul_(2.0**-32).log_().mul_(-2).sqrt_()  # from uniforms in (0, 1]
    turn = turn.mul(2 * torch.pi * 2.0**-32)
    return torch.stack([radius * turn.cos(), radius * turn.sin()], dim=-1).flatten(-2).float()


def _mixed(steps: Words, low: int, high: int, out: Words, spare: Words) -> Words:
    """Words of counters that were multiplied by `GAMMA`, into `out`; `spare` is overwritten."""
    np.add(steps, np.uint64(low & 2**64 - 1), out)
    np.bitwise_xor(out, np.uint64(high), out)
    for shift, multiplier in NUMPY_ROUNDS:
        np.bitwise_xor(out, np.right_shift(out, shift, spare), out)
        np.multiply(out, multiplier, out)
    return np.bitwise_xor(out, np.right_shift(out, LAST_SHIFT, spare), out)


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Words without their lowest bits, as unsigned numbers: torch's shift of int64 would repeat the sign."""
    return words.bitwise_right_shift(shift).bitwise_and_((1 << 64 - shift) - 1)


def signed(word: int) -> int:
    """The int64 with the bits of a word."""
    return (word + 2**63) % 2**64 - 2**63
