"""Recipes: the configurations of the folder ``configs``, which come with the package."""
