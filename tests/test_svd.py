"""The decompositions below the fits: the dense SVD's truncation, whatever the spectrum, the layout and the dtype."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference.kronecker import discarded_energy, kronecker_sum, rearranged
from torch import Tensor

from kronpress.matrices import Kronecker, svd
from kronpress.matrices.kronecker_in_metric import van_loan

laws = settings(max_examples=50, deadline=None)
slow_laws = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**32)
# Of all energy: what rounds in a Gram matrix, and so what a direction may have and not be found.
ROUNDING = 1e-15


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: Tensor, rows: int, seed: int = 0) -> Tensor:
    """(rows, columns) with these singular values."""
    columns = len(values)
    left, right = (torch.linalg.qr(normal(seed + i, size, columns)).Q for i, size in enumerate((rows, columns)))
    return (left * values) @ right.mT


# ---- few rows or columns, that are not rearranged ----


@pytest.mark.parametrize("chunk", [1, 40, 2**18], ids="chunks of {}".format)
@given(
    sides=st.tuples(*4 * [st.integers(1, 5)]),
    seed=seeds,
    is_transposed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    true_terms=st.integers(0, 6),
    data=st.data(),
)
@laws
def test_van_loan_captures_what_the_dense_svd_does_from_any_layout_dtype_and_rank(
    chunk: int,
    sides: tuple[int, int, int, int],
    seed: int,
    is_transposed: bool,
    dtype: torch.dtype,
    true_terms: int,
    data: st.DataObject,
) -> None:
    m1, n1, m2, n2 = sides
    k = data.draw(st.integers(1, min(m1 * n1, m2 * n2)), label="terms")
    if true_terms:
        factors = {"weight": normal(seed, m1, true_terms, n1), "right": normal(seed + 1, m2, true_terms, n2)}
        weight = kronecker_sum(factors).to(dtype)
    else:
        weight = torch.zeros(m1 * m2, n1 * n2, dtype=dtype)
    if is_transposed:
        weight = weight.mT.contiguous().mT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svd, "CHUNK_NUMEL", chunk)
        a, b = van_loan(weight, (m1, n1), (m2, n2), k)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((k, m1, n1), (k, m2, n2), torch.float64, torch.float64)
    error = (weight.double() - kronecker_sum({"weight": a.transpose(0, 1), "right": b.transpose(0, 1)})).square().sum()
    norm = weight.double().square().sum().item()
    least = discarded_energy(rearranged(weight, (m1, n1), (m2, n2)), k)
    assert error.item() == pytest.approx(least, rel=1e-9, abs=ROUNDING * norm)
    torch.testing.assert_close(a.square().sum((1, 2)), b.square().sum((1, 2)), rtol=1e-9, atol=1e-7 * (1 + norm**0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("right_shape", [(1, 2), (4, 2), (8, 8), (48, 24), (64, 32), (96, 48)], ids=str)
def test_tiny_large_and_balanced_factors_reach_the_optimum(right_shape: tuple[int, int], dtype: torch.dtype) -> None:
    shape, (m2, n2) = (384, 96), right_shape
    left_shape = shape[0] // m2, shape[1] // n2
    weight = normal(0, *shape).to(dtype)
    for k in (1, 2):
        a, b = van_loan(weight, left_shape, right_shape, k)
        approximation = kronecker_sum({"weight": a.transpose(0, 1), "right": b.transpose(0, 1)})
        error = (weight.double() - approximation).square().sum().item()
        assert error == pytest.approx(discarded_energy(rearranged(weight, left_shape, right_shape), k), rel=1e-9)


def test_a_weight_with_a_tiny_factor_is_not_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def empty(self: Tensor, *shape: int, **kwargs: object) -> Tensor:
        made = Tensor.new_zeros(self, *shape, **kwargs)  # type: ignore[call-overload]
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(svd, "CHUNK_NUMEL", 1000)
    monkeypatch.setattr(Tensor, "new_empty", empty)
    Kronecker.fit(normal(0, 400, 100), Kronecker.Spec(left_shape=(200, 50), right_shape=(2, 2)))
    assert max(sizes) == 400 * 100 // 4  # the larger factor


# ---- Lanczos ----

SIDE = 288
SPECTRA = {
    "flat": torch.linspace(2, 1, SIDE),
    "two that are all but equal at the cut": torch.cat([torch.tensor([1, 1 - 1e-7]), torch.linspace(0.9, 0, SIDE - 2)]),
    "six that are all but equal": torch.cat([1 - 1e-9 * torch.arange(6.0), torch.linspace(0.9, 0, SIDE - 6)]),
    "five that are equal": torch.cat([torch.ones(5), torch.linspace(0.9, 0, SIDE - 5)]),
    "all equal": torch.ones(SIDE),
    "three and nothing": torch.cat([torch.tensor([3.0, 2, 1]), torch.zeros(SIDE - 3)]),
    "three and little": torch.cat([torch.tensor([3.0, 2, 1]), torch.full((SIDE - 3,), 1e-6)]),
    "geometric": 0.8 ** torch.arange(float(SIDE)),
    "steep": 0.1 ** torch.arange(float(SIDE)),
    "nothing": torch.zeros(SIDE),
}


@pytest.mark.parametrize("rank", [1, 2, svd.FEW, svd.FEW + 1])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_a_few_of_many_directions_lose_no_energy_whatever_the_spectrum(spectrum: str, rank: int, size: float) -> None:
    values = size * SPECTRA[spectrum].double()
    matrix = with_spectrum(values, 2 * SIDE)
    left, right = svd.balanced_svd(matrix, rank)
    error = (matrix - left @ right).square().sum().item()
    norm = values.square().sum().item()
    assert error == pytest.approx(discarded_energy(matrix.numpy(), rank), rel=1e-9, abs=ROUNDING * norm)
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-6 * (1e-30 + norm**0.5))


@given(rows=st.integers(SIDE, 400), columns=st.integers(260, SIDE), rank=st.integers(1, svd.FEW), seed=seeds)
@slow_laws
def test_lanczos_loses_no_energy_of_random_matrices_of_any_shape(rows: int, columns: int, rank: int, seed: int) -> None:
    matrix = normal(seed, rows, columns)
    for each in (matrix, matrix.mT):
        left, right = svd.balanced_svd(each, rank)
        error = (each - left @ right).square().sum().item()
        assert error == pytest.approx(discarded_energy(matrix.numpy(), rank), rel=1e-9)


def test_lanczos_finds_it_by_products_alone_where_it_converges_and_all_are_computed_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    for name in ("gram", "leading_eigenvectors"):
        original = getattr(svd, name)
        monkeypatch.setattr(svd, name, lambda *a, f=original, n=name: (called.append(n), f(*a))[1])
    svd.balanced_svd(with_spectrum(SPECTRA["geometric"].double(), SIDE), 2)
    assert called == []
    hard = with_spectrum(SPECTRA["flat"].double(), SIDE)
    left, right = svd.balanced_svd(hard, svd.FEW)
    assert called == ["gram", "leading_eigenvectors"]
    error = (hard - left @ right).square().sum().item()
    assert error == pytest.approx(discarded_energy(hard.numpy(), svd.FEW), rel=1e-9)


@given(size=st.integers(20, 60), rank=st.integers(1, 5), seed=seeds, decay=st.sampled_from([0.3, 0.7, 0.95]))
@laws
def test_what_lanczos_returns_is_orthonormal_and_within_its_tolerance(
    size: int, rank: int, seed: int, decay: float
) -> None:
    half = with_spectrum(decay ** torch.arange(float(size)).double(), size, seed % 1000)
    matrix = half.mT @ half
    start = normal(seed, rank + 2, size)
    found = svd.lanczos(lambda x: x @ matrix, matrix.trace().item(), start, rank)
    if found is None:
        return
    assert found.shape == (rank + 2, size)
    torch.testing.assert_close(found @ found.mT, torch.eye(rank + 2, dtype=torch.float64), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    captured = (found[:rank] @ matrix @ found[:rank].mT).trace().item()
    best, left = values[:rank].sum().item(), values[rank:].sum().item()
    assert best - captured <= 2 * svd.ENERGY_TOLERANCE * left + 1e-13 * best


def test_lanczos_sees_eigenvalues_as_often_as_its_start_has_rows() -> None:
    values = torch.cat([torch.full((4,), 5.0), torch.linspace(2, 0, 196)]).double()
    q = torch.linalg.qr(normal(0, 200, 200)).Q
    matrix = (q * values) @ q.mT
    found = svd.lanczos(lambda x: x @ matrix, values.sum().item(), normal(1, 5, 200), 4)
    assert found is not None
    torch.testing.assert_close((found[:4] @ matrix @ found[:4].mT).trace().item(), 20.0)
