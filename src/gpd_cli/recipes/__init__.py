"""Recipes: the configurations in the folder ``configs``, which are installed with the package."""
