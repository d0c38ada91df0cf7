"""Data sets and transforms of timm, and scikit-learn's digits, in a single LightningDataModule."""

from gpd_cli.data.datamodule import ImageData
from gpd_cli.data.image_spec import ImageSpec

__all__ = ["ImageData", "ImageSpec"]
