"""Keys and streams: derived by purpose, the same bytes each time, the planned distributions."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from bract.core.keys import Key, Stream, single_rows

KEY = Key.from_seed(1)


def test_a_key_is_a_function_of_its_seed_and_a_fresh_one_of_nothing() -> None:
    assert Key.from_seed(1) == KEY != Key.from_seed(2)
    assert Key.fresh() != Key.fresh()
    assert pickle.loads(pickle.dumps(KEY)) == KEY
    with pytest.raises(ValueError, match="32 bytes"):
        Key(b"short")


def test_no_two_paths_share_a_key() -> None:
    paths: list[tuple[str | int, ...]] = [
        (), ("a",), ("b",), ("a", "b"), ("ab",), ("a", "b", ""), ("", "a", "b"), (1,), ("1",), (1, 1), (11,), ("i", 1)
    ]  # fmt: skip
    assert len({KEY.child(*path).secret for path in paths} | {KEY.secret}) == len(paths) + 1
    assert KEY.child("a").child("b") != KEY.child("a", "b")


def test_the_secret_is_not_printed() -> None:
    assert KEY.secret.hex() not in repr(KEY)
    assert repr(KEY.secret) not in repr(KEY)


def test_the_stream_is_aes_in_counter_mode() -> None:
    cipher = Cipher(algorithms.AES256(KEY.child("stream").secret), modes.CTR(bytes(16))).encryptor()
    stream = KEY.stream()
    assert stream.bytes(5) + stream.bytes(40) == cipher.update(bytes(45))


def test_a_stream_goes_on_and_starts_anew() -> None:
    stream = KEY.stream()
    first, second = stream.uniforms(8), stream.uniforms(8)
    assert (first != second).all()
    assert (np.concatenate([first, second]) == KEY.stream().uniforms(16)).all()


def test_the_bytes_of_a_seed_never_change() -> None:
    # A run resumes with the same noise only if these stay: change them with a new schema of the run directory.
    assert KEY.stream().bytes(8).hex() == "d38aadee2bcd7938"
    assert KEY.stream().below(10**30) == 760061490763153028248699278037
    assert KEY.stream().normals(3) == pytest.approx(
        [0.7044859860698475, 0.14771766986878884, 1.5894748793103124], rel=1e-12
    )


@pytest.mark.parametrize("count", [0, 1, 2, 7, 2**15, 2**15 + 1, 70_001])
def test_normals_have_any_length(count: int) -> None:
    normals = KEY.stream().normals(count)
    assert normals.shape == (count,)
    assert np.isfinite(normals).all()
    assert len(set(normals.tolist())) == count


def test_normals_are_normal_and_independent_within_and_across_blocks() -> None:
    normals = KEY.stream().normals(200_000)
    assert stats.kstest(normals, "norm").pvalue > 1e-3
    assert abs(normals.mean()) < 4 / math.sqrt(200_000)
    assert abs(normals.std() - 1) < 4 / math.sqrt(400_000)
    # Box and Muller's pairs stand half a block apart; squares would show a shared radius.
    for lag in (1, 2**14, 2**15):
        for values in (normals, normals**2):
            assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 4.5 / math.sqrt(200_000 - lag)
    tail = (np.abs(normals) > 4).mean()
    assert tail == pytest.approx(6.33e-5, abs=4.5 * math.sqrt(6.33e-5 / 200_000))


def test_uniforms_lie_inside_the_open_interval() -> None:
    uniforms = KEY.stream().uniforms(100_000)
    assert 0 < uniforms.min() < uniforms.max() < 1
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_bernoulli_draws_have_their_rate(rate: float) -> None:
    draws = KEY.stream().bernoulli(100_000, rate)
    assert abs(draws.mean() - rate) <= 4.5 * math.sqrt(rate * (1 - rate) / 100_000)


def test_permutations_are_uniform() -> None:
    stream = KEY.stream()
    seen = np.zeros((5, 5))
    for _ in range(5000):
        order = stream.permutation(5)
        assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
        seen[np.arange(5), order] += 1
    assert stats.chisquare(seen.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("bound", [1, 2, 3, 200, 257])
def test_below_is_uniform(bound: int) -> None:
    stream = KEY.child(bound).stream()
    counts = np.bincount([stream.below(bound) for _ in range(100 * bound)], minlength=bound)
    assert len(counts) == bound
    if bound > 1:
        assert stats.chisquare(counts).pvalue > 1e-3


def test_below_takes_big_numbers_and_no_empty_range() -> None:
    assert 0 <= KEY.stream().below(10**100) < 10**100
    with pytest.raises(ValueError, match="at least 1"):
        KEY.stream().below(0)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 2**15, 2**15 + 1, 70_001])
def test_single_normals_have_any_length(count: int) -> None:
    normals = KEY.stream().single_normals(count)
    assert normals.shape == (count,) and normals.dtype == np.float32
    assert np.isfinite(normals).all()
    # Of 70,001 float32 numbers some are equal by chance, about one pair in 10^7.
    assert len(np.unique(normals)) >= 0.99 * count


def test_single_normals_are_box_and_muller_s_of_the_stream() -> None:
    """The pairs' 64-bit words come first, then their angles; a second call goes on where the first ended."""
    count = 2**15 + 5
    stream, raw = KEY.stream(), KEY.stream()
    found = np.concatenate([stream.single_normals(count), stream.single_normals(7)])
    expected = []
    for size in (2**15, 5, 7):
        pairs = -(-size // 2)
        words = np.frombuffer(raw.bytes(8 * pairs), "<i8").astype(np.float64)
        turns = np.frombuffer(raw.bytes(4 * pairs), "<i4").astype(np.float64)
        radius, angle = np.sqrt(-2 * np.log(np.abs(words) / 2**63)), np.pi * turns / 2**31
        expected.append(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size])
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_the_single_normals_of_a_seed_never_change() -> None:
    # As those above: a run resumes with the same noise only if they stay.
    assert KEY.stream().single_normals(3) == pytest.approx([0.91435331, 0.40503910, -0.89464760], rel=1e-5)


def test_single_normals_are_normal_and_independent_within_and_across_blocks() -> None:
    count = 2_000_000
    normals = KEY.stream().single_normals(count).astype(np.float64)
    assert stats.kstest(normals, "norm").pvalue > 1e-3
    for power, moment, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)):
        deviation = math.sqrt((square - moment**2) / count)
        assert abs((normals**power).mean() - moment) < 4.5 * deviation
    for bound in (3.0, 4.0, 4.5):
        rate = 2 * stats.norm.sf(bound)
        assert abs((np.abs(normals) > bound).mean() - rate) < 4.5 * math.sqrt(rate / count)
    for lag in (1, 2**14, 2**15):
        for values in (normals, normals**2):
            assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 4.5 / math.sqrt(count - lag)


class Words:
    """A cipher that gives the same signed word to all pairs, and angles of zero: cosines 1."""

    def __init__(self, word: int) -> None:
        self._word = word

    def update_into(self, zeros: memoryview, raw: bytearray) -> None:
        pairs = len(zeros) // 12
        raw[: 12 * pairs] = self._word.to_bytes(8, "little", signed=True) * pairs + bytes(4 * pairs)


@pytest.mark.parametrize("word", [0, 1, -1, 2, -3, 2**20, 2**40 + 1, -(2**62), 2**63 - 1, -(2**63)])
def test_the_tails_of_single_normals_are_those_of_64_bits(word: int) -> None:
    stream = KEY.stream()
    stream._cipher = Words(word)  # type: ignore[assignment]
    cosine, sine = stream.single_normals(2)
    # 0 stands for √½, so that it is no infinity.
    assert cosine == pytest.approx(math.sqrt(-2 * math.log(max(abs(word), 0.5**0.5) / 2**63)), abs=1e-3, rel=0.003)
    assert sine == 0 and (abs(word) > 1 or cosine > 9.3)


def test_single_normals_do_not_depend_on_threads_or_other_streams() -> None:
    expected = [KEY.child(number).stream().single_normals(50_000) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: KEY.child(number).stream().single_normals(50_000), range(4)))
    for one, other in zip(expected, found, strict=True):
        assert one.tobytes() == other.tobytes()
    for first in range(4):
        for second in range(first):
            assert abs(np.corrcoef(expected[first], expected[second])[0, 1]) < 4.5 / math.sqrt(50_000)


@pytest.mark.parametrize(("population", "count"), [(5, 2), (5, 5), (3, 9), (1, 1), (4, 0)])
def test_a_sample_is_of_distinct_members_and_each_set_is_as_likely(population: int, count: int) -> None:
    stream = Key.from_seed(population).stream()
    wanted, drawn = min(population, count), 2000
    found = Counter(tuple(sorted(stream.sample(population, count).tolist())) for _ in range(drawn))
    every = list(itertools.combinations(range(population), wanted))
    assert set(found) == set(every)
    # Five standard deviations.
    expected = drawn / len(every)
    assert all(abs(each - expected) <= 5 * math.sqrt(expected) for each in found.values()) or len(every) == 1


def test_a_small_sample_of_a_large_population_costs_by_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    words = Stream.words
    monkeypatch.setattr(Stream, "words", lambda self, count: asked.append(count) or words(self, count))
    found = KEY.stream().sample(10**15, 1000)
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 10**15
    assert sum(asked) < 3000


@pytest.mark.parametrize("count", [0, 1, 7, 10, 4_096, 32_768, 32_769])
def test_rows_of_many_streams_are_the_normals_of_each(count):
    keys = [Key.from_seed(number) for number in range(5)]
    together, alone = [key.stream() for key in keys], [key.stream() for key in keys]
    for _ in range(2):
        rows = single_rows(together, count)
        assert rows.shape == (5, count)
        assert rows.tobytes() == np.array([stream.single_normals(count) for stream in alone], np.float32).tobytes()
    assert single_rows([], 3).shape == (0, 3)
