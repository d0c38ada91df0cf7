"""Static-teacher methods: what student and dynamic teacher learn from a frozen network."""

from gpd_cli.methods.base import Batch, Method
from gpd_cli.methods.registry import METHODS, make_method, method_class

__all__ = ["METHODS", "Batch", "Method", "make_method", "method_class"]
