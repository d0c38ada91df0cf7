"""Build networks by name (from timm, torchvision or this package), and load their weight files."""

from gpd_cli.models.factory import create_model
from gpd_cli.models.inputs import check_images, count_classes, input_shape
from gpd_cli.models.published import wants_published, without_pretrained
from gpd_cli.models.reused import ReusedClassifier
from gpd_cli.models.spec import ModelSpec
from gpd_cli.models.versions import needed_versions, with_versions
from gpd_cli.models.weights import load_state_dict, load_weights

__all__ = [
    "ModelSpec",
    "ReusedClassifier",
    "check_images",
    "count_classes",
    "create_model",
    "input_shape",
    "load_state_dict",
    "load_weights",
    "needed_versions",
    "wants_published",
    "with_versions",
    "without_pretrained",
]
