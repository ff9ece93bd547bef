"""Tensor trains: contraction orders, both backward passes, TT-SVD beside tensorly's, fits to inputs, from scratch."""

from __future__ import annotations

import itertools
import json
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from samples.matrices import normal
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

import kronpress as kp
from kronpress import RequestError
from kronpress.matrices import Kronecker, TensorTrain
from kronpress.matrices.metric import Metric
from kronpress.matrices.tensor_train import (
    Whitened,
    alternate,
    balanced_shapes,
    contracted,
    contraction,
    truncated,
)

laws = settings(max_examples=30, deadline=None)
few = settings(max_examples=12, deadline=None)
small = st.integers(1, 4)
seeds = st.integers(0, 2**32)
ROOT = Path(__file__).parents[1]


@st.composite
def specs(draw: st.DrawFn, least: int = 2, most: int = 4) -> Any:
    num_cores = draw(st.integers(least, most), label="cores")
    shapes = tuple((draw(small), draw(small)) for _ in range(num_cores))
    sizes = [m * n for m, n in shapes]
    full = max(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, num_cores))
    return TensorTrain.Spec(core_shapes=shapes, rank=draw(st.integers(1, min(full, 5)), label="rank"))


def shape_of(spec: Any) -> tuple[int, int]:
    m, n = (prod(sizes) for sizes in zip(*spec.core_shapes, strict=True))
    return m, n


def random_factors(seed: int, spec: Any) -> dict[str, Tensor]:
    shapes = TensorTrain.factor_shapes(*shape_of(spec), spec)
    return {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def moment(seed: int, size: int) -> Tensor:
    x = normal(seed, 3 * size, size) * torch.logspace(0, -1, size, dtype=torch.float64)
    mix = torch.linalg.qr(normal(seed + 1, size, size)).Q
    return mix @ (x.mT @ x) @ mix.mT / (3 * size)


def in_four_dimensions(factors: dict[str, Tensor]) -> list[Tensor]:
    first, *middle, last = factors.values()
    return [first[None], *middle, last[..., None]]


def by_entries(spec: Any, factors: dict[str, Tensor]) -> Tensor:
    """W from its definition, one product of small matrices for every entry."""
    cores = in_four_dimensions(factors)
    rows, columns = (list(itertools.product(*map(range, sizes))) for sizes in zip(*spec.core_shapes, strict=True))
    w = torch.empty(len(rows), len(columns), dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            value = torch.eye(1, dtype=torch.float64)
            for core, a, b in zip(cores, row, column, strict=True):
                value = value @ core[:, a, b]
            w[i, j] = value.item()
    return w


def error(weight: Tensor, spec: Any, metric: Metric, moments: Metric | None) -> float:
    return metric.squared_norm(weight - TensorTrain.expand(TensorTrain.fit(weight, spec, moments)))


# ---- what it is ----


@given(spec=specs(), seed=seeds)
@few
def test_an_entry_is_the_product_of_one_matrix_of_each_core(spec: Any, seed: int) -> None:
    factors = random_factors(seed, spec)
    expected = by_entries(spec, factors)
    torch.testing.assert_close(TensorTrain.expand(factors), expected)
    x, bias = normal(seed + 9, 3, expected.shape[1]), normal(seed + 8, expected.shape[0])
    torch.testing.assert_close(TensorTrain.multiply(factors, x, bias), x @ expected.mT + bias)
    indices = torch.tensor([[0, len(expected) - 1], [len(expected) // 2, 0]])
    torch.testing.assert_close(TensorTrain.rows(factors, indices), expected[indices])


@given(spec=specs())
@laws
def test_every_rank_is_the_specs_or_the_most_that_its_unfolding_can_have(spec: Any) -> None:
    sizes = [m * n for m, n in spec.core_shapes]
    shapes = list(TensorTrain.factor_shapes(*shape_of(spec), spec).values())
    ranks = [shape[-1] for shape in shapes[:-1]]
    assert ranks == [min(spec.rank, prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]
    assert [shape[0] for shape in shapes[1:]] == ranks
    assert TensorTrain.num_paths(spec) == prod(ranks)


def test_core_shapes_of_another_matrix_are_refused_with_both_shapes() -> None:
    with pytest.raises(RequestError, match=r"core_shapes 2×3 · 4×1 make 8×3, not the matrix's 8×6"):
        TensorTrain.factor_shapes(8, 6, TensorTrain.Spec(core_shapes=((2, 3), (4, 1)), rank=1))
    with pytest.raises(RequestError, match=r"rank 5 with core_shapes 2×3 · 4×1: 4 already represents every matrix"):
        TensorTrain.factor_shapes(8, 3, TensorTrain.Spec(core_shapes=((2, 3), (4, 1)), rank=5))


# ---- multiplying ----


def cost_of(order: tuple[int, ...], shapes: list[tuple[int, ...]]) -> int:
    """Multiply-adds of one token, counted by indices: those that are open or summed over in each step."""
    used: set[int] = set()
    total = 0
    for k in order:
        after = used | {k}
        open_columns = prod(shape[2] for j, shape in enumerate(shapes) if j not in used)
        rows = prod(shapes[j][1] for j in after)
        # Bonds with exactly one end among the cores used, and those that this core closes.
        bonds = prod(shapes[j][0] for j in range(1, len(shapes)) if (j in after) != (j - 1 in after) or j in (k, k + 1))
        total += open_columns * rows * bonds
        used = after
    return total


@given(spec=specs(2, 5))
@laws
def test_the_order_is_the_cheapest_of_all_and_the_counted_flops_are_its(spec: Any) -> None:
    shapes = TensorTrain.factor_shapes(*shape_of(spec), spec)
    empty = {name: torch.empty(shape) for name, shape in shapes.items()}
    cores = [tuple(core.shape) for core in in_four_dimensions(empty)]
    costs = {order: cost_of(order, cores) for order in itertools.permutations(range(len(cores)))}
    taken = tuple(step.core for step in contraction(tuple(shapes.values()))[0])
    assert costs[taken] == min(costs.values())
    assert TensorTrain.count_flops(*shape_of(spec), spec) == 2 * min(costs.values())


@given(spec=specs(), seed=seeds, tokens=st.integers(0, 3))
@laws
def test_the_backward_pass_from_the_input_alone_gives_autograds_values_and_gradients(
    spec: Any, seed: int, tokens: int
) -> None:
    factors = random_factors(seed, spec)
    inputs = [normal(seed + 9, tokens, shape_of(spec)[1]), *factors.values()]
    for each in inputs:
        each.requires_grad_()
    lean = TensorTrain.multiply(factors, inputs[0])
    plain = contracted(inputs[0], list(factors.values()))
    torch.testing.assert_close(lean, plain, rtol=0, atol=0)
    upstream = normal(seed + 10, *plain.shape)
    for found, expected in zip(
        torch.autograd.grad(lean, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients() -> None:
    spec = TensorTrain.Spec(core_shapes=((2, 2), (1, 3), (2, 2)), rank=2)
    factors = random_factors(0, spec)
    inputs = [normal(7, 2, 12).requires_grad_(), *(factor.requires_grad_() for factor in factors.values())]

    def multiply(x: Tensor, *cores: Tensor) -> Tensor:
        return TensorTrain.multiply(dict(zip(factors, cores, strict=True)), x)

    assert torch.autograd.gradcheck(multiply, inputs)
    assert torch.autograd.gradgradcheck(multiply, inputs)


@given(seed=seeds, wanted=st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
@few
def test_only_what_is_asked_for_gets_a_gradient(seed: int, wanted: list[bool]) -> None:
    spec = TensorTrain.Spec(core_shapes=((2, 2), (2, 3), (3, 2)), rank=3)
    factors = random_factors(seed, spec)
    inputs = [normal(seed + 9, 5, 12), *factors.values()]
    for each, is_wanted in zip(inputs, wanted, strict=True):
        each.requires_grad_(is_wanted)
    TensorTrain.multiply(factors, inputs[0]).square().sum().backward()
    found = [each.grad for each in inputs]
    dense = inputs[0] @ TensorTrain.expand(factors).mT
    chosen = [each for each in inputs if each.requires_grad]
    expected = iter(torch.autograd.grad(dense.square().sum(), chosen))
    for gradient, is_wanted in zip(found, wanted, strict=True):
        if is_wanted:
            torch.testing.assert_close(gradient, next(expected), rtol=1e-10, atol=1e-10)
        else:
            assert gradient is None


def kept_for_backward(multiply: Any) -> int:
    """Numbers in distinct storage that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        multiply()
    return sum(kept.values())


def test_of_a_product_only_the_input_and_the_cores_are_kept() -> None:
    spec = TensorTrain.Spec(core_shapes=((4, 4), (4, 4), (4, 4)), rank=8)
    factors = {name: factor.requires_grad_() for name, factor in random_factors(0, spec).items()}
    x = normal(1, 32, 64).requires_grad_()
    num_cores = sum(factor.numel() for factor in factors.values())
    assert kept_for_backward(lambda: TensorTrain.multiply(factors, x)) == x.numel() + num_cores
    assert kept_for_backward(lambda: contracted(x, list(factors.values()))) > 4 * x.numel() + num_cores


def test_mixed_precision_trains_in_the_lower_one() -> None:
    spec = TensorTrain.Spec(core_shapes=((4, 2), (2, 4), (2, 2)), rank=4)
    factors = {name: factor.float().requires_grad_() for name, factor in random_factors(0, spec).items()}
    x = normal(1, 6, 16).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = TensorTrain.multiply(factors, x)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *factors.values()])
    dense = x @ TensorTrain.expand(factors).mT
    expected = torch.autograd.grad(dense.square().sum(), [x, *factors.values()])
    for found, reference in zip(gradients, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, reference, rtol=0, atol=0.05 * reference.abs().max().item())


def test_it_is_compiled_as_one_graph_with_its_backward_pass() -> None:
    spec = TensorTrain.Spec(core_shapes=((4, 2), (2, 4), (2, 2)), rank=4)
    matrix, x = TensorTrain(16, 16, spec), normal(0, 5, 16).float()
    y = torch.compile(matrix.matmul, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, matrix.matmul(x))
    found, expected = (torch.autograd.grad(each.sum(), list(matrix.parameters())) for each in (y, matrix.matmul(x)))
    torch.testing.assert_close(found, expected)


# ---- fits ----


@given(spec=specs(2, 2), seed=seeds, weighted=st.booleans())
@laws
def test_two_cores_of_rank_k_are_k_kronecker_terms(spec: Any, seed: int, weighted: bool) -> None:
    m, n = shape_of(spec)
    weight = normal(seed, m, n)
    metric = Metric(moment(seed + 1, n), moment(seed + 2, m)) if weighted else None
    left_shape, right_shape = spec.core_shapes
    same = Kronecker.Spec(left_shape=left_shape, right_shape=right_shape, num_terms=TensorTrain.num_paths(spec))
    assert TensorTrain.count_params(m, n, spec) == Kronecker.count_params(m, n, same)
    assert TensorTrain.count_flops(m, n, spec) == Kronecker.count_flops(m, n, same)
    expected = Kronecker.expand(Kronecker.fit(weight, same, metric))
    torch.testing.assert_close(TensorTrain.expand(TensorTrain.fit(weight, spec, metric)), expected)


@given(spec=specs(3, 4), seed=seeds)
@few
def test_the_start_has_the_error_of_tensorlys_decomposition_and_the_fit_no_more(spec: Any, seed: int) -> None:
    tensorly = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    weight = normal(seed, *shape_of(spec))
    tensor = Whitened.of(weight, spec.core_shapes, Metric()).tensor
    ranks = [shape[-1] for shape in list(TensorTrain.factor_shapes(*weight.shape, spec).values())[:-1]]
    theirs = tensorly.tt_to_tensor(decomposition.tensor_train(tensor.numpy(), [1, *ranks, 1]))
    expected = (tensor - torch.from_numpy(theirs)).square().sum().item()
    start, *others = truncated(tensor, ranks)
    for core in others:
        start = torch.tensordot(start, core, 1)
    slack = 1e-9 * weight.square().sum().item()
    assert (tensor - start.reshape(tensor.shape)).square().sum().item() == pytest.approx(expected, abs=slack)
    assert error(weight, spec, Metric(), None) <= expected + slack
    # At most d − 1 times the least error, which is not below that of any one unfolding (Oseledets 2011).
    sides = [prod(tensor.shape[:k]) for k in range(1, tensor.ndim)]
    discarded = [
        torch.linalg.svdvals(tensor.reshape(side, -1))[rank:].square().sum().item()
        for side, rank in zip(sides, ranks, strict=True)
    ]
    assert max(discarded) - slack <= error(weight, spec, Metric(), None) <= sum(discarded) + slack


@given(spec=specs(3, 4), seed=seeds, sides=st.sampled_from(["input", "both", "frequencies"]))
@few
def test_the_alternation_never_rises_and_betters_what_the_inputs_see(spec: Any, seed: int, sides: str) -> None:
    m, n = shape_of(spec)
    weight, c = normal(seed, m, n), moment(seed + 1, n)
    output = {"input": None, "both": moment(seed + 2, m), "frequencies": normal(seed + 2, m).abs() + 1e-2}[sides]
    problem = Whitened.of(weight, spec.core_shapes, Metric(c, output))
    ranks = [shape[-1] for shape in list(TensorTrain.factor_shapes(m, n, spec).values())[:-1]]
    _, losses = alternate(problem, truncated(problem.tensor, ranks), tolerance=0)
    assert all(later <= earlier for earlier, later in pairwise(losses))
    if output is None:
        found = error(weight, spec, Metric(c), Metric(c))
        assert losses[0] * (1 + 1e-9) >= found - 1e-9 * Metric(c).squared_norm(weight)


@given(spec=specs(3, 3), seed=seeds, weighted=st.booleans())
@few
def test_changing_one_core_of_a_fit_never_lowers_the_error(spec: Any, seed: int, weighted: bool) -> None:
    m, n = shape_of(spec)
    weight, metric = normal(seed, m, n), Metric(moment(seed + 1, n) if weighted else None)
    problem = Whitened.of(weight, spec.core_shapes, metric)
    ranks = [shape[-1] for shape in list(TensorTrain.factor_shapes(m, n, spec).values())[:-1]]
    cores, _ = alternate(problem, truncated(problem.tensor, ranks), max_sweeps=300, tolerance=1e-10, solved=1e-12)
    names = TensorTrain.factor_shapes(m, n, spec)
    undone = [core.contiguous() for core in problem.undone(cores)]
    factors = {name: core.reshape(shape) for (name, shape), core in zip(names.items(), undone, strict=True)}
    least, energy = metric.squared_norm(weight - TensorTrain.expand(factors)), metric.squared_norm(weight)
    for i, (name, factor) in enumerate(factors.items()):
        direction = normal(seed + 3 + i, *factor.shape) * factor.norm() / max(factor.numel(), 1)
        for step in (1e-3, -1e-2, 0.3):
            changed = metric.squared_norm(weight - TensorTrain.expand({**factors, name: factor + step * direction}))
            assert changed >= least - 1e-6 * energy


def test_a_cores_equations_are_solved_exactly() -> None:
    """One step of the alternation beside dense least squares over all entries of that core."""
    spec = TensorTrain.Spec(core_shapes=((2, 3), (3, 2), (2, 2)), rank=3)
    weight, c = normal(0, 12, 12), moment(1, 12)
    problem = Whitened.of(weight, spec.core_shapes, Metric(c))
    start = truncated(problem.tensor, [3, 3])
    # The last core that a sweep renews is the second: with the others as they are now it is the best there is.
    cores, _ = alternate(problem, start, max_sweeps=1, solved=1e-13)
    named = dict(zip(TensorTrain.factor_shapes(12, 12, spec).items(), problem.undone(cores), strict=True))
    factors = {name: core.reshape(shape) for (name, shape), core in named.items()}
    root = torch.linalg.cholesky(c)
    columns = []
    for place in range(factors["core_2"].numel()):
        unit = torch.zeros(factors["core_2"].numel(), dtype=torch.float64)
        unit[place] = 1
        changed = {**factors, "core_2": unit.reshape(factors["core_2"].shape)}
        columns.append((TensorTrain.expand(changed) @ root).flatten())
    system, wanted = torch.stack(columns, dim=1), (weight @ root).flatten()
    best = system @ torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    found = (TensorTrain.expand(factors) @ root).flatten()
    torch.testing.assert_close(found, best, rtol=0, atol=1e-8)


@given(spec=specs(), seed=seeds)
@laws
def test_a_planted_train_is_found_in_any_metric(spec: Any, seed: int) -> None:
    m, n = shape_of(spec)
    planted = TensorTrain.expand(random_factors(seed, spec))
    torch.testing.assert_close(
        TensorTrain.expand(TensorTrain.fit(planted, spec)), planted, rtol=0, atol=1e-10 * (1 + planted.norm().item())
    )
    metric = Metric(moment(seed + 1, n), moment(seed + 2, m))
    assert error(planted, spec, metric, metric) <= 1e-10 * metric.squared_norm(planted)


@given(spec=specs(3, 4), seed=seeds)
@few
def test_the_cores_of_a_fit_have_equal_norms_and_no_large_entries(spec: Any, seed: int) -> None:
    weight = normal(seed, *shape_of(spec))
    factors = list(TensorTrain.fit(weight, spec).values())
    norms = torch.stack([factor.norm() for factor in factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


# ---- choosing ----


def test_cores_are_balanced_unless_their_shapes_are_given() -> None:
    assert balanced_shapes(50257, 768, 2) == ((29, 32), (1733, 24))
    [spec] = TensorTrain.candidate_specs(768, 3072, num_cores=3, rank=4)
    assert spec.core_shapes == ((8, 16), (8, 16), (12, 12))
    given_shapes = ((16, 8), (12, 12), (16, 8))
    for shape, expected in (((3072, 768), given_shapes), ((768, 3072), tuple((n, m) for m, n in given_shapes))):
        [spec] = TensorTrain.candidate_specs(*shape, core_shapes=given_shapes, rank=4)
        assert spec.core_shapes == expected
    with pytest.raises(RequestError, match="num_cores 1: a tensor train has at least 2"):
        TensorTrain.candidate_specs(8, 8, rank=1, num_cores=1)


@given(spec=specs(2, 4), room=st.integers(1, 400))
@laws
def test_the_largest_rank_within_the_budget_is_taken(spec: Any, room: int) -> None:
    shape = shape_of(spec)
    is_wide = shape[0] < shape[1]
    meant = tuple((n, m) for m, n in spec.core_shapes) if is_wide else spec.core_shapes
    found = TensorTrain.candidate_specs(*shape, room, core_shapes=meant)
    sizes = [m * n for m, n in spec.core_shapes]
    full = max(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes)))
    every = [TensorTrain.Spec(core_shapes=spec.core_shapes, rank=rank) for rank in range(1, full + 1)]
    affordable = [each for each in every if TensorTrain.count_params(*shape, each) <= room]
    assert found == affordable[-1:]


def test_screened_errors_are_below_those_of_the_fits() -> None:
    weight, metric = normal(0, 24, 24), Metric(moment(1, 24), moment(2, 24))
    screened = TensorTrain.screen(weight, Metric())
    assert {len(spec.core_shapes) for spec, *_ in screened} == {3, 4}
    for spec, estimate, is_exact in screened[:: max(1, len(screened) // 6)]:
        assert not is_exact
        assert estimate <= error(weight, spec, Metric(), None) + 1e-9
    spec = screened[0][0]
    assert TensorTrain.estimate(weight, spec, metric) <= metric.squared_norm(weight)


# ---- from scratch ----


@pytest.mark.parametrize("structure", ["tensor_train", "monarch", "kronecker", "low_rank"])
def test_a_model_of_random_structures_keeps_the_variance_of_the_outputs(structure: str, tiny_recipe: Any) -> None:
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=48, n_layer=1, n_head=2, initializer_range=0.05)
    torch.manual_seed(0)
    dense, x = AutoModelForCausalLM.from_config(config), torch.randn(4000, 48)
    ratios = []
    for seed in range(12):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        kp.initialise_(model, kp.make_plan(model, tiny_recipe(structure, targets="mlp")))
        layers = (each.get_submodule("transformer.h.0.mlp.c_fc") for each in (model, dense))
        with torch.no_grad():
            found, expected = (layer(x).square().mean().item() for layer in layers)
        ratios.append(found / expected)
    assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.25)


def test_a_tensor_train_model_of_a_given_geometry_is_trained_from_scratch(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    recipe = kp.load_recipe(
        {
            "targets": "mlp",
            "structure": "tensor_train",
            "spec": {"num_cores": 3, "rank": 4},
            "healing": {"max_steps": 60, "sequences_per_step": 8, "sequence_length": 16, "learning_rate": 0.01},
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    plan = kp.make_plan(config, recipe)
    kp.initialise_(model, plan)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.num_params
    # Each token is the one before plus three: what the MLPs have to learn.
    tokens = (torch.arange(4000) * 3) % 64
    log = kp.heal_(model, None, tokens, recipe.healing)
    losses = [row.loss for row in log.rows]
    assert losses[0] == pytest.approx(4.16, rel=0.1)  # log 64
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokens[None, :16]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)


# ---- what was measured ----


def test_the_page_quotes_the_committed_memory() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "tensor_train_memory.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "methods" / "tensor_train.md").read_text(encoding="utf-8")
    for row in results["rows"]:
        for way in ("autograd", "input_alone"):
            kept, peak = (f"{row[way][name] / 2**20:.1f}" for name in ("kept_bytes", "peak_bytes"))
            assert f"| {kept} | {peak} | {row[way]['processor_seconds']:.1f} |" in page


def test_the_pages_quote_the_committed_energies_and_the_plans_counts() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "structure_energies.json").read_text(encoding="utf-8"))
    for recipe, other in (("monarch", "cores"), ("tensor_train", "Monarch")):
        page = (ROOT / "docs" / "methods" / f"{recipe}.md").read_text(encoding="utf-8")
        for row in results["rows"]:
            figures = [f"{value:.3f}" for name, value in row.items() if name != "matrix" and other not in name]
            assert f"| {' | '.join(figures)} |" in page
        plan = kp.make_plan(GPT2Config(), kp.load_recipe({"tensor_train": "ttm"}.get(recipe, recipe)))
        assert f"{plan.num_params:,}" in page
        flops = {layer.flops_per_token / (2 * layer.num_params_dense) for layer in plan.layers.values()}
        assert recipe == "monarch" or f"{max(flops):.1f} times" in page
