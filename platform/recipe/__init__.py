"""Recipes (one run) and searches (many runs), read from YAML and checked."""

from patchloom.platform.recipe.run_recipe import (
    Recipe,
    check_recipe,
    load_recipe,
    recipe_schema,
    recipe_yaml,
    with_values,
)

__all__ = ["Recipe", "check_recipe", "load_recipe", "recipe_schema", "recipe_yaml", "with_values"]
