"""Data: timm's data sets and transforms, and scikit-learn's digits, as one LightningDataModule."""

from gpd_cli.data.datamodule import ImageData
from gpd_cli.data.image_spec import ImageSpec

__all__ = ["ImageData", "ImageSpec"]
