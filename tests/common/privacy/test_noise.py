"""Noise (specification tests 5 and 6), each check with the broken variants that it must reject."""

import itertools
import os

import numpy as np
import pytest
from mpmath import exp, mp, mpf
from scipy import stats

from common.privacy.mechanism import noise as module
from common.privacy.mechanism.noise import (
    SPLIT,
    Keystream,
    NoiseSource,
    gaussian_table,
    residue,
    split_std,
)

STD = 2.0**22
N = 1_200_000


@pytest.fixture(scope="module")
def honest() -> np.ndarray:
    return NoiseSource().gaussian(N, STD) / STD


def check_distribution(z: np.ndarray) -> list[str]:
    """Complaints about z as independent standard normals (false alarm rate about 1e-5)."""
    complaints = []
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], df=len(z))
    if not low <= np.sum(z**2) <= high:
        complaints.append("variance")
    if abs(z.std() - 1) > 0.004:
        complaints.append("std")
    if stats.kstest(z, "norm").pvalue < 1e-6:
        complaints.append("ks")
    # in grid steps the noise is an integer whose low bits are uniform, unless it was rounded
    steps = np.round(z * STD).astype(np.int64)
    if stats.chisquare(np.bincount(steps % 256, minlength=256)).pvalue < 1e-6:
        complaints.append("resolution")
    return complaints


def check_uncorrelated(rows: np.ndarray) -> bool:
    """Whether every pair of rows (steps, hospitals) and neighbouring columns is uncorrelated."""
    count = rows.shape[1]
    pairs = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    lagged = [np.corrcoef(row[:-lag], row[lag:])[0, 1] for row in rows for lag in (1, 2, 1024)]
    return bool(np.abs([*pairs, *lagged]).max() < 5.5 / np.sqrt(count - 1024))


def test_noise_has_the_claimed_distribution(honest: np.ndarray) -> None:
    assert check_distribution(honest) == []
    assert abs(honest.std() - 1) < 0.003


def test_chi_square_kills_half_sigma_micro_batch_and_bf16_noise() -> None:
    # a fixed draw: half a per cent too wide is caught in all but 0.2% of draws
    honest = NoiseSource(deterministic=b"mutants").gaussian(N, STD) / STD
    assert check_distribution(honest) == []
    halved = honest / 2
    per_micro_batch = honest + np.roll(honest, 1)  # one draw for each of two micro-batches
    bits = (honest.astype(np.float32).view(np.uint32) >> 16) << 16
    bf16 = bits.astype(np.uint32).view(np.float32)  # eight bits of mantissa, truncated
    assert "variance" in check_distribution(halved)
    assert "variance" in check_distribution(per_micro_batch)
    assert "resolution" in check_distribution(bf16.astype(np.float64))
    assert "variance" in check_distribution(honest * 1.005)


def test_no_correlation_over_steps_coordinates_and_hospitals() -> None:
    count = 100_000
    hospitals = [NoiseSource() for _ in range(3)]
    rows = np.stack([s.gaussian(count, STD) for s in hospitals for _ in range(2)]) / STD
    assert check_uncorrelated(rows)

    one_seed = [NoiseSource(deterministic=b"the same everywhere") for _ in range(3)]
    assert not check_uncorrelated(np.stack([s.gaussian(count, STD) for s in one_seed]) / STD)
    assert not check_uncorrelated(np.repeat(rows, 2, axis=1)[:2])  # each draw used twice


def test_table_equals_the_discrete_gaussian_computed_at_high_precision() -> None:
    mp.prec = 600
    std = 37.25
    table = gaussian_table(std)
    weights = [
        exp(-(mpf(k) ** 2) / (2 * mpf(std) ** 2))
        for k in range(-table.half_width, table.half_width + 1)
    ]
    total = sum(weights)
    cumulated = itertools.accumulate(weights)
    for high, low, exact in zip(table.high, table.low, cumulated, strict=False):
        threshold = (int(high) << 64) + int(low)
        assert abs(mpf(threshold) - exact / total * mpf(2) ** 128) <= 1
    beyond = 2 * stats.norm.sf(table.half_width / std)
    assert beyond + 2 * table.half_width * 2.0**-128 < 2 * table.total_variation


def test_look_up_is_exact_at_every_threshold() -> None:
    """Oracle: python integers of 128 bits; words are planted on and beside the thresholds."""
    table = gaussian_table(11.0)
    thresholds = [(int(hi) << 64) + int(lo) for hi, lo in zip(table.high, table.low, strict=True)]

    class Planted(Keystream):
        low = 0

        def words(self, count: int) -> np.ndarray:
            return np.full(count, self.low, dtype=np.uint64)

    stream = Planted(bytes(32))
    rng = np.random.default_rng(0)
    extremes = [0, 1, (1 << 128) - 1]
    randoms = [int.from_bytes(rng.bytes(16), "big") for _ in range(500)]
    for u in [*(t + d for t in thresholds for d in (-1, 0, 1)), *extremes, *randoms]:
        number = min(max(u, 0), (1 << 128) - 1)
        stream.low = number & ((1 << 64) - 1)
        drawn = table.look_up(np.array([number >> 64], dtype=np.uint64), stream)[0]
        assert drawn == sum(t <= number for t in thresholds) - table.half_width


def test_two_narrow_gaussians_make_the_wide_one() -> None:
    """The law of k Z1 + Z2 against the discrete Gaussian, summed exactly at a small scale."""
    std, factor = 32.0, 8  # the same ratio std / factor = 4 as in use: 4096 / 1024
    k = np.arange(-500, 501)
    law = np.exp(-(k**2) / (2 * std**2))
    law /= law.sum()
    wide = {}
    for x in range(-200, 201, 7):
        z1 = k[(np.abs(x - factor * k) <= 500)]
        wide[x] = np.sum(law[z1 + 500] * law[x - factor * z1 + 500])
    total = std * np.sqrt(factor**2 + 1)
    for x, probability in wide.items():
        expected = np.exp(-(x**2) / (2 * total**2)) / (total * np.sqrt(2 * np.pi))
        assert probability == pytest.approx(expected, rel=1e-12)
    assert split_std(STD) / SPLIT >= 3.99


def test_residue_counts_both_look_ups_of_every_draw() -> None:
    one = gaussian_table(split_std(STD)).total_variation
    assert residue(STD, 1000) == 2000 * one
    assert one < 2.0**-110


def test_aes_counter_mode_known_answers() -> None:
    """NIST SP 800-38A, F.5.5 CTR-AES256: keystream = ciphertext xor plaintext."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    stream = Keystream(key, counter)
    words = np.concatenate([stream.words(3), stream.words(5)])
    assert words.tobytes() == bytes(a ^ b for a, b in zip(plain, cipher, strict=True))


def unpredictable(make: object) -> bool:
    """Whether two sources differ after every seed that an experiment knows was set alike."""
    import random

    import torch

    drawn = []
    for _ in range(2):
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        drawn.append(make())  # type: ignore[operator]
    return not np.array_equal(*drawn)


def test_seeds_do_not_determine_the_noise() -> None:
    import torch

    assert unpredictable(lambda: NoiseSource().gaussian(1000, STD))
    assert unpredictable(lambda: NoiseSource().bernoulli(1000, 0.5))
    assert not unpredictable(lambda: torch.randn(1000).numpy())
    assert not unpredictable(lambda: np.random.standard_normal(1000))
    assert not unpredictable(lambda: NoiseSource(deterministic=b"7").gaussian(1000, STD))


@pytest.mark.process
def test_a_forked_process_does_not_repeat_the_noise() -> None:
    source = NoiseSource()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, source.gaussian(8, STD).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 64) != source.gaussian(8, STD).tobytes()
    os.close(reader)
    os.close(writer)


def test_deterministic_source_says_so() -> None:
    assert not NoiseSource(deterministic=b"x").secret
    assert "NOT PRIVATE" in NoiseSource(deterministic=b"x").name
    assert NoiseSource().secret
    assert "operating system" in NoiseSource().name


@pytest.mark.parametrize("std", [0.5, 1 << 17])
def test_table_refuses_what_it_cannot_hold(std: float) -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        module.gaussian_table(std)


def test_wide_gaussian_refuses_a_width_at_which_the_convolution_fails() -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        NoiseSource().gaussian(1, 2.0**21)
