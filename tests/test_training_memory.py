"""What training through factors keeps for the backward pass, and what it never forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import kronpress as kp
from kronpress.matrices import Kronecker, LowRank

TOKENS = 64
SMALL_RIGHT = [((1, 2), 1), ((2, 1), 1), ((2, 2), 1), ((4, 2), 1), ((2, 2), 3)]


def saved_numel(layer: kp.StructuredLinear, x: Tensor) -> int:
    """Numbers kept from the forward to the backward pass, each memory once, parameters and x left out."""
    own = {part.untyped_storage().data_ptr() for part in (x, *layer.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


@pytest.mark.parametrize("is_left_small", [False, True])
@pytest.mark.parametrize(("small", "terms"), SMALL_RIGHT, ids=str)
def test_a_kronecker_layer_keeps_no_more_than_what_lies_between_its_factors(
    small: tuple[int, int], terms: int, is_left_small: bool
) -> None:
    out_features, in_features = 96, 48
    large = out_features // small[0], in_features // small[1]
    left, right = (small, large) if is_left_small else (large, small)
    spec = Kronecker.Spec(left_shape=left, right_shape=right, num_terms=terms)
    layer = kp.StructuredLinear(Kronecker(out_features, in_features, spec), torch.zeros(out_features))
    x = torch.randn(TOKENS, in_features, requires_grad=True)
    # After the first factor a token is terms·m2·n1 or terms·m1·n2 numbers, and x may be kept in the other order.
    between = terms * max(right[0] * left[1], left[0] * right[1])
    assert saved_numel(layer, x) <= TOKENS * (between + in_features)


def test_low_rank_keeps_what_lies_between_its_factors() -> None:
    layer = kp.StructuredLinear(LowRank(96, 48, LowRank.Spec(rank=8)), torch.zeros(96))
    assert saved_numel(layer, torch.randn(TOKENS, 48, requires_grad=True)) <= TOKENS * 8


def test_what_is_not_trained_keeps_nothing() -> None:
    spec = Kronecker.Spec(left_shape=(48, 24), right_shape=(2, 2))
    layer = kp.StructuredLinear(Kronecker(96, 48, spec)).requires_grad_(False)
    assert saved_numel(layer, torch.randn(TOKENS, 48)) == 0
