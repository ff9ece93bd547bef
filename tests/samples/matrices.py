"""Matrices that a seed determines, in double precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import kronpress as kp
from kronpress.matrices.metric import Metric


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def singular_moment(seed: int, size: int) -> Tensor:
    """A second moment (size, size) that is far from diagonal, and singular."""
    x = normal(seed, 3 * size, max(1, size - 1)) @ normal(seed + 1, max(1, size - 1), size)
    return x.mT @ x / len(x)


def order_within(labels: Tensor, seed: int = 0) -> Tensor:
    """A permutation of units (size,) inside each label."""
    numbers, order = generator(seed), torch.arange(len(labels))
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        order[members] = members[torch.randperm(len(members), generator=numbers)]
    return order


def orthogonal(seed: int, size: int, keeps_ones: bool = False) -> Tensor:
    """Any orthogonal matrix (size, size), or by a basis of the complement of the ones any that keeps them."""
    if not keeps_ones:
        return torch.linalg.qr(normal(seed, size, size)).Q
    basis = complement_of_ones(size)
    return 1 / size + basis @ orthogonal(seed, size - 1) @ basis.mT


def complement_of_ones(size: int) -> Tensor:
    """An orthonormal basis (size, size − 1)."""
    start = torch.eye(size, dtype=torch.float64)
    start[:, 0] = 1
    return torch.linalg.qr(start).Q[:, 1:]


def kronecker_fit(left_shape: tuple[int, int], right_shape: tuple[int, int]) -> Callable[[Tensor, Metric], Tensor]:
    """A weight and its metric -> the nearest product of these sizes, as a `Target` of a rotation is fitted."""
    structure = kp.matrices.STRUCTURES["kronecker"]
    spec = structure.Spec(left_shape=left_shape, right_shape=right_shape)

    def fit(weight: Tensor, metric: Metric) -> Tensor:
        return structure.expand(structure.fit(weight, spec, None if metric == Metric() else metric))

    return fit
