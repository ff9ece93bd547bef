"""What a plan is: which module becomes which structure of which sizes, and what that does to size and FLOPs.

A plan is a frozen value that goes through JSON unchanged: the planner's output, what `compress_` carries out, and what
a checkpoint stores so that it can be loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from kronpress.errors import RequestError, unknown_name
from kronpress.folding import Sizes
from kronpress.matrices import STRUCTURES, StructuredMatrix
from kronpress.matrices.kronecker import KroneckerSpec
from kronpress.recipe import Weighting


class LayerPlan(BaseModel):
    """What one linear layer, or an embedding's table (num_embeddings, embedding_dim), becomes.

    `heads` are the linear layers tied to the embedding, which multiply by the same matrix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: str
    out_features: int
    in_features: int
    spec: Any
    options: Any = {}
    is_embedding: bool = False
    heads: list[str] = []
    # What a measured allocation expects this matrix alone to cost, ½ tr(G ΔW C ΔWᵀ); None if it was not measured.
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
    def _spec_fits(self) -> LayerPlan:
        self.matrix_class.factor_shapes(self.out_features, self.in_features, self.spec)
        self.matrix_class.check_options(self.spec, self.options)
        return self

    @property
    def matrix_class(self) -> type[StructuredMatrix]:
        return STRUCTURES[self.structure]

    @property
    def num_params(self) -> int:
        return self.matrix_class.count_params(self.out_features, self.in_features, self.spec)

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

    def empty_matrix(self, dtype: torch.dtype) -> StructuredMatrix:
        """The matrix on the meta device."""
        return self.matrix_class(self.out_features, self.in_features, self.spec, dtype, "meta", self.options)


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

    def without(self, names: Collection[str], num_params_untied: int) -> Plan:
        """The plan of the same model with the layers `names` dense as they were, and its totals.

        Args:
            num_params_untied: of heads that have lost their tie nevertheless.
        """
        dense = [layer for name, layer in self.layers.items() if name in names]
        layers = {name: layer for name, layer in self.layers.items() if name not in names}
        more = sum(layer.num_params_dense - layer.num_params for layer in dense)
        num_params = self.num_params + more + num_params_untied - self.num_params_untied
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
