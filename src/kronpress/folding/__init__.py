"""Permutations that a transformer lets pass: units renumbered in every layer that writes or reads them, at no cost.

Renumbering the units of a free dimension in all layers at once leaves what the model computes as it was, and gives each
of their weights an order of rows or columns in which a structured matrix may fit it better. `search_orders` looks for
such orders, `fold_` puts one into the model, and `permuted_moments` into what was measured.
"""

from kronpress.folding.free_dimensions import RESIDUALS, FreeDimension, Side, Use, free_dimensions
from kronpress.folding.renumbering import check_foldable, fold_, permuted_moments
from kronpress.folding.search import Sizes, search_orders

__all__ = [
    "RESIDUALS",
    "FreeDimension",
    "Side",
    "Sizes",
    "Use",
    "check_foldable",
    "fold_",
    "free_dimensions",
    "permuted_moments",
    "search_orders",
]
