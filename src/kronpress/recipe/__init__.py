"""A recipe: one YAML file that says what is compressed, into what, how it is healed and how it is measured."""

from kronpress.recipe.loading import (
    POCKET,
    POCKET_DEFAULTS,
    RECIPES,
    dump_recipe,
    load_recipe,
    read_recipe,
    recipe_names,
)
from kronpress.recipe.recipe import AUTO, REDUCED, Recipe
from kronpress.recipe.sections import (
    Budget,
    Calibration,
    Evaluation,
    Healing,
    Phase,
    Reconstruction,
    Similarity,
    WeightedSet,
    Weighting,
)

__all__ = [
    "AUTO",
    "POCKET",
    "POCKET_DEFAULTS",
    "RECIPES",
    "REDUCED",
    "Budget",
    "Calibration",
    "Evaluation",
    "Healing",
    "Phase",
    "Recipe",
    "Reconstruction",
    "Similarity",
    "WeightedSet",
    "Weighting",
    "dump_recipe",
    "load_recipe",
    "read_recipe",
    "recipe_names",
]
