"""`python -m patchloom.platform.recipe` prints the JSON schema of recipes."""

from patchloom.platform.recipe.run_recipe import recipe_schema

print(recipe_schema(), end="")
