"""The random numbers of stochastic rounding are uniform, independent of one another, and depend on key and place alone."""

import itertools

import numpy as np
import pytest
import torch

from lowprec.formats.random import derive_key, key_from_generator, mix, scramble, uniform
from lowprec.recipe.state import next_key

KEYS = [torch.tensor(key) for key in ([0, 0], [1, 0], [-5, 77], [0x1234567, -0x7654321], [2**31 - 1, -(2**31)])]
SHAPE = (700, 900)


def p_value(counts: torch.Tensor) -> float:
    """Return the p-value of a chi-square test that all counts have the same expectation."""
    counts = counts.double().flatten()
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), chi_square / 2).item()


def mix_by_python(x: int) -> int:
    """Return the mix of x: two multiplications and three xor-shifts on unsigned 32-bit integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def test_mix_equals_unsigned_integer_arithmetic():
    x = torch.cat([torch.randint(-(2**31), 2**31, (500,), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, -1, -(2**31)])])
    assert [v % 2**32 for v in mix(x.to(torch.int32)).tolist()] == [mix_by_python(v % 2**32) for v in x.tolist()]


def scramble_by_python(low: int, high: int) -> tuple[int, int]:
    """Return the four rounds of a Feistel network with `mix_by_python`."""
    high ^= mix_by_python((low + 0x1E3779B9) % 2**32)
    low ^= mix_by_python((high + 0x3C6EF372) % 2**32)
    high ^= mix_by_python((low + 0x5AA66D2B) % 2**32)
    low ^= mix_by_python((high + 0x78DDE6E4) % 2**32)
    return low, high


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_uniform_follows_its_formula(key):
    low, high = scramble_by_python(*(word % 2**32 for word in key.tolist()))
    row = [mix_by_python((r + low) % 2**32) for r in range(6)]
    col = [mix_by_python((mix_by_python((c + high) % 2**32) + 0x632BE5AB) % 2**32) for c in range(9)]
    expected = [[(mix_by_python(r ^ c) >> 8) / 2**24 for c in col] for r in row]
    assert uniform(key, (6, 9)).tolist() == expected


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_mean_and_the_bins_are_those_of_uniform_numbers(key):
    u = uniform(key, SHAPE)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert abs(u.double().mean().item() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    assert p_value(torch.histc(u, bins=1000, min=0, max=1)) > 1e-4
    low_bits = (u * 2**24).to(torch.int32) & 0xFF  # the low bits are as random as the high ones
    assert p_value(torch.bincount(low_bits.flatten(), minlength=256)) > 1e-4


def pairs() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    u, key = uniform(KEYS[3], SHAPE), KEYS[3]
    result = [
        ("next column", u[:, :-1], u[:, 1:]),
        ("next row", u[:-1], u[1:]),
        ("diagonal", u[:-1, :-1], u[1:, 1:]),
        ("32 columns on", u[:, :-32], u[:, 32:]),
        ("transposed place", u[:, :700], u[:, :700].t()),
    ]
    others = {"next low key": key + torch.tensor([1, 0]), "next high key": key + torch.tensor([0, 1]), "swapped": key.flip(0)}
    others |= {"derived 0": derive_key(key, 0), "derived 1": derive_key(key, 1)}
    result += [(name, u, uniform(other, SHAPE)) for name, other in others.items()]
    return [*result, ("of two derived keys", uniform(derive_key(key, 7), SHAPE), uniform(derive_key(key, 8), SHAPE))]


@pytest.mark.parametrize("name, a, b", pairs(), ids=[name for name, _, _ in pairs()])
def test_neighbouring_draws_are_independent(name, a, b):
    """The joint distribution over 16 x 16 bins is flat, and the correlation is no larger than chance makes it."""
    joint = torch.bincount(((a * 16).int() * 16 + (b * 16).int()).flatten(), minlength=256)
    assert p_value(joint) > 1e-4
    correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
    assert abs(correlation) < 4 / a.numel() ** 0.5


def test_the_lowest_bit_of_a_place_decides_half_of_the_bits():
    """One bit of a row or column number flips each of the 24 bits of a draw about half the time."""
    u = (uniform(KEYS[3], (512, 512)) * 2**24).to(torch.int32)
    for flipped in (u[0::2] ^ u[1::2], u[:, 0::2] ^ u[:, 1::2], u[:256] ^ u[256:]):
        share = torch.stack([(flipped >> bit & 1).float().mean() for bit in range(24)])
        assert ((share - 0.5).abs() < 0.01).all()


def test_rows_and_columns_have_no_common_values():
    """One key gives as many distinct numbers as uniform draws from 2^24 would: numbers do not repeat beyond chance."""
    u = uniform(KEYS[3], SHAPE).flatten()
    n, cells = u.numel(), 2**24
    expected = cells * (1 - (1 - 1 / cells) ** n)
    assert abs(len(u.unique()) - expected) < 5 * (n * n / cells / 2) ** 0.5


def test_the_numbers_do_not_depend_on_the_layout_nor_on_the_shape():
    u = uniform(KEYS[3], (37, 53))
    transposed = uniform(KEYS[3], (37, 53), transposed=True)
    assert torch.equal(u, transposed)
    assert (u.stride(), transposed.stride()) == ((53, 1), (1, 37))
    assert torch.equal(uniform(KEYS[3], (90, 70))[:37, :53], u)
    assert uniform(KEYS[3], (0, 5)).shape == (0, 5)


def test_only_32_bits_of_a_key_count():
    assert torch.equal(uniform(KEYS[3] + 2**32, (5, 6)), uniform(KEYS[3], (5, 6)))
    assert torch.equal(uniform(KEYS[3].to(torch.int32), (5, 6)), uniform(KEYS[3], (5, 6)))


def test_a_generator_gives_a_new_key_each_time_and_the_same_ones_again():
    def keys():
        generator = torch.Generator().manual_seed(5)
        return [key_from_generator(generator, torch.device("cpu")) for _ in range(4)]

    first, again = keys(), keys()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.shape) == (torch.int64, (2,))
    for a, b in itertools.combinations(first, 2):
        assert not torch.equal(a, b)


def test_derived_keys_differ_and_take_a_tensor_as_well():
    key = KEYS[3]
    derived = [tuple(derive_key(key, n).tolist()) for n in range(2000)]
    assert len(set(derived)) == 2000
    assert len({low for low, _ in derived}) == len({high for _, high in derived}) == 2000
    assert torch.equal(derive_key(key, torch.tensor(7)), derive_key(key, 7))
    assert not torch.equal(derive_key(key, 1), derive_key(key + torch.tensor([0, 1]), 1))


# Keys that are close to each other


def neighbours_of_a_key() -> dict[str, list[torch.Tensor]]:
    """Return keys that differ by a little, as users and layers make them."""
    state = lambda seed, layer, step: next_key(torch.tensor([seed, layer, step]), 0, False)  # noqa: E731
    pass_key = state(0, 0, 0)
    return {
        "seeds": [torch.tensor([s, 0]) for s in range(5)],
        "second words": [torch.tensor([0, s]) for s in range(5)],
        "both words": [torch.tensor([s, s]) for s in range(5)] + [torch.tensor([1, 0]), torch.tensor([0, 1])],
        "bits": [torch.tensor([1 << bit, 0]) for bit in (0, 7, 16, 31)],
        "operands": [derive_key(pass_key, n) for n in range(5)],
        "layers, seeds and steps": [state(0, 0, 0), state(0, 1, 0), state(1, 0, 0), state(0, 0, 1), state(1, 1, 1)],
        "ranks": [next_key(torch.tensor([0, 0, 0]), rank, False) for rank in range(4)],
        "seed and rank": [next_key(torch.tensor([1, 0, 0]), 0, False), next_key(torch.tensor([0, 0, 0]), 1, False)],
        "a key and its uses": [KEYS[3], derive_key(KEYS[3], 0), derive_key(derive_key(KEYS[3], 0), 0)],
    }


@pytest.mark.parametrize("kind", neighbours_of_a_key())
def test_noises_of_close_keys_do_not_correlate_at_any_shift(kind):
    """The largest of 2^16 circular correlations of independent noises is about 4.4 / sqrt(n). A copy shifted by r rows and c columns
    has (1 - r / 256) (1 - c / 256)."""
    spectra = [torch.fft.rfft2(uniform(key, (256, 256)).double() - 0.5) for key in neighbours_of_a_key()[kind]]
    for a, b in itertools.combinations(spectra, 2):
        correlation = torch.fft.irfft2(a * b.conj()) * 12 / 2**16
        assert correlation.abs().max() < 6 / 2**8


def test_scramble_spreads_each_bit_of_a_key():
    """Flipping one of the 64 bits of a key flips each of the 64 bits of the result about half the time."""
    keys = torch.arange(400)[:, None] * torch.tensor([1, 3]) - 200
    words = lambda keys: torch.stack([torch.stack(scramble(key)) for key in keys])  # noqa: E731
    before = words(keys)
    for word, bit in itertools.product(range(2), (0, 1, 15, 31)):
        flipped = keys.clone()
        flipped[:, word] ^= 1 << bit
        changed = words(flipped) ^ before
        share = torch.stack([(changed >> k & 1).float().mean(0) for k in range(32)])
        assert ((share - 0.5).abs() < 5 * 0.5 / 400**0.5).all()
