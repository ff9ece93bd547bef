"""Kronecker sums: Van Loan's identity, both contraction orders, that W is never formed; and the SVD below them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from reference.kronecker import discarded_energy, kronecker_sum, multiply_adds, van_loan_squared_error
from samples.matrices import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kronpress import RequestError
from kronpress.matrices import Kronecker
from kronpress.matrices.kronecker import KroneckerSpec, divisors
from kronpress.matrices.svd import balanced_svd

laws = settings(max_examples=50, deadline=None)
small = st.integers(1, 6)
seeds = st.integers(0, 2**32)


@st.composite
def specs(draw: st.DrawFn) -> KroneckerSpec:
    m1, n1, m2, n2 = (draw(small) for _ in range(4))
    num_terms = draw(st.integers(1, min(m1 * n1, m2 * n2)))
    return Kronecker.Spec(left_shape=(m1, n1), right_shape=(m2, n2), num_terms=num_terms)


def shape_of(spec: KroneckerSpec) -> tuple[int, int]:
    (m1, n1), (m2, n2) = spec.left_shape, spec.right_shape
    return m1 * m2, n1 * n2


def normal_factors(seed: int, spec: KroneckerSpec) -> dict[str, Tensor]:
    shapes = Kronecker.factor_shapes(*shape_of(spec), spec)
    return {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


# ---- the sum and its fit ----


@given(spec=specs(), seed=seeds)
@laws
def test_expand_is_the_sum_of_kronecker_products(spec: KroneckerSpec, seed: int) -> None:
    factors = normal_factors(seed, spec)
    torch.testing.assert_close(Kronecker.expand(factors), kronecker_sum(factors), rtol=1e-14, atol=1e-14)


@given(spec=specs(), seed=seeds, decay=st.sampled_from([1.0, 0.5, 0.1]))
@laws
def test_squared_error_is_the_discarded_energy_of_the_rearrangement(
    spec: KroneckerSpec, seed: int, decay: float
) -> None:
    # Terms that fade, so that the tail is small beside the head.
    most = min(spec.left_shape[0] * spec.left_shape[1], spec.right_shape[0] * spec.right_shape[1])
    all_terms = normal_factors(seed, spec.model_copy(update={"num_terms": most}))
    fading = decay ** torch.arange(min(most, 5)).double()
    weight = kronecker_sum({"weight": all_terms["weight"][:, :5] * fading[:, None], "right": all_terms["right"][:, :5]})
    error = (weight - kronecker_sum(Kronecker.fit(weight, spec))).square().sum().item()
    expected = van_loan_squared_error(weight, spec.left_shape, spec.right_shape, spec.num_terms)
    assert error == pytest.approx(expected, rel=1e-9, abs=1e-20 * (1 + weight.square().sum().item()))


@pytest.mark.parametrize("shape", [(768, 192), (192, 768)], ids=["up", "down"])
@pytest.mark.parametrize(
    ("right_shape", "num_terms"), [((48, 24), 1), ((3, 3), 2), ((3, 3), 4), ((4, 1), 1), ((1, 2), 1)]
)
def test_published_shapes_reach_the_van_loan_error_in_both_orientations(
    shape: tuple[int, int], right_shape: tuple[int, int], num_terms: int
) -> None:
    weight = normal(0, *shape)
    [spec] = Kronecker.candidate_specs(*shape, right_shape=right_shape, num_terms=num_terms)
    assert spec.right_shape == (right_shape if shape[0] > shape[1] else right_shape[::-1])
    error = (weight - kronecker_sum(Kronecker.fit(weight, spec))).square().sum().item()
    expected = van_loan_squared_error(weight, spec.left_shape, spec.right_shape, num_terms)
    assert error == pytest.approx(expected, rel=1e-9)


@given(spec=specs(), seed=seeds)
@laws
def test_fitted_terms_share_their_size_evenly(spec: KroneckerSpec, seed: int) -> None:
    factors = Kronecker.fit(normal(seed, *shape_of(spec)), spec)
    left, right = (factors[name].square().sum((0, 2)) for name in ("weight", "right"))
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


# ---- other starts ----


@given(spec=specs(), seed=seeds)
@laws
def test_the_adaptive_start_is_the_nearest_sum_made_as_large_as_the_weight(spec: KroneckerSpec, seed: int) -> None:
    weight = normal(seed, *shape_of(spec))
    nearest = Kronecker.expand(Kronecker.fit(weight, spec))
    factors = Kronecker.fit(weight, spec, options=Kronecker.Options(start="adaptive"))
    torch.testing.assert_close(Kronecker.expand(factors), nearest * weight.norm() / nearest.norm())


@given(spec=specs(), seed=seeds, size=st.sampled_from([1e-6, 1.0, 1e6]))
@laws
def test_the_scalars_of_the_adaptive_start_are_read_off_its_factors(
    spec: KroneckerSpec, seed: int, size: float
) -> None:
    weight, options = size * normal(seed, *shape_of(spec)), Kronecker.Options(start="adaptive")
    factors = Kronecker.fit(weight, spec, options=options)
    parametrization = Kronecker.healing_parametrization(factors, options)
    alpha = weight.norm() / Kronecker.expand(Kronecker.fit(weight, spec)).norm()
    [(name, scale)] = parametrization.named_parameters()
    assert name == "scale"
    torch.testing.assert_close(scale.data, alpha.expand(spec.num_terms))
    unscaled = parametrization.right_inverse(factors["weight"])
    torch.testing.assert_close(unscaled.square().sum((0, 2)), factors["right"].square().sum((0, 2)))
    torch.testing.assert_close(parametrization(unscaled), factors["weight"])


def test_nothing_but_the_adaptive_start_is_parametrized() -> None:
    factors = normal_factors(0, KRONY_96M)
    assert Kronecker.healing_parametrization(factors, Kronecker.Options()) is None
    assert Kronecker.healing_parametrization(factors, Kronecker.Options(start="prune")) is None


def test_the_adaptive_start_of_a_zero_weight_is_zero() -> None:
    options = Kronecker.Options(start="adaptive")
    factors = Kronecker.fit(torch.zeros(48, 12), KRONY_96M, options=options)
    assert Kronecker.expand(factors).eq(0).all()
    assert Kronecker.healing_parametrization(factors, options).scale.tolist() == [1.0]


@pytest.mark.parametrize(("given_factor", "small"), [(None, 0.1), (0.0, 0.0), (-0.5, -0.5)])
def test_pruning_keeps_every_second_column_or_row(given_factor: float | None, small: float) -> None:
    options = Kronecker.Options(start="prune", prune_small_factor=given_factor)
    up = normal(0, 48, 12)
    kept = torch.kron(up[:, ::2], torch.tensor([[1.0, small]], dtype=torch.float64))
    torch.testing.assert_close(Kronecker.expand(Kronecker.fit(up, KRONY_96M, options=options)), kept)
    down = Kronecker.expand(Kronecker.fit(up.mT, KRONY_96M_DOWN, options=options))
    torch.testing.assert_close(down, kept.mT)


@pytest.mark.parametrize("spec_name", ["KRONY_80M", "KRONY_81M_DOWN", "two terms"])
def test_pruning_needs_one_term_with_a_pair(spec_name: str) -> None:
    spec = KRONY_96M.model_copy(update={"num_terms": 2}) if spec_name == "two terms" else globals()[spec_name]
    with pytest.raises(RequestError, match="it needs one term with 1×2 or 2×1"):
        Kronecker.fit(normal(0, *shape_of(spec)), spec, options=Kronecker.Options(start="prune"))


def test_a_small_factor_without_pruning_is_refused() -> None:
    with pytest.raises(ValueError, match="start is adaptive, not prune"):
        Kronecker.Options(start="adaptive", prune_small_factor=0.1)


# ---- multiplying ----

RIGHT_FIRST = Kronecker.Spec(left_shape=(8, 2), right_shape=(2, 8), num_terms=3)
LEFT_FIRST = Kronecker.Spec(left_shape=(2, 8), right_shape=(8, 2), num_terms=3)
KRONY_96M = Kronecker.Spec(left_shape=(48, 6), right_shape=(1, 2))
KRONY_96M_DOWN = Kronecker.Spec(left_shape=(6, 48), right_shape=(2, 1))
KRONY_80M = Kronecker.Spec(left_shape=(16, 8), right_shape=(3, 3), num_terms=2)
KRONY_81M_DOWN = Kronecker.Spec(left_shape=(12, 12), right_shape=(1, 4))
COMPRESSING = [RIGHT_FIRST, LEFT_FIRST, KRONY_96M, KRONY_96M_DOWN, KRONY_80M, KRONY_81M_DOWN]


class Trace(TorchDispatchMode):
    """Counts matrix products, and keeps the size of the largest tensor that any operation gives."""

    MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)

    def __init__(self) -> None:
        super().__init__()
        self.num_matrix_products = 0
        self.largest_numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_matrix_products += func.overloadpacket in self.MATRIX_PRODUCTS
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest_numel = max(self.largest_numel, *sizes, 0)
        return result


def traced(spec: KroneckerSpec, multiply: Any = Kronecker.multiply) -> tuple[Trace, Trace]:
    """The forward and the backward pass of one token."""
    factors = {name: factor.requires_grad_() for name, factor in normal_factors(0, spec).items()}
    x = normal(1, 1, shape_of(spec)[1]).requires_grad_()
    with Trace() as forward:
        y = multiply(factors, x)
    with Trace() as backward:
        y.sum().backward()
    return forward, backward


def test_both_contraction_orders_are_covered() -> None:
    right_first, left_first = multiply_adds(RIGHT_FIRST.left_shape, RIGHT_FIRST.right_shape, 3)
    assert right_first < left_first
    right_first, left_first = multiply_adds(LEFT_FIRST.left_shape, LEFT_FIRST.right_shape, 3)
    assert left_first < right_first


@given(spec=specs())
@laws
def test_flops_are_those_of_the_cheaper_order(spec: KroneckerSpec) -> None:
    cheaper = min(multiply_adds(spec.left_shape, spec.right_shape, spec.num_terms))
    assert Kronecker.count_flops(*shape_of(spec), spec) == 2 * cheaper


@given(spec=specs())
@laws
def test_parameters_are_those_of_all_factors(spec: KroneckerSpec) -> None:
    (m1, n1), (m2, n2) = spec.left_shape, spec.right_shape
    assert Kronecker.count_params(*shape_of(spec), spec) == spec.num_terms * (m1 * n1 + m2 * n2)


@pytest.mark.parametrize("spec", COMPRESSING, ids=str)
def test_multiply_equals_the_reference_without_calling_kron(
    spec: KroneckerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors, x = normal_factors(0, spec), normal(1, 2, 3, shape_of(spec)[1])
    expected = x @ kronecker_sum(factors).mT

    def refuse(*_: Any) -> None:
        raise AssertionError("torch.kron forms the whole matrix")

    monkeypatch.setattr(torch, "kron", refuse)
    torch.testing.assert_close(Kronecker.multiply(factors, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", COMPRESSING, ids=str)
def test_neither_pass_of_one_token_ever_holds_as_many_numbers_as_the_matrix(spec: KroneckerSpec) -> None:
    out_features, in_features = shape_of(spec)
    forward, backward = traced(spec)
    assert 0 < forward.largest_numel < out_features * in_features
    assert 0 < backward.largest_numel < out_features * in_features
    through_dense, _ = traced(spec, lambda factors, x: x @ Kronecker.expand(factors).mT)
    assert through_dense.largest_numel >= out_features * in_features


@pytest.mark.parametrize("spec", COMPRESSING, ids=str)
def test_any_number_of_terms_is_the_same_few_matrix_products(spec: KroneckerSpec) -> None:
    one_term, more_terms = (traced(spec.model_copy(update={"num_terms": k})) for k in (1, 2))
    assert one_term[0].num_matrix_products == more_terms[0].num_matrix_products == 2
    assert one_term[1].num_matrix_products == more_terms[1].num_matrix_products == 4


# ---- specs and candidates ----


@pytest.mark.parametrize(
    ("left_shape", "right_shape"),
    [((2, 3), (4, 2)), ((4, 4), (2, 2)), ((3, 4), (4, 2)), ((12, 1), (8, 1))],
)
def test_a_product_of_another_shape_is_refused_with_both_shapes(
    left_shape: tuple[int, int], right_shape: tuple[int, int]
) -> None:
    spec = Kronecker.Spec(left_shape=left_shape, right_shape=right_shape)
    product = f"{left_shape[0] * right_shape[0]}×{left_shape[1] * right_shape[1]}"
    with pytest.raises(RequestError, match=f"{product}, not the matrix's 8×12"):
        Kronecker.factor_shapes(8, 12, spec)


@given(spec=specs())
@laws
def test_as_many_terms_as_the_smaller_factor_has_entries_are_allowed_and_exact(spec: KroneckerSpec) -> None:
    (m1, n1), (m2, n2) = spec.left_shape, spec.right_shape
    most = min(m1 * n1, m2 * n2)
    weight = normal(0, *shape_of(spec))
    full = spec.model_copy(update={"num_terms": most})
    torch.testing.assert_close(kronecker_sum(Kronecker.fit(weight, full)), weight, rtol=0, atol=1e-10)
    with pytest.raises(RequestError, match=f"num_terms {most + 1}"):
        Kronecker.factor_shapes(*shape_of(spec), spec.model_copy(update={"num_terms": most + 1}))


@given(out_features=st.integers(2, 24), in_features=st.integers(2, 24))
@laws
def test_candidates_cover_every_pair_of_divisors_but_the_two_that_factor_nothing(
    out_features: int, in_features: int
) -> None:
    found = {spec.right_shape for spec in Kronecker.candidate_specs(out_features, in_features, num_terms=1)}
    pairs = {
        (m2, n2)
        for m2 in range(1, out_features + 1)
        for n2 in range(1, in_features + 1)
        if out_features % m2 == 0 and in_features % n2 == 0
    }
    assert found == pairs - {(1, 1), (out_features, in_features)}


def test_a_given_right_shape_is_for_the_taller_side_and_mirrored_for_a_wide_matrix() -> None:
    for shape, right_shape in [((48, 12), (4, 3)), ((12, 48), (3, 4)), ((12, 12), (4, 3))]:
        [spec] = Kronecker.candidate_specs(*shape, right_shape=(4, 3), num_terms=2)
        assert spec.right_shape == right_shape
        assert spec.left_shape == (shape[0] // right_shape[0], shape[1] // right_shape[1])
        assert spec.num_terms == 2


@pytest.mark.parametrize(
    ("shape", "right_shape", "side"),
    [
        ((48, 12), (5, 3), "out_features 48"),
        ((48, 12), (4, 5), "in_features 12"),
        ((12, 48), (5, 3), "in_features 48"),
        ((12, 48), (4, 5), "out_features 12"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_with_the_divisors(
    shape: tuple[int, int], right_shape: tuple[int, int], side: str
) -> None:
    size = int(side.split()[1])
    with pytest.raises(RequestError, match=f"5 does not divide {side}.*{', '.join(map(str, divisors(size)))}"):
        Kronecker.candidate_specs(*shape, right_shape=right_shape, num_terms=1)


@given(number=st.integers(1, 3000))
@laws
def test_divisors_are_those_found_by_trial(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


# ---- the truncated SVD ----


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=seeds, data=st.data())
@laws
def test_balanced_svd_is_balanced_and_optimal(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)), label="rank")
    matrix = normal(seed, rows, columns) * data.draw(st.sampled_from([1e-9, 1.0, 1e9]), label="scale")
    norm = matrix.norm().item()
    left, right = balanced_svd(matrix, rank)
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-8 * norm)
    error = (matrix - left @ right).square().sum().item()
    assert error == pytest.approx(discarded_energy(matrix.numpy(), rank), rel=1e-9, abs=1e-20 * norm**2)


@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=seeds, data=st.data())
@laws
def test_balanced_svd_of_a_deficient_matrix_is_finite_exact_and_balanced(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    true_rank = data.draw(st.integers(0, min(rows, columns) - 1), label="true rank")
    rank = data.draw(st.integers(max(true_rank, 1), min(rows, columns)), label="rank")
    matrix = normal(seed, rows, true_rank) @ normal(seed + 1, true_rank, columns)
    left, right = balanced_svd(matrix, rank)
    assert left.isfinite().all()
    assert right.isfinite().all()
    torch.testing.assert_close(left @ right, matrix, rtol=0, atol=1e-10)
    # A direction of no weight is known to the square root of the rounding only.
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_balanced_svd_of_zero_is_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for part in balanced_svd(torch.zeros(shape, dtype=dtype), min(shape)):
        assert part.dtype == dtype
        torch.testing.assert_close(part, torch.zeros_like(part), rtol=0, atol=0)


SIDE = 320  # large enough for the iterative method
ALTERNATING = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(SIDE // 2)


@pytest.mark.parametrize("rank", [1, 10])
@pytest.mark.parametrize(
    "matrix",
    [
        normal(0, 400, SIDE),
        normal(0, SIDE, 400),
        torch.zeros(SIDE, SIDE, dtype=torch.float64),
        torch.eye(SIDE, dtype=torch.float64),
        normal(0, SIDE, 3) @ normal(1, 3, SIDE),
        # The leading direction is orthogonal to a start that is all ones, exactly.
        torch.outer(torch.ones(SIDE, dtype=torch.float64), ALTERNATING),
        64 * torch.outer(ALTERNATING, ALTERNATING) + 1,
        8 * torch.outer(normal(0, SIDE), ALTERNATING) + normal(1, SIDE, SIDE // 2).repeat_interleave(2, 1),
    ],
    ids=[
        "tall",
        "wide",
        "zero",
        "identity",
        "rank three",
        "alternating",
        "alternating and ones",
        "alternating and pairs",
    ],
)
def test_balanced_svd_finds_a_few_of_many_directions_whatever_they_are(matrix: Tensor, rank: int) -> None:
    left, right = balanced_svd(matrix, rank)
    error, squared_norm = (matrix - left @ right).square().sum().item(), matrix.square().sum().item()
    assert error == pytest.approx(discarded_energy(matrix.numpy(), rank), rel=1e-9, abs=1e-20 * squared_norm)
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-6 * (1 + squared_norm**0.5))


@pytest.mark.parametrize(
    "matrix", [normal(0, SIDE, SIDE), torch.eye(SIDE, dtype=torch.float64)], ids=["any", "identity"]
)
def test_balanced_svd_is_the_same_every_time(matrix: Tensor) -> None:
    torch.testing.assert_close(balanced_svd(matrix, 4), balanced_svd(matrix, 4), rtol=0, atol=0)


def test_balanced_svd_of_a_very_tall_matrix_agrees_with_numpy() -> None:
    matrix = normal(0, 20_000, 4) * torch.tensor([1.0, 1e-1, 1e-2, 1e-3], dtype=torch.float64)
    left, right = balanced_svd(matrix, 2)
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    expected = torch.from_numpy(u[:, :2] * s[:2] @ vh[:2])
    torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-10)


def test_a_sum_has_one_term_unless_it_says_more() -> None:
    assert Kronecker.Spec(left_shape=(2, 3), right_shape=(4, 1)).num_terms == 1
