"""The Hadamard transform is tested against its matrix, written out in float64."""

import numpy as np
import pytest
import torch

from lowprec.formats.hadamard import NVFP4_SIGNS, SIZES, Hadamard
from lowprec.testing import fp32_accumulation_bound, gaussian, heavy_tailed

TRANSFORMS = [Hadamard.seeded(size, seed=size) for size in SIZES] + [Hadamard.plain(32), Hadamard(size=16, signs=NVFP4_SIGNS)]
every_transform = pytest.mark.parametrize("hadamard", TRANSFORMS, ids=lambda h: f"{h}-{sum(h.signs)}")


def matrix(hadamard: Hadamard) -> torch.Tensor:
    """Return T = diag(s) H / sqrt(n), float64, with Sylvester's H[i, j] = (-1)^(number of ones in i & j)."""
    n = hadamard.size
    h = np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])
    return torch.from_numpy(np.diag(np.array(hadamard.signs, np.float64)) @ h / np.sqrt(n))


def expected(x: torch.Tensor, hadamard: Hadamard) -> torch.Tensor:
    """Return x T, computed group by group in float64."""
    short = -x.shape[1] % hadamard.size
    groups = torch.nn.functional.pad(x.double(), (0, short)).unflatten(1, (-1, hadamard.size))
    return (groups @ matrix(hadamard)).flatten(1)


@every_transform
def test_the_transform_is_orthogonal(hadamard):
    t = hadamard.apply(torch.eye(hadamard.size)).double()
    one = torch.eye(hadamard.size, dtype=torch.float64)
    assert (t @ t.t() - one).abs().max() < 1e-6
    assert (t.t() @ t - one).abs().max() < 1e-6


@every_transform
def test_the_transform_is_its_matrix(hadamard):
    t = matrix(hadamard)
    assert (t @ t.t() - torch.eye(hadamard.size)).abs().max() < 1e-12
    got = hadamard.apply(torch.eye(hadamard.size)).double()
    assert (got - t).abs().max() < 1e-7
    x = heavy_tailed(7, 3 * hadamard.size, seed=0)
    assert (hadamard.apply(x).double() - expected(x, hadamard)).abs().max() < 1e-6 * x.abs().max() * hadamard.size**0.5


@every_transform
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 100, 129, 200])
def test_a_short_last_group_is_padded_with_zeros_and_inverts(hadamard, length):
    x = gaussian(5, length, seed=1)
    y = hadamard.apply(x)
    assert y.shape == (5, -(-length // hadamard.size) * hadamard.size)
    assert y.dtype == torch.float32
    assert (y.double() - expected(x, hadamard)).abs().max() < 1e-5
    back = hadamard.invert(y, length)
    assert back.shape == x.shape
    assert (back - x).abs().max() < 1e-5
    assert torch.equal(y, hadamard.apply(torch.nn.functional.pad(x, (0, -length % hadamard.size))))


@every_transform
def test_norms_are_kept_and_an_outlier_is_spread(hadamard):
    x = torch.zeros(1, hadamard.size)
    x[0, 3] = 1000.0
    y = hadamard.apply(x)
    torch.testing.assert_close(y.abs(), torch.full_like(y, 1000 * hadamard.size**-0.5), rtol=1e-6, atol=0)
    z = heavy_tailed(9, 2 * hadamard.size, seed=2)
    torch.testing.assert_close(hadamard.apply(z).double().norm(dim=1), z.double().norm(dim=1), rtol=1e-6, atol=0)


@every_transform
@pytest.mark.parametrize("shape", [(6, 256), (3, 50), (1, 17), (200, 16)])
def test_memory_order_changes_no_bit(hadamard, shape):
    x = heavy_tailed(*shape, seed=3)
    y, transposed = hadamard.apply(x), hadamard.apply(x.t().contiguous().t())
    assert torch.equal(y.view(torch.int32), transposed.contiguous().view(torch.int32))
    if shape[0] > 1:
        assert transposed.stride(0) == 1  # it follows x's memory order, so that quantising needs no strided pass
    every_other = torch.stack([x, -x], dim=-1).flatten(1)[:, ::2]
    assert torch.equal(hadamard.apply(every_other), y)
    back = hadamard.invert(transposed, shape[1])
    assert torch.equal(back, hadamard.invert(y, shape[1]))


@every_transform
@pytest.mark.parametrize("length", [256, 150])
def test_it_cancels_in_a_product_of_two_transformed_operands(hadamard, length):
    """(a T)(b T)^t equals a b^t, padded groups included, and differs where the signs of the two transforms differ."""
    a, b = gaussian(20, length, seed=4), heavy_tailed(30, length, seed=5)
    product = hadamard.apply(a).double() @ hadamard.apply(b).double().t()
    error = (product - a.double() @ b.double().t()).abs()
    assert (error <= fp32_accumulation_bound(a, b) + 1e-6 * a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)).all()
    other = Hadamard.seeded(hadamard.size, seed=99)
    wrong = hadamard.apply(a).double() @ other.apply(b).double().t()
    assert (wrong - a.double() @ b.double().t()).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_equal_their_fp32_values(dtype):
    x = gaussian(4, 64, seed=6).to(dtype)
    assert torch.equal(TRANSFORMS[0].apply(x), TRANSFORMS[0].apply(x.float()))


def test_seeded_signs_are_the_same_for_the_same_seed():
    assert Hadamard.seeded(64, 3) == Hadamard.seeded(64, 3)
    assert len({Hadamard.seeded(64, seed).signs for seed in range(50)}) == 50
    assert abs(np.mean([Hadamard.seeded(128, seed).signs for seed in range(100)])) < 4 / (128 * 100) ** 0.5
    assert Hadamard.plain(16).signs == (1,) * 16
    assert [str(Hadamard.plain(size)) for size in SIZES] == ["H16", "H32", "H64", "H128"]


def test_the_fixed_signs_of_nvfp4_are_the_published_ones():
    assert "".join("+" if sign > 0 else "-" for sign in NVFP4_SIGNS) == "+++-+------+-+--"


@pytest.mark.parametrize("size", [0, 1, 8, 17, 48, 256])
def test_wrong_sizes_are_refused(size):
    with pytest.raises(ValueError, match="a Hadamard transform has size 16, 32, 64, 128; got"):
        Hadamard(size=size, signs=(1,) * size)


@pytest.mark.parametrize(
    "signs", [(1,) * 15, (1,) * 17, (0, *(1,) * 15), (2, *(1,) * 15), ()], ids=["short", "long", "zero", "two", "none"]
)
def test_wrong_signs_are_refused(signs):
    with pytest.raises(ValueError, match="takes 16 signs, each 1 or -1"):
        Hadamard(size=16, signs=signs)


def test_rows_may_be_missing():
    assert TRANSFORMS[0].apply(torch.empty(0, 20)).shape == (0, 32)
    assert TRANSFORMS[0].invert(torch.empty(0, 32), 20).shape == (0, 20)
