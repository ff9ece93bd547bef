"""Narrower transformer blocks: fewer hidden units, and fewer channels in each head, by MoDeGPT (arXiv 2408.09632).

The layers stay dense, and the widths between them shrink. `blocks_of` says which layers have which width, `fit_block`
makes the matrices for smaller ones, and `put_block_` puts them, or empty ones, into the model.
"""

from kronpress.reduction.blocks import Block, Shape, Widths, block_members, blocks_of, dense_shapes
from kronpress.reduction.decompositions import ordered_units, reduced_fractions
from kronpress.reduction.fits import (
    UnitsProblem,
    fit_block,
    nearest_weights,
    put_block_,
    put_empty_,
    units_problem,
    widen_,
)

__all__ = [
    "Block",
    "Shape",
    "UnitsProblem",
    "Widths",
    "block_members",
    "blocks_of",
    "dense_shapes",
    "fit_block",
    "nearest_weights",
    "ordered_units",
    "put_block_",
    "put_empty_",
    "reduced_fractions",
    "units_problem",
    "widen_",
]
