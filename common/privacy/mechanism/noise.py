"""Cryptographic randomness and the discrete Gaussian that is drawn from it.

Privacy noise must be unknown to everyone who knows the experiment, so it never comes from the
experiment's seed, torch's generator or numpy's: the source is AES-256 in counter mode, keyed by
the operating system. Ordinary floating-point normals are avoided as well, because their rounding
pattern betrays the value they were added to (Mironov, CCS 2012). What is drawn are integers of a
discrete Gaussian N_Z(0, s^2) (Canonne, Kamath, Steinke, NeurIPS 2020), by look-up of a 128-bit
uniform number in a table of 128-bit thresholds.
"""

import hashlib
import os
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import lru_cache
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

SPLIT = 1024
"""Factor k of X = k Z1 + Z2, which makes a wide Gaussian out of two narrow ones."""
TAIL = 13.5
"""Table half-width in standard deviations: the mass beyond is below 2^-133."""
_FRACTION_BITS = 320
_GUIDE_BITS = 16
_CHUNK = 1 << 16


class Keystream:
    """Uniform 64-bit words from AES-256 in counter mode."""

    def __init__(self, key: bytes | None = None, counter: bytes = bytes(16)) -> None:
        self.secret = key is None
        self._start(os.urandom(32) if key is None else key, counter)

    def words(self, count: int) -> Words:
        """Return the next ``count`` uniform words."""
        if self.secret and os.getpid() != self._process:
            # a forked child would repeat its parent's noise
            self._start(os.urandom(32), bytes(16))
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")

    def _start(self, key: bytes, counter: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._process = os.getpid()
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()


@dataclass(frozen=True, eq=False)
class GaussianTable:
    """Thresholds of N_Z(0, std^2) truncated to [-half_width, half_width].

    Threshold j is round(2^128 P(X <= j - half_width)); a uniform 128-bit number u stands for the
    value (number of thresholds <= u) - half_width.
    """

    std: float
    half_width: int
    high: Words
    """Upper 64 bits of each threshold."""
    low: Words
    """Lower 64 bits of each threshold."""
    guide: np.ndarray[Any, np.dtype[np.int64]]
    """For each value of u's upper 16 bits: thresholds certainly passed."""
    total_variation: float
    """Bound on the distance between the table's distribution and N_Z(0, std^2)."""

    def look_up(self, words: Words, keystream: Keystream) -> Integers:
        """Turn uniform words into samples.

        Only a word that equals a threshold's upper half needs its lower 64 bits; these are drawn
        from ``keystream`` then, so that every decision is one of 128 bits.
        """
        bins = (words >> np.uint64(64 - _GUIDE_BITS)).astype(np.int64)
        passed = self.guide[bins]
        passed += self.high[np.minimum(passed, len(self.high) - 1)] <= words
        crowded = np.flatnonzero(self.guide[bins + 1] > passed)
        passed[crowded] = np.searchsorted(self.high, words[crowded], side="right")
        ties = np.flatnonzero(self.high[np.maximum(passed, 1) - 1] == words)
        for tie in ties:
            first, last = (int(np.searchsorted(self.high, words[tie], side=s)) for s in _SIDES)
            low = keystream.words(1)[0]
            passed[tie] = first + np.searchsorted(self.low[first:last], low, side="right")
        return passed - self.half_width


_SIDES: tuple[Any, Any] = ("left", "right")


@lru_cache(maxsize=8)
def gaussian_table(std: float) -> GaussianTable:
    """Build the table of N_Z(0, std^2), exactly to 128 bits, in integer arithmetic.

    The weights w_k = exp(-k^2 / 2 std^2) follow from w_{k+1} = w_k r_k and r_{k+1} = r_k q with
    q = exp(-1 / std^2), in fixed point of 320 fractional bits.

    Raises:
        ValueError: for a standard deviation below 1 or above 2^16.
    """
    if not 1 <= std <= 1 << 16:
        raise ValueError(f"standard deviation {std} grid steps; allowed: 1 to 65536")
    context = Context(prec=120)
    variance = context.multiply(Decimal(std), Decimal(std))
    one = 1 << _FRACTION_BITS
    exponent = context.divide(Decimal(-1), variance)
    squared = _fixed(context, context.exp(exponent))
    ratio = _fixed(context, context.exp(context.divide(exponent, Decimal(2))))
    half_width = int(TAIL * std) + 1
    weights = [one]
    for _ in range(half_width):
        weights.append((weights[-1] * ratio) >> _FRACTION_BITS)
        ratio = (ratio * squared) >> _FRACTION_BITS
    signed = weights[:0:-1] + weights
    total = sum(signed)
    thresholds, cumulated = [], 0
    for weight in signed[:-1]:
        cumulated += weight
        thresholds.append(min(((cumulated << 129) // total + 1) >> 1, (1 << 128) - 1))
    mask = (1 << 64) - 1
    high = np.array([t >> 64 for t in thresholds], dtype=np.uint64)
    low = np.array([t & mask for t in thresholds], dtype=np.uint64)
    edges = np.arange(1 << _GUIDE_BITS, dtype=np.uint64) << np.uint64(64 - _GUIDE_BITS)
    guide = np.append(np.searchsorted(high, edges, side="left"), len(high)).astype(np.int64)
    return GaussianTable(
        std=std,
        half_width=half_width,
        high=high,
        low=low,
        guide=guide,
        total_variation=(len(signed) + 2) * 2.0**-128,
    )


def _fixed(context: Context, value: Decimal) -> int:
    return int(context.multiply(value, Decimal(1 << _FRACTION_BITS)))


class NoiseSource:
    """Discrete Gaussian integers and Poisson draws from one keystream.

    Args:
        deterministic: None for the operating system's key. Bytes make the source reproducible for
            tests; nothing drawn from it protects anyone, and receipts say epsilon = infinity.
    """

    def __init__(self, deterministic: bytes | None = None) -> None:
        key = None if deterministic is None else hashlib.sha256(deterministic).digest()
        self.keystream = Keystream(key)

    @property
    def secret(self) -> bool:
        """Whether the key comes from the operating system."""
        return self.keystream.secret

    @property
    def name(self) -> str:
        """What receipts say about the source."""
        return noise_name(secret=self.secret)

    def gaussian(self, count: int, std: float) -> Integers:
        """Draw integers X = 1024 Z1 + Z2 of standard deviation ``std`` from discrete Gaussians.

        Formal guarantee: X is within total variation ``residue(std)`` of N_Z(0, std^2). Given X,
        Z1 follows a discrete Gaussian of standard deviation about std / 1024^2 >= 4, whose theta
        sum varies by less than exp(-2 pi^2 4^2) < 2^-455 over the shifts (Micciancio and Walter,
        CRYPTO 2017); the rest is the two tables' rounding to 128 bits.
        """
        table = gaussian_table(split_std(std))
        values = np.empty(count, dtype=np.int64)
        for start in range(0, count, _CHUNK):
            block = min(_CHUNK, count - start)
            words = self.keystream.words(2 * block)
            drawn = table.look_up(words, self.keystream)
            values[start : start + block] = SPLIT * drawn[:block] + drawn[block:]
        return values

    def bernoulli(self, count: int, probability: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Draw independent events, each of ``probability`` rounded down to a multiple of 2^-64."""
        threshold = int(Decimal(probability) * (1 << 64))
        words = self.keystream.words(count)
        if threshold >= 1 << 64:
            return np.ones(count, dtype=np.bool_)
        return words < np.uint64(threshold)


def noise_name(*, secret: bool) -> str:
    """Return what receipts say about a source.

    >>> noise_name(secret=False)
    'discrete Gaussian, 128-bit table, AES-256-CTR, deterministic: NOT PRIVATE'
    """
    key = "keyed by the operating system" if secret else "deterministic: NOT PRIVATE"
    return f"discrete Gaussian, 128-bit table, AES-256-CTR, {key}"


def split_std(std: float) -> float:
    """Return the standard deviation of Z1 and Z2 that gives X = 1024 Z1 + Z2 at least ``std``.

    Raises:
        ValueError: where Z1's posterior would be too narrow for the convolution (std < 2^22).

    >>> split_std(2.0**22) > 4095
    True
    """
    if not 1 << 22 <= std <= 1 << 26:
        raise ValueError(f"standard deviation {std} grid steps; allowed: 2^22 to 2^26")
    return float(np.nextafter(std / (SPLIT**2 + 1) ** 0.5, np.inf))


def residue(std: float, draws: int) -> float:
    """Bound the total variation between ``draws`` samples of ``std`` and ideal ones.

    >>> residue(2.0**22, 10**9) < 1e-20
    True
    """
    return 2 * draws * gaussian_table(split_std(std)).total_variation
