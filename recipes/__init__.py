"""Recipes: how the models that tvlens ships were trained."""
