"""The laws of StructuredMatrix, checked for every structure in the registry."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kronpress import RequestError, StructuredLinear
from kronpress.matrices import STRUCTURES, Blast, PermutedKronecker, Spec, StructuredMatrix, StructuredSum, TensorTrain
from kronpress.matrices.metric import Metric

Structure = type[StructuredMatrix]


class ThreeCores(TensorTrain):
    """Where nothing is said, three cores: their fit is a local optimum, and obeys all laws but those of the nearest."""

    @classmethod
    def candidate_specs(cls, *arguments: Any, **fixed: Any) -> list[Any]:
        return super().candidate_specs(*arguments, **{"num_cores": 3, **fixed})


class FourCores(TensorTrain):
    @classmethod
    def candidate_specs(cls, *arguments: Any, **fixed: Any) -> list[Any]:
        return super().candidate_specs(*arguments, **{"num_cores": 4, **fixed})


every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=list(STRUCTURES))
# The fits of these are local optima, which obey laws of their own: tests/test_blast.py, tests/test_structured_sum.py.
LOCAL = (Blast, StructuredSum)
NEAREST = {name: structure for name, structure in STRUCTURES.items() if structure not in LOCAL}
every_nearest = pytest.mark.parametrize("structure", NEAREST.values(), ids=list(NEAREST))
MORE = {**STRUCTURES, "three cores": ThreeCores, "four cores": FourCores}
every_size = pytest.mark.parametrize("structure", MORE.values(), ids=list(MORE))
laws = settings(max_examples=20, deadline=None)

SIZES = (1, 2, 3, 4, 6, 7, 8, 12)
LEADING_SHAPES = ((), (1,), (4,), (1, 1), (2, 3), (2, 1, 3), (0,))
# Largest allowed error of an entry, relative to the largest entry; about a few roundings of the dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Case(NamedTuple):
    """A spec that fits a shape, and was found with a budget of `max_params`."""

    out_features: int
    in_features: int
    spec: Any
    max_params: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


def draw_case(data: st.DataObject, structure: Structure) -> Case:
    out_features, in_features = (data.draw(st.sampled_from(SIZES), label=side) for side in ("out", "in"))
    assume(out_features * in_features > 1)
    max_params = data.draw(st.integers(1, 2 * out_features * in_features), label="max_params")
    specs = structure.candidate_specs(out_features, in_features, max_params)
    assume(specs)
    return Case(out_features, in_features, data.draw(st.sampled_from(specs), label="spec"), max_params)


def draw_normal(data: st.DataObject, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_factors(data: st.DataObject, structure: Structure, case: Case, shuffled: bool = True) -> dict[str, Tensor]:
    """Random factors, and random orders where the structure has any; without `shuffled` the orders ascend.

    What a fit has to find in a shuffled order it need not find: that a search does is a law of its own structure.
    """
    shapes = structure.factor_shapes(*case.shape, case.spec)
    orders = {name: torch.arange(size) for name, size in structure.order_sizes(*case.shape, case.spec).items()}
    if shuffled and orders:
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="orders"))
        orders = {name: torch.randperm(len(order), generator=generator) for name, order in orders.items()}
    return {**{name: draw_normal(data, *shape) for name, shape in shapes.items()}, **orders}


def learnable(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors that are no orders, each asked for its gradient."""
    return {name: factor.requires_grad_() for name, factor in factors.items() if factor.is_floating_point()}


def squared_error(structure: Structure, weight: Tensor, factors: dict[str, Tensor]) -> Tensor:
    return (weight - structure.expand(factors)).square().sum()


def draw_separable_side(data: st.DataObject, size: int) -> Tensor:
    """A regular diagonal matrix that is separable whatever divisor of `size` it is cut by, given as a matrix.

    One of two numbers for each binary digit of the index, and ones where the size is no power of two.
    """
    diagonal = torch.ones(1, dtype=torch.float64)
    for _ in range(size.bit_length() - 1 if size.bit_count() == 1 else 0):
        digit = torch.tensor([1.0, data.draw(st.floats(0.1, 3), label="digit")], dtype=torch.float64)
        diagonal = torch.kron(diagonal, digit)
    return torch.diag(diagonal if len(diagonal) == size else torch.ones(size, dtype=torch.float64))


def draw_separable_metric(data: st.DataObject, case: Case) -> Metric:
    """One in which every structure whose fit is a closed form in Frobenius norm has one as well."""
    output, input = (draw_separable_side(data, size) for size in case.shape)
    return Metric(input, output if data.draw(st.booleans(), label="has output") else None)


def resized(spec: Spec, **fields: Any) -> Spec:
    return type(spec)(**{**dict(spec), **fields})


def others(spec: Spec, field: str) -> tuple[Any, ...]:
    return tuple(value for name, value in spec if name != field)


@cache
def free_count(structure: Structure) -> str:
    """The Spec field that a budget chooses: it varies with the budget, and the other fields then determine it."""
    by_budget = [structure.candidate_specs(24, 12, budget) for budget in range(1, 24 * 12, 5)]
    for field in structure.Spec.model_fields:
        groups: dict[tuple[Any, ...], set[Any]] = {}
        for spec in (spec for specs in by_budget for spec in specs):
            groups.setdefault(others(spec, field), set()).add(getattr(spec, field))
        varies = any(len(values) > 1 for values in groups.values())
        determined = all(len({others(spec, field) for spec in specs}) == len(specs) for specs in by_budget)
        if varies and determined:
            return field
    pytest.skip(f"{structure.__name__} has no count that a budget chooses")


def specs_on(structure: Structure, out_features: int, in_features: int) -> list[Any]:
    """Every candidate within half of the dense matrix's parameters."""
    return structure.candidate_specs(out_features, in_features, out_features * in_features // 2)


# ---- fitting ----


@every_size
@given(data=st.data())
@laws
def test_fit_recovers_a_matrix_of_its_own_kind(structure: Structure, data: st.DataObject) -> None:
    if structure in LOCAL:
        pytest.skip("a planted one is found as far as the alternation comes")
    case = draw_case(data, structure)
    planted = structure.expand(draw_factors(data, structure, case, shuffled=False))
    found = structure.expand(structure.fit(planted, case.spec))
    torch.testing.assert_close(found, planted, rtol=0, atol=1e-10 * (1 + planted.norm().item()))


@every_size
@given(data=st.data())
@laws
def test_fit_in_a_metric_recovers_a_matrix_of_its_own_kind(structure: Structure, data: st.DataObject) -> None:
    if structure in LOCAL:
        pytest.skip("a planted one is found as far as the alternation comes")
    case = draw_case(data, structure)
    planted = structure.expand(draw_factors(data, structure, case, shuffled=False))
    found = structure.expand(structure.fit(planted, case.spec, draw_separable_metric(data, case)))
    torch.testing.assert_close(found, planted, rtol=0, atol=1e-10 * (1 + planted.norm().item()))


@given(data=st.data())
@laws
def test_a_sum_recovers_a_matrix_of_any_one_of_its_parts(data: st.DataObject) -> None:
    case = draw_case(data, StructuredSum)
    part = data.draw(st.sampled_from(case.spec.parts), label="part")
    own = STRUCTURES[part.structure]
    planted = own.expand(draw_factors(data, own, case._replace(spec=part.spec), shuffled=False))
    metric = draw_separable_metric(data, case) if data.draw(st.booleans(), label="has metric") else None
    found = StructuredSum.expand(StructuredSum.fit(planted, case.spec, metric))
    torch.testing.assert_close(found, planted, rtol=0, atol=1e-10 * (1 + planted.norm().item()))


@every_nearest
@given(data=st.data())
@laws
def test_error_never_rises_with_the_count(structure: Structure, data: st.DataObject) -> None:
    case, field = draw_case(data, structure), free_count(structure)
    if structure.order_sizes(*case.shape, case.spec):
        pytest.skip("orders are searched anew for every count")
    weight = draw_normal(data, *case.shape)
    errors = []
    for count in range(1, getattr(case.spec, field) + 1):
        spec = resized(case.spec, **{field: count})
        errors.append(squared_error(structure, weight, structure.fit(weight, spec)).sqrt().item())
    slack = 1e-10 * weight.norm().item()
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))
    assert len(errors) == 1 or errors[-1] < errors[0]


@every_nearest
@given(data=st.data())
@laws
def test_fit_is_a_stationary_point_of_the_squared_error(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    weight = draw_normal(data, *case.shape)
    factors = structure.fit(weight, case.spec)
    inputs = list(learnable(factors).values())
    gradients = torch.autograd.grad(squared_error(structure, weight, factors), inputs)
    for gradient in gradients:
        torch.testing.assert_close(
            gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8 * weight.square().sum().item()
        )


@every_nearest
@given(data=st.data())
@laws
def test_changing_one_factor_of_a_fit_never_lowers_the_error(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    weight = draw_normal(data, *case.shape)
    factors = structure.fit(weight, case.spec)
    least = squared_error(structure, weight, factors)
    for name in structure.factor_shapes(*case.shape, case.spec):
        factor = factors[name]
        direction = draw_normal(data, *factor.shape)
        for step in (1e-3, 1e-1, -1e-1):
            changed = squared_error(structure, weight, {**factors, name: factor + step * direction})
            assert changed >= least - 1e-12 * weight.square().sum()


@every_nearest
@given(data=st.data())
@laws
def test_changing_one_factor_of_a_fit_in_a_metric_never_lowers_its_error(
    structure: Structure, data: st.DataObject
) -> None:
    if structure is PermutedKronecker:
        pytest.skip("in another order the metric is no longer separable")
    case = draw_case(data, structure)
    weight, metric = draw_normal(data, *case.shape), draw_separable_metric(data, case)
    factors = structure.fit(weight, case.spec, metric)
    least = metric.squared_norm(weight - structure.expand(factors))
    for name in structure.factor_shapes(*case.shape, case.spec):
        factor = factors[name]
        direction = draw_normal(data, *factor.shape)
        for step in (1e-3, 1e-1, -1e-1):
            changed = {**factors, name: factor + step * direction}
            error = metric.squared_norm(weight - structure.expand(changed))
            assert error >= least - 1e-12 * metric.squared_norm(weight)


@every_nearest
@given(data=st.data())
@laws
def test_fit_is_no_worse_than_any_other_factors(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    planted, noise = draw_factors(data, structure, case, shuffled=False), draw_normal(data, *case.shape)
    weight = structure.expand(planted) + data.draw(st.sampled_from([1e-3, 1.0])) * noise
    fitted = squared_error(structure, weight, structure.fit(weight, case.spec))
    assert fitted <= squared_error(structure, weight, planted) * (1 + 1e-9)


@every_size
@given(data=st.data())
@laws
def test_fit_does_not_depend_on_memory_layout_and_leaves_its_input_alone(
    structure: Structure, data: st.DataObject
) -> None:
    case = draw_case(data, structure)
    weight = draw_normal(data, *case.shape)
    before = weight.clone()
    transposed = weight.mT.contiguous().mT
    torch.testing.assert_close(
        structure.expand(structure.fit(transposed, case.spec)), structure.expand(structure.fit(weight, case.spec))
    )
    torch.testing.assert_close(weight, before, rtol=0, atol=0)


@every_size
def test_zero_and_rank_one_matrices_are_fitted_without_nan(structure: Structure) -> None:
    ramp = torch.arange(1, 13, dtype=torch.float64)[:, None] * torch.ones(8, dtype=torch.float64)
    for weight in (torch.zeros(12, 8, dtype=torch.float64), ramp, torch.eye(12, 8, dtype=torch.float64)):
        for spec in specs_on(structure, *weight.shape):
            factors = structure.fit(weight, spec)
            assert all(factor.isfinite().all() for factor in factors.values())
            assert squared_error(structure, weight, factors) <= weight.square().sum() * (1 + 1e-12)


@every_size
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_from_dense_keeps_dtype_and_device_and_is_the_fit(
    structure: Structure, dtype: torch.dtype, device: str
) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for spec in specs_on(structure, 12, 8):
        matrix = structure.from_dense(weight, spec)
        fitted = structure.fit(weight, spec)
        assert list(fitted) == list(matrix.factors)
        for name, factor in matrix.factors.items():
            is_order = name in structure.order_sizes(12, 8, spec)
            assert factor.dtype == (torch.int64 if is_order else dtype)
            assert (factor.device, factor.requires_grad) == (weight.device, not is_order)
            assert factor.is_contiguous()
            torch.testing.assert_close(factor.detach(), fitted[name], rtol=0, atol=0)


@every_size
def test_from_dense_of_a_parameter_gives_leaves(structure: Structure) -> None:
    weight = torch.nn.Parameter(torch.randn(12, 8))
    for spec in specs_on(structure, 12, 8):
        assert all(factor.is_leaf for factor in structure.from_dense(weight, spec).parameters())


# ---- multiplying ----


@every_size
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(data=st.data())
@laws
def test_matmul_equals_the_dense_product(structure: Structure, dtype: torch.dtype, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    leading = data.draw(st.sampled_from(LEADING_SHAPES), label="leading")
    matrix = structure(*case.shape, case.spec, dtype=dtype)
    matrix.load_state_dict(draw_factors(data, structure, case))
    x = draw_normal(data, *leading, case.in_features).to(dtype)
    factors = {name: factor.detach() for name, factor in matrix.factors.items()}
    doubles = {name: factor.double() for name, factor in factors.items() if factor.is_floating_point()}
    dense = structure.expand({**factors, **doubles})
    expected = x.double() @ dense.mT
    y = matrix.matmul(x)
    assert y.dtype == dtype
    largest = expected.abs().max().item() if expected.numel() else 0.0
    # An entry of the product may cancel; what is rounded is as large as the sum of its absolute values.
    largest = max(largest, (x.double().abs() @ dense.abs().mT).max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCES[dtype] * largest)
    torch.testing.assert_close(matrix(x), y, rtol=0, atol=0)


@every_size
@given(data=st.data())
@laws
def test_matmul_does_not_depend_on_memory_layout(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    factors = draw_factors(data, structure, case)
    x = draw_normal(data, case.in_features, 5).mT
    torch.testing.assert_close(structure.multiply(factors, x), x @ structure.expand(factors).mT)


@every_size
@given(data=st.data())
@laws
def test_all_gradients_equal_those_through_the_dense_matrix(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    leading = data.draw(st.sampled_from(LEADING_SHAPES), label="leading")
    factors = draw_factors(data, structure, case)
    x = draw_normal(data, *leading, case.in_features).requires_grad_()
    inputs = [x, *learnable(factors).values()]
    y = structure.multiply(factors, x)
    upstream = draw_normal(data, *y.shape)
    found = torch.autograd.grad(y, inputs, upstream)
    expected = torch.autograd.grad(x @ structure.expand(factors).mT, inputs, upstream)
    for one, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(one, reference, rtol=1e-10, atol=1e-10)


@every_size
def test_gradcheck(structure: Structure) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 6), (6, 4)):
        for spec in structure.candidate_specs(*shape, 14):
            shapes = structure.factor_shapes(*shape, spec)
            inputs = [
                torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
                for size in ((2, shape[1]), *shapes.values())
            ]

            orders = {name: torch.arange(size).flip(0) for name, size in structure.order_sizes(*shape, spec).items()}

            def multiply(
                x: Tensor, *factors: Tensor, names: tuple[str, ...] = tuple(shapes), orders: Any = orders
            ) -> Tensor:
                return structure.multiply({**dict(zip(names, factors, strict=True)), **orders}, x)

            assert torch.autograd.gradcheck(multiply, inputs, fast_mode=True)


# ---- ways of computing ----


@every_structure
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(data=st.data())
@laws
def test_every_way_equals_the_dense_product_and_adds_the_bias(
    structure: Structure, dtype: torch.dtype, data: st.DataObject
) -> None:
    case = draw_case(data, structure)
    leading = data.draw(st.sampled_from(LEADING_SHAPES), label="leading")
    factors = {
        name: each.to(dtype) if each.is_floating_point() else each
        for name, each in draw_factors(data, structure, case).items()
    }
    x, bias = draw_normal(data, *leading, case.in_features).to(dtype), draw_normal(data, case.out_features).to(dtype)
    doubles = {name: each.double() for name, each in factors.items() if each.is_floating_point()}
    w = structure.expand({**factors, **doubles})
    for added in (bias, None):
        constant = torch.zeros(case.out_features, dtype=torch.float64) if added is None else added.double()
        expected = x.double() @ w.mT + constant
        largest = max([1.0, *(x.double().abs() @ w.abs().mT + constant.abs()).flatten().tolist()])
        # What a way rounds on its way is as large as the products of the factors' absolute values.
        absolute = structure.expand({**factors, **{name: each.abs() for name, each in doubles.items()}})
        largest = max([largest, *(x.double().abs() @ absolute.mT).flatten().tolist()])
        with torch.no_grad():
            found = {
                "factors": structure.multiply(factors, x, added),
                "dense": torch.nn.functional.linear(x, structure.dense(factors), added),
            }
            if structure.takes_native(factors, x, added):
                found["native"] = structure.multiply_native(factors, x, added)
        found["training"] = structure.multiply(
            {name: each.clone().requires_grad_(each.is_floating_point()) for name, each in factors.items()}, x, added
        ).detach()
        for y in found.values():
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCES[dtype] * largest)


@every_structure
@given(data=st.data())
@laws
def test_the_dense_weight_built_fast_is_the_expanded_one(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    factors = draw_factors(data, structure, case)
    built = structure.dense(factors)
    assert built.is_contiguous()
    torch.testing.assert_close(built, structure.expand(factors), rtol=1e-12, atol=1e-12)


@every_structure
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(data=st.data())
@laws
def test_all_gradients_of_a_layer_are_near_those_through_the_dense_matrix(
    structure: Structure, dtype: torch.dtype, data: st.DataObject
) -> None:
    case = draw_case(data, structure)
    tokens = data.draw(st.sampled_from([1, 2, 5]), label="tokens")
    exact = {
        name: each.to(dtype).double() if each.is_floating_point() else each
        for name, each in draw_factors(data, structure, case).items()
    }
    x = draw_normal(data, tokens, case.in_features).to(dtype)
    upstream = draw_normal(data, tokens, case.out_features).to(dtype)
    matrix = structure(*case.shape, case.spec, dtype=dtype)
    matrix.load_state_dict(exact)
    layer = StructuredLinear(matrix, torch.zeros(case.out_features, dtype=dtype))
    x_in = x.clone().requires_grad_()
    names = list(structure.factor_shapes(*case.shape, case.spec))
    found = torch.autograd.grad(
        layer(x_in), [x_in, *(layer.get_parameter(name) for name in (*names, "bias"))], upstream
    )

    def reference(x: Tensor, upstream: Tensor, factors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, parts = x.clone().requires_grad_(), learnable({name: each.clone() for name, each in factors.items()})
        bias = torch.zeros(case.out_features, dtype=torch.float64, requires_grad=True)
        y = x @ structure.expand({**factors, **parts}).mT + bias
        return torch.autograd.grad(y, [x, *(parts[name] for name in names), bias], upstream)

    expected = reference(x.double(), upstream.double(), exact)
    absolute = {name: each.abs() if each.is_floating_point() else each for name, each in exact.items()}
    sizes = reference(x.double().abs(), upstream.double().abs(), absolute)
    for one, wanted, size in zip(found, expected, sizes, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), wanted, rtol=0, atol=TOLERANCES[dtype] * (1 + size.max().item()))


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *made])
        return result


@every_structure
def test_training_forms_neither_the_dense_matrix_nor_its_gradient(structure: Structure) -> None:
    shape, tokens = (96, 48), 3
    for spec in structure.candidate_specs(*shape, 96 * 48 // 4):
        if structure.num_paths(spec) > 6:  # what lies between its factors may be as large as W for so few tokens
            continue
        layer = StructuredLinear(structure(*shape, spec), torch.zeros(96))
        with Largest() as seen:
            layer(torch.randn(tokens, 48, requires_grad=True)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        assert seen.numel < 96 * 48, spec


# ---- holding factors ----


@every_size
@given(data=st.data())
@laws
def test_parameters_are_the_declared_factors_and_weight_has_three_dimensions(
    structure: Structure, data: st.DataObject
) -> None:
    case = draw_case(data, structure)
    matrix = structure(*case.shape, case.spec, dtype=torch.float64)
    shapes = {name: tuple(factor.shape) for name, factor in matrix.named_parameters()}
    assert shapes == structure.factor_shapes(*case.shape, case.spec)
    assert next(iter(shapes)) == "weight"
    assert len(shapes["weight"]) == 3
    assert {factor.dtype for factor in matrix.parameters()} == {torch.float64}
    assert matrix.to_dense().shape == case.shape
    numel = sum(factor.numel() for factor in matrix.parameters())
    assert structure.count_params(*case.shape, case.spec) == numel
    orders = {name: order.tolist() for name, order in matrix.named_buffers()}
    assert orders == {name: [*range(size)] for name, size in structure.order_sizes(*case.shape, case.spec).items()}
    assert list(matrix.factors) == [*shapes, *orders]


@every_size
@given(data=st.data())
@laws
def test_state_dict_goes_round_strictly(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    first, second = structure(*case.shape, case.spec), structure(*case.shape, case.spec)
    second.load_state_dict(first.state_dict(), strict=True)
    torch.testing.assert_close(second.to_dense(), first.to_dense(), rtol=0, atol=0)
    second.load_state_dict(structure.fit(draw_normal(data, *case.shape).float(), case.spec), strict=True)


class OnlyMeta(TorchDispatchMode):
    """Fails on the first operation that allocates outside the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert all(leaf.device.type == "meta" for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), func
        return result


@every_size
def test_meta_construction_allocates_nothing_and_takes_real_factors(structure: Structure) -> None:
    huge = structure.candidate_specs(2**20, 2**19, 2**34)[-1]
    with OnlyMeta():
        assert structure(2**20, 2**19, huge, device="meta").factors["weight"].is_meta
        structure.count_flops(2**20, 2**19, huge)
    weight = torch.randn(12, 8, dtype=torch.float64)
    for spec in specs_on(structure, 12, 8):
        matrix = structure(12, 8, spec, dtype=torch.float64, device="meta")
        assert all(factor.is_meta for factor in matrix.factors.values())
        assert matrix(torch.empty(3, 8, dtype=torch.float64, device="meta")).shape == (3, 12)
        matrix.to_empty(device="cpu").load_state_dict(structure.fit(weight, spec), strict=True)
        torch.testing.assert_close(matrix.to_dense(), structure.from_dense(weight, spec).to_dense(), rtol=0, atol=0)


@every_size
def test_random_factors_give_entries_of_variance_one_over_in_features(structure: Structure) -> None:
    torch.manual_seed(0)
    for shape in ((12, 8), (8, 12)):
        for spec in specs_on(structure, *shape):
            draws = torch.stack([structure(*shape, spec).to_dense().detach() for _ in range(300)])
            assert draws.square().mean().item() * shape[1] == pytest.approx(1, rel=0.3), spec


@every_size
def test_a_structured_linear_owns_the_factors_and_adds_the_bias(structure: Structure) -> None:
    x, bias = torch.randn(2, 3, 8), torch.randn(12)
    for spec in specs_on(structure, 12, 8):
        matrix = structure(12, 8, spec)
        layer = StructuredLinear(matrix, bias)
        assert set(layer.state_dict()) == {*matrix.state_dict(), "bias"}
        assert all(layer.get_parameter(name) is factor for name, factor in matrix.named_parameters())
        torch.testing.assert_close(layer(x), x @ matrix.to_dense().mT + bias)
        torch.testing.assert_close(layer.to_dense(), matrix.to_dense(), rtol=0, atol=0)
        without = StructuredLinear(matrix)
        assert without.bias is None
        assert set(without.state_dict()) == set(matrix.state_dict())
        torch.testing.assert_close(without(x), matrix(x), rtol=0, atol=0)
        for shown in (repr(matrix), repr(layer)):
            assert "12, 8" in shown
            assert repr(spec) in shown


# ---- counting ----


@every_size
@given(data=st.data())
@laws
def test_flops_are_those_of_a_real_call_and_grow_with_the_tokens_alone(
    structure: Structure, data: st.DataObject
) -> None:
    case = draw_case(data, structure)
    tokens = data.draw(st.integers(1, 5))
    matrix = structure(*case.shape, case.spec)
    with FlopCounterMode(display=False) as counter:
        matrix.matmul(torch.randn(tokens, case.in_features))
    # What is multiplied number by number torch does not count.
    missed = 2 * matrix.middle.numel() if structure is Blast else 0
    assert counter.get_total_flops() == tokens * (structure.count_flops(*case.shape, case.spec) - missed) > 0


# ---- specs ----


@every_size
@given(data=st.data())
@laws
def test_specs_are_frozen_strict_hashable_and_survive_json(structure: Structure, data: st.DataObject) -> None:
    spec = draw_case(data, structure).spec
    assert type(spec) is structure.Spec
    assert structure.Spec.model_validate_json(spec.model_dump_json()) == spec
    assert structure.Spec(**spec.model_dump(mode="json")) == spec
    assert len({spec, structure.Spec(**dict(spec))}) == 1
    for field, value in spec:
        with pytest.raises(ValidationError):
            setattr(spec, field, value)
        if isinstance(value, int):
            for wrong in (0, -1, value + 0.5):
                with pytest.raises(ValidationError):
                    resized(spec, **{field: wrong})
    with pytest.raises(ValidationError):
        resized(spec, no_such_field=1)


def entry_points(structure: Structure, shape: tuple[int, int], spec: Any) -> list[Any]:
    """Everything that takes a spec beside a shape."""
    weight = torch.zeros(shape)
    return [
        lambda: structure.factor_shapes(*shape, spec),
        lambda: structure(*shape, spec),
        lambda: structure(*shape, spec, device="meta"),
        lambda: structure.fit(weight, spec),
        lambda: structure.from_dense(weight, spec),
        lambda: structure.count_params(*shape, spec),
        lambda: structure.count_flops(*shape, spec),
    ]


@every_size
@given(data=st.data())
@laws
def test_a_spec_either_fits_a_shape_or_is_refused_everywhere(structure: Structure, data: st.DataObject) -> None:
    case = draw_case(data, structure)
    shape = tuple(data.draw(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)), label="another shape"))
    calls = entry_points(structure, shape, case.spec)
    try:
        structure.factor_shapes(*shape, case.spec)
    except RequestError:
        for call in calls:
            with pytest.raises(RequestError):
                call()
    else:
        for call in calls:
            call()
        assert structure(*shape, case.spec).to_dense().shape == shape


@every_size
def test_a_count_beyond_the_shape_is_refused_everywhere(structure: Structure) -> None:
    field = free_count(structure)
    for spec in specs_on(structure, 12, 8):
        for call in entry_points(structure, (12, 8), resized(spec, **{field: 97})):
            with pytest.raises(RequestError, match="97"):
                call()


# ---- candidates ----


@every_size
@given(data=st.data())
@laws
def test_candidates_fit_the_shape_and_the_budget_and_leave_no_room(structure: Structure, data: st.DataObject) -> None:
    case, field = draw_case(data, structure), free_count(structure)
    specs = structure.candidate_specs(*case.shape, case.max_params)
    assert len(set(specs)) == len(specs)
    for spec in specs:
        assert structure.count_params(*case.shape, spec) <= case.max_params
        more = resized(spec, **{field: getattr(spec, field) + 1})
        try:
            assert structure.count_params(*case.shape, more) > case.max_params
        except RequestError:
            continue


@every_size
@given(data=st.data())
@laws
def test_a_larger_budget_loses_no_candidate(structure: Structure, data: st.DataObject) -> None:
    case, field = draw_case(data, structure), free_count(structure)
    larger = structure.candidate_specs(*case.shape, case.max_params + data.draw(st.integers(1, 100)))
    counts = {others(spec, field): getattr(spec, field) for spec in larger}
    for spec in structure.candidate_specs(*case.shape, case.max_params):
        assert counts[others(spec, field)] >= getattr(spec, field)


@every_size
@given(data=st.data())
@laws
def test_a_fixed_count_is_kept_and_needs_no_budget(structure: Structure, data: st.DataObject) -> None:
    case, field = draw_case(data, structure), free_count(structure)
    fixed = {field: getattr(case.spec, field)}
    assert case.spec in structure.candidate_specs(*case.shape, case.max_params, **fixed)
    unbounded = structure.candidate_specs(*case.shape, **fixed)
    assert case.spec in unbounded
    assert {getattr(spec, field) for spec in unbounded} == set(fixed.values())
    size = structure.count_params(*case.shape, case.spec)
    assert case.spec not in structure.candidate_specs(*case.shape, size - 1, **fixed)


@every_size
def test_candidates_of_no_budget_at_all_are_refused(structure: Structure) -> None:
    free_count(structure)
    with pytest.raises(RequestError, match="budget"):
        structure.candidate_specs(12, 8)


@every_size
def test_a_fixed_count_beyond_the_shape_is_refused(structure: Structure) -> None:
    with pytest.raises(RequestError, match="97"):
        structure.candidate_specs(12, 8, **{free_count(structure): 97})


@every_size
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (7, 1), (1, 7)], ids=str)
def test_the_smallest_shapes_have_candidates_that_fit_or_none(structure: Structure, shape: tuple[int, int]) -> None:
    for spec in structure.candidate_specs(*shape, 100):
        assert structure(*shape, spec).to_dense().shape == shape
