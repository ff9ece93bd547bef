"""What a plan is: which module becomes which structure of which sizes, and what that does to size and FLOPs.

A plan is a frozen value that goes through JSON unchanged: the planner's output, what `compress_` carries out, and what
a checkpoint stores so that it can be loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, field_validator, model_validator

from kronpress.errors import RequestError, unknown_name
from kronpress.folding import Sizes
from kronpress.matrices import STRUCTURES, StructuredMatrix
from kronpress.matrices.kronecker import KroneckerSpec
from kronpress.recipe import REDUCED, Weighting


class LayerPlan(BaseModel):
    """What one linear layer, or an embedding's table (num_embeddings, embedding_dim), becomes.

    `heads` are the linear layers tied to the embedding, which multiply by the same matrix. `shared_with` is the first
    layer of a group that reads one input, if this is another of them: the `shared_factors` are that layer's, and
    counted there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: str
    out_features: int
    in_features: int
    spec: Any
    options: Any = {}
    is_embedding: bool = False
    heads: list[str] = []
    shared_with: str | None = None
    # What a measured allocation expects this matrix alone to cost, ½ tr(G ΔW C ΔWᵀ), or that of a group by its first
    # layer; None if it was not measured.
    predicted_rise: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_structure(cls, fields: Any) -> Any:
        if not {"structure", "spec"} <= set(fields):
            return fields  # refused as incomplete
        if fields["structure"] not in STRUCTURES:
            raise RequestError(
                f"{unknown_name('structure', str(fields['structure']), STRUCTURES)}; import first the file that puts "
                "one of your own into kronpress.matrices.STRUCTURES"
            )
        matrix_class = STRUCTURES[fields["structure"]]
        return {
            **fields,
            "spec": matrix_class.Spec.model_validate(fields["spec"]),
            "options": matrix_class.Options.model_validate(fields.get("options", {})),
        }

    @model_validator(mode="after")
    def _sizes_fit(self) -> LayerPlan:
        self.check_sizes()
        return self

    def check_sizes(self) -> None:
        """RequestError if a matrix of this shape cannot become what the spec says."""
        self.matrix_class.factor_shapes(self.out_features, self.in_features, self.spec)
        self.matrix_class.check_options(self.spec, self.options)

    @property
    def matrix_class(self) -> type[StructuredMatrix]:
        return STRUCTURES[self.structure]

    @property
    def num_params(self) -> int:
        """Of the factors that are this layer's own."""
        shapes = self.matrix_class.factor_shapes(self.out_features, self.in_features, self.spec)
        others = self.matrix_class.shared_factors if self.shared_with is not None else ()
        return sum(prod(shape) for name, shape in shapes.items() if name not in others)

    @property
    def num_params_dense(self) -> int:
        return self.out_features * self.in_features

    @property
    def num_indices(self) -> int:
        """Integers of permutations, which are stored with every place that holds the matrix."""
        sizes = self.matrix_class.order_sizes(self.out_features, self.in_features, self.spec)
        return (1 + len(self.heads)) * sum(sizes.values())

    @property
    def flops_per_token(self) -> int:
        """Those of all places that multiply by the matrix; looking up a row is none."""
        return self.num_products * count_flops(self.structure, self.out_features, self.in_features, self.spec)

    @property
    def flops_per_token_dense(self) -> int:
        return self.num_products * 2 * self.num_params_dense

    @property
    def num_products(self) -> int:
        """How many places multiply by the matrix."""
        return len(self.heads) + (0 if self.is_embedding else 1)

    @property
    def num_biases_lost(self) -> int:
        """By how many entries its bias is shorter than the dense layer's."""
        return 0

    def empty_matrix(self, dtype: torch.dtype) -> StructuredMatrix:
        """The matrix on the meta device."""
        return self.matrix_class(self.out_features, self.in_features, self.spec, dtype, "meta", self.options)


class ReducedSpec(BaseModel):
    """A dense layer's `shape` (out_features, in_features) after units or channels were left out; whether it has a bias.

    `num_indices` are the numbers of the rotary pairs that its queries and keys have kept, where some were left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[PositiveInt, PositiveInt]
    has_bias: bool
    num_indices: PositiveInt | None = None


class ReducedLayerPlan(LayerPlan):
    """A dense layer of fewer outputs, or inputs; its neighbours have as many fewer.

    `out_features` and `in_features` are those of the layer that it replaces.

    >>> spec = {"shape": (4, 3), "has_bias": True}
    >>> layer = ReducedLayerPlan(structure="reduced", out_features=8, in_features=3, spec=spec)
    >>> layer.num_params, layer.num_params_dense, layer.num_biases_lost
    (12, 24, 4)
    """

    @model_validator(mode="before")
    @classmethod
    def _known_structure(cls, fields: Any) -> Any:
        return {**fields, "spec": ReducedSpec.model_validate(fields["spec"])} if "spec" in fields else fields

    def check_sizes(self) -> None:
        rows, columns = self.spec.shape
        if rows > self.out_features or columns > self.in_features:
            raise RequestError(
                f"a reduced layer of {rows}×{columns} in place of one of {self.out_features}×{self.in_features}"
            )

    @property
    def matrix_class(self) -> type[StructuredMatrix]:
        raise RequestError(f"a layer of structure {REDUCED} is dense: this is for structured ones")

    @property
    def num_params(self) -> int:
        return prod(self.spec.shape)

    @property
    def num_indices(self) -> int:
        return self.spec.num_indices or 0

    @property
    def flops_per_token(self) -> int:
        return 2 * self.num_params

    @property
    def num_biases_lost(self) -> int:
        return self.out_features - self.spec.shape[0] if self.spec.has_bias else 0


class CandidateReport(BaseModel):
    """One row of the table that a measured allocation chose from."""

    model_config = ConfigDict(frozen=True)

    structure: str
    spec: Any
    num_params: int
    predicted_rise: float
    is_exact: bool


class AllocationReport(BaseModel):
    """What a measured allocation chose from: `predicted_rise` is the sum of the chosen, `gap` its distance to the best.

    The rises are those of each matrix alone; together they cost more.
    """

    model_config = ConfigDict(frozen=True)

    predicted_rise: float
    gap: float
    kept_dense: list[str]
    candidates: dict[str, list[CandidateReport]] = {}


class Plan(BaseModel):
    """Every replaced layer in the model's order, and the totals of the model before and after.

    Parameters are floating-point numbers of the whole model, embeddings and head included, tied ones counted
    once. FLOPs are those of all linear layers for one token, the head included, two for a multiply-add;
    attention scores and element-wise work are left out. `num_params_untied` are those of heads that were tied to a
    compressed embedding and are left dense; the integers of permutations are counted in `bytes` alone. `folding` names
    the free dimensions (`folding/`) whose units are put in the best order before the fits. `before` names the layers
    that stages before this one, number `stage`, have replaced and this plan leaves as they are; `left_dense` those that
    this stage or one before it targets and a measured allocation leaves as they were. `num_params_targets` and
    `kept_of_targets` are of all that any stage so far has targeted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    layers: dict[str, LayerPlan]
    stage: int = 1
    before: list[str] = []
    left_dense: list[str] = []
    weighting: Weighting = Weighting()
    folding: list[str] = []
    rotation: bool = False
    allocation: AllocationReport | None = None
    num_params: int
    num_params_dense: int
    num_params_targets: int
    num_params_targets_dense: int
    num_params_untied: int = 0
    kept_of_targets: float
    kept_of_model: float
    flops_per_token: int
    flops_per_token_dense: int
    dtype: str
    bytes: int
    bytes_dense: int

    @field_validator("layers", mode="before")
    @classmethod
    def _of_their_kinds(cls, layers: Any) -> Any:
        if not isinstance(layers, Mapping):
            return layers
        return {
            name: ReducedLayerPlan.model_validate(layer)
            if isinstance(layer, Mapping) and layer.get("structure") == REDUCED
            else layer
            for name, layer in layers.items()
        }

    @field_validator("layers")
    @classmethod
    def _not_empty(cls, layers: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
        if not layers:
            raise ValueError("a plan replaces at least one layer")
        return layers

    @property
    def new_layers(self) -> list[str]:
        """The layers that this plan replaces, in the model's order."""
        return [name for name in self.layers if name not in self.before]

    @property
    def new_groups(self) -> list[list[str]]:
        """The same, together where they are fitted as one matrix; most layers are alone."""
        groups: dict[str, list[str]] = {}
        for name, layer in owners_first({name: self.layers[name] for name in self.new_layers}).items():
            groups.setdefault(layer.shared_with or name, []).append(name)
        return list(groups.values())

    def without(self, names: Collection[str], num_params_untied: int) -> Plan:
        """The plan of the same model with the layers `names` dense as they were, and its totals.

        Args:
            num_params_untied: of heads that have lost their tie nevertheless.
        """
        dense = [layer for name, layer in self.layers.items() if name in names]
        layers = regrouped({name: layer for name, layer in self.layers.items() if name not in names})
        more = sum(layer.num_params_dense for layer in dense)
        more += sum(layer.num_params for layer in layers.values())
        more -= sum(layer.num_params for layer in self.layers.values())
        biases = sum(layer.num_biases_lost for layer in dense)
        num_params = self.num_params + more + biases + num_params_untied - self.num_params_untied
        return Plan.model_validate(
            {
                **dict(self),
                "layers": layers,
                "before": [name for name in self.before if name not in names],
                "left_dense": [*self.left_dense, *(name for name in self.layers if name in names)],
                "allocation": None,
                "num_params": num_params,
                "num_params_targets": self.num_params_targets + more,
                "num_params_untied": num_params_untied,
                "kept_of_targets": (self.num_params_targets + more) / self.num_params_targets_dense,
                "kept_of_model": num_params / self.num_params_dense,
                "flops_per_token": self.flops_per_token
                + sum(layer.flops_per_token_dense - layer.flops_per_token for layer in dense),
                "bytes": num_params * (self.bytes_dense // self.num_params_dense)
                + 8 * sum(layer.num_indices for layer in layers.values()),
            }
        )


def owners_first(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """These layers, none of them before the one whose factors it shares; a stored plan has them in any order."""
    return dict(sorted(layers.items(), key=lambda each: each[1].shared_with is not None))


def regrouped(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Layers of which some may have been taken away: by name the first left of a group has the shared factors then."""
    found = dict(layers)
    owners: dict[str, str] = {}
    for name in sorted(layers):
        lost = layers[name].shared_with
        if lost is not None and lost not in layers:
            owner = owners.setdefault(lost, name)
            found[name] = layers[name].model_copy(update={"shared_with": None if owner == name else owner})
    return found


def reduced_shapes(layers: Mapping[str, LayerPlan]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) that the reduced layers among these get."""
    return {name: layer.spec.shape for name, layer in layers.items() if isinstance(layer, ReducedLayerPlan)}


def structured_plans(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Those of these layers that become structured ones."""
    return {name: layer for name, layer in layers.items() if not isinstance(layer, ReducedLayerPlan)}


def kronecker_sums(layers: Mapping[str, LayerPlan]) -> dict[str, Sizes]:
    """left_shape, right_shape and num_terms of those layers that become sums of Kronecker products."""
    return {
        name: (layer.spec.left_shape, layer.spec.right_shape, layer.spec.num_terms)
        for name, layer in layers.items()
        if isinstance(layer.spec, KroneckerSpec)
    }


@cache
def count_flops(structure: str, out_features: int, in_features: int, spec: Any) -> int:
    """FLOPs of a structure's product with one vector."""
    # Traced once for all layers of equal shape.
    return STRUCTURES[structure].count_flops(out_features, in_features, spec)
