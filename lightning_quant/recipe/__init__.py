"""WHAT is quantized: a recipe names the numerics of weights and activations."""

from lightning_quant.recipe.recipe import RECIPES, LayerRecipe, Recipe

__all__ = ["RECIPES", "LayerRecipe", "Recipe"]
