"""What calibration measures of one layer, and what a fit is nearest by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class InputMoments:
    """Second moment and mean of one layer's input over `num_tokens` tokens, and how the loss responds to its output.

    All in float64. `second` is E[x xᵀ] (in_features, in_features), `mean` E[x] and `magnitude` E|x| (in_features,),
    None if not measured. `gradient` is E[g gᵀ] (out_features, out_features) of the loss's gradient g by the layer's
    output, None if not measured. `held_out` is E[x xᵀ] of tokens that are in none of the above, to choose the shrinkage
    by, None if there are none.

    Of an embedding with a table (vocabulary, width), `counts` (vocabulary,) says how often each row was looked up in
    `num_tokens` tokens, and `gradient` (width, width) is by what was looked up. x (width,) is then what the linear
    layers tied to it multiply by the table; without one, `second`, `mean` and `magnitude` are zero and `held_out` is
    None. Of a linear layer `counts` is None.

    `similarity` is E cos(h, h′) of the hidden states before and after the transformer block that the layer is in; None
    if not measured.
    """

    second: Tensor
    mean: Tensor
    num_tokens: int
    gradient: Tensor | None = None
    held_out: Tensor | None = None
    magnitude: Tensor | None = None
    counts: Tensor | None = None
    similarity: float | None = None


@dataclass(frozen=True, eq=False)
class DerivedMoments(Mapping[str, T]):
    """What follows from each layer's moments, made when a layer is asked for and not kept; a subclass says how.

    Moments may be larger than the model and on disk: which layers there are is said without reading any.
    """

    moments: Mapping[str, InputMoments]

    def __contains__(self, layer: object) -> bool:
        return layer in self.moments

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)
