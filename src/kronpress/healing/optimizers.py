"""Optimisers by their names in a recipe, and which parameters they step at which rates.

Bytes of state for each number of a matrix (m, n) in single precision:

| name | state | bytes |
|---|---|---|
| `adamw` | two moments | 8 |
| `adamw-bfloat16` | two moments in 16 bits, rounded at random | 4 |
| `adamw-8bit` | two moments in 8 bits with a scale for each 256 of them (torchao) | 2.03 |
| `adafactor` | the second moment's means of rows and of columns | 4 (m + n) / (m n) |
| `muon` | one moment; of embeddings and head the two of `adamw` | 4; 8 |

Vectors have the two moments in single precision, with `adafactor` one. A factor is the batch of matrices that
`StructuredMatrix.linear_dims` says it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kronpress.errors import RequestError
from kronpress.healing.rates import Multipliers, rate_multipliers
from kronpress.recipe import Healing
from kronpress.surgery import embeddings, is_embedding, structured_layers

Groups = list[dict[str, Any]]
# The dimensions of a parameter that are the rows and the columns of matrices, of which it is a batch; None: a vector.
Dims = tuple[int, int] | None

# As Trainer sets them.
BETAS, EPSILON = (0.9, 0.999), 1e-8
# Of Adafactor (Shazeer & Stern 2018, arXiv 1804.04235), without momentum, and with rates as they are given.
DECAY_POWER, LEAST_SQUARE, LARGEST_RMS = 0.8, 1e-30, 1.0
# Of Muon (Jordan et al. 2024): five iterations of this quintic bring nearly all singular values to between 0.7 and 1.2,
MUON_MOMENTUM, QUINTIC, NUM_ITERATIONS = 0.95, (3.4445, -4.7750, 2.0315), 5
# and a step is as large as one of AdamW, so that the same rates suit both (Liu et al. 2025, arXiv 2502.16982).
MUON_RMS = 0.2


# ---- which parameters ----


def parameter_groups(model: nn.Module, healing: Healing, rate: float) -> Groups:
    """The parameters that are trained, as `torch.optim` takes them: those of a kind together, each factor by itself.

    The first two groups have the rate itself, and may be empty: what decays, and vectors, which do not. All that makes
    a group what it is, is in it, so that a checkpoint keeps it.

    Args:
        rate: that of a dense weight.
    """
    factors = rate_multipliers(model, healing.rates)
    dims, rows = matrix_dims(model), {id(each) for each in _tables(model)}
    groups: dict[Any, dict[str, Any]] = {}

    def group(multipliers: Multipliers, own: str = "", dims: Dims = None, rule: str = "adamw") -> list[nn.Parameter]:
        new = {
            "params": [],
            "lr": rate * multipliers.rate,
            "weight_decay": healing.weight_decay * multipliers.decay,
            "rate_multiplier": multipliers.rate,
            "decay_multiplier": multipliers.decay,
            "dims": dims,
            "rule": rule,
        }
        return groups.setdefault((multipliers, own, dims, rule), new)["params"]  # type: ignore[no-any-return]

    for decay in (1.0, 0.0):
        group(Multipliers(decay=decay))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = Multipliers(decay=float(parameter.ndim >= 2))
        rule, its_dims = _rule(healing.optimizer, dims.get(name), id(parameter) in rows)
        group(factors.get(name, plain), name if name in factors else "", its_dims, rule).append(parameter)
    return list(groups.values())


def matrix_dims(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of each parameter that is a matrix, or a batch of them, which of its dimensions are the rows and the columns."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: (0, 1) for name, parameter in model.named_parameters() if parameter.ndim == 2}
    for layer in structured_layers(model).values():
        dims = layer.structure.linear_dims(layer.out_features, layer.in_features, layer.spec)
        for name, parameter in layer.named_parameters():
            # `weight` has another name where it is trained through a parametrization.
            factor = "weight" if name.startswith("parametrizations.weight.") else name
            if factor in dims and parameter.ndim > max(dims[factor]):
                found[names[id(parameter)]] = dims[factor]
    return found


def _tables(model: nn.Module) -> Iterator[nn.Parameter]:
    """All of embeddings and of the head, of whose rows each is that of a token."""
    layers = [*embeddings(model).values(), *filter(is_embedding, structured_layers(model).values())]
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        layers.append(head)
    for layer in layers:
        yield from layer.parameters()


def _rule(optimizer: str, dims: Dims, is_of_table: bool) -> tuple[str, Dims]:
    """By which rule of DIRECTIONS a parameter is stepped, and as which matrices."""
    match optimizer:
        case "muon" if dims is None or is_of_table:
            return "adamw", None
        case "muon" | "adafactor":
            return optimizer, dims
        case "adamw-bfloat16" if dims is not None:
            return optimizer, None
    return "adamw", None


# ---- the optimisers ----


def make_optimizer(name: str, groups: Groups, **adamw: Any) -> torch.optim.Optimizer:
    """The optimiser of this name, over groups as `parameter_groups` makes them for it.

    Args:
        adamw: further arguments of `torch.optim.AdamW`, which only that one takes.

    Raises:
        RequestError: an optimiser that needs a package that is not installed, or whole matrices where they are split
            over processes.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        raise RequestError(
            f"healing.optimizer {name!r} with weights split over processes: only adamw can, or unset healing.sharded"
        )
    if name == "adamw-8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise RequestError(
                "healing.optimizer 'adamw-8bit' needs the package torchao, which is not installed; adamw-bfloat16, "
                "adafactor and muon are lean without it"
            ) from error
        return AdamW8bit(groups, betas=BETAS, eps=EPSILON)  # type: ignore[no-any-return]
    return ByRule(groups)


class ByRule(torch.optim.Optimizer):
    """θ ← (1 − η λ) θ − η d, with the direction d of each parameter by its group's `rule`, one of DIRECTIONS.

    A training that is resumed goes on bit for bit: what is drawn at random follows from the number of the step.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "dims": None, "rule": "adamw"})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            direction = DIRECTIONS[group["rule"]]
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["number"] = number
                towards = direction(parameter.grad.float(), state, group["dims"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(towards.to(parameter.dtype), alpha=-group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # The base class casts all state to the dtype of the parameter.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimiser keeps of its parameters."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(_bytes(value) for value in values if isinstance(value, Tensor))


def _bytes(value: Tensor) -> int:
    if hasattr(value, "__tensor_flatten__"):  # a quantised one, of several
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


# ---- directions: of the gradient in single precision, and the state of the steps before, which they change ----


def adamw_direction(gradient: Tensor, state: dict[str, Any], dims: Dims) -> Tensor:
    """m̂ / (√v̂ + ε) (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    if "mean" not in state:
        state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["mean"].lerp_(gradient, 1 - BETAS[0])
    state["square"].lerp_(gradient.square(), 1 - BETAS[1])
    return _corrected(state["mean"], state["square"], state["step"])


def adamw_bfloat16_direction(gradient: Tensor, state: dict[str, Any], dims: Dims) -> Tensor:
    """The same with moments of 16 bits, each rounded up or down at random so that its expectation is kept.

    To the nearest, v would never fall: a thousandth of it is less than half of its last bit.
    """
    mean, square = torch.zeros_like(gradient), torch.zeros_like(gradient)
    if "mean" in state:
        mean, square = state["mean"].float(), state["square"].float()
    mean = mean.lerp(gradient, 1 - BETAS[0])
    square = square.lerp(gradient.square(), 1 - BETAS[1])
    generator = torch.Generator(gradient.device).manual_seed(1_000_003 * state["step"] + state["number"])
    state["mean"], state["square"] = (rounded_at_random(each, generator) for each in (mean, square))
    return _corrected(mean, square, state["step"])


def _corrected(mean: Tensor, square: Tensor, step: int) -> Tensor:
    root = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    return mean / (1 - BETAS[0] ** step) / root


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """In bfloat16: up or down to one of its two neighbours, with the probabilities by which the mean is `values`."""
    bits = values.contiguous().view(torch.int32)
    below = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return ((bits + below) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def adafactor_direction(gradient: Tensor, state: dict[str, Any], dims: Dims) -> Tensor:
    """g / √v̂ with v̂[i, j] = r[i] c[j] / mean(r), r and c the means of g² over a row and over a column.

    The mean over time has β = 1 − t^-0.8, and an RMS above 1 is brought to 1.
    """
    weight = state["step"] ** -DECAY_POWER
    square = gradient.square().add_(LEAST_SQUARE)
    if dims is None:
        state["square"] = square if "square" not in state else state["square"].lerp(square, weight)
        towards = gradient * state["square"].rsqrt()
    else:
        matrices, squares = _matrices(gradient, dims), _matrices(square, dims)
        for name, dim in (("rows", -1), ("columns", -2)):
            means = squares.mean(dim, keepdim=True)
            state[name] = means if name not in state else state[name].lerp(means, weight)
        rows = state["rows"] / state["rows"].mean(-2, keepdim=True)
        towards = _from_matrices(matrices * rows.rsqrt() * state["columns"].rsqrt(), dims)
    return towards / (towards.square().mean().sqrt() / LARGEST_RMS).clamp(min=1)


def muon_direction(gradient: Tensor, state: dict[str, Any], dims: Dims) -> Tensor:
    """X Yᵀ of every matrix M = X Σ Yᵀ, M the gradient with Nesterov momentum, about; its RMS is MUON_RMS."""
    assert dims is not None
    if "mean" not in state:
        state["mean"] = torch.zeros_like(gradient)
    state["mean"].lerp_(gradient, 1 - MUON_MOMENTUM)
    matrices = _matrices(gradient.lerp(state["mean"], MUON_MOMENTUM), dims)
    scale = MUON_RMS * max(matrices.shape[-2:]) ** 0.5
    return _from_matrices(scale * orthogonalised(matrices), dims)


def orthogonalised(matrices: Tensor) -> Tensor:
    """X Yᵀ of each of a batch (…, rows, columns) of matrices X Σ Yᵀ, but with singular values of about 0.7 to 1.2.

    M ← a M + (b M Mᵀ + c (M Mᵀ)²) M five times, from ‖M‖ = 1. In bfloat16 on a GPU, which is enough for it.
    """
    a, b, c = QUINTIC
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    m = matrices.mT if is_tall else matrices
    m = m / torch.linalg.matrix_norm(m, keepdim=True).clamp(min=1e-20)
    m = m.to(torch.bfloat16 if m.is_cuda else torch.float32)
    for _ in range(NUM_ITERATIONS):
        gram = m @ m.mT
        m = a * m + (b * gram + c * gram @ gram) @ m
    return (m.mT if is_tall else m).to(matrices.dtype)


def _matrices(tensor: Tensor, dims: tuple[int, int]) -> Tensor:
    return tensor.movedim(dims, (-2, -1))


def _from_matrices(matrices: Tensor, dims: tuple[int, int]) -> Tensor:
    return matrices.movedim((-2, -1), dims)


DIRECTIONS: dict[str, Callable[[Tensor, dict[str, Any], Dims], Tensor]] = {
    "adamw": adamw_direction,
    "adamw-bfloat16": adamw_bfloat16_direction,
    "adafactor": adafactor_direction,
    "muon": muon_direction,
}
