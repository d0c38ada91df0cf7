"""Files that are written whole or not at all, and whose damage is noticed when they are read."""

from gpd_cli.files.atomic import atomic_folder, atomic_path, remove_leftovers
from gpd_cli.files.checksums import check_whole
from gpd_cli.files.glance import glance
from gpd_cli.files.tensors import TENSOR_SUFFIXES, save_archive, save_tensors
from gpd_cli.files.texts import is_remote, json_text, short_path
from gpd_cli.files.writable import check_folder, check_not_input, check_writable

__all__ = [
    "TENSOR_SUFFIXES",
    "atomic_folder",
    "atomic_path",
    "check_folder",
    "check_not_input",
    "check_whole",
    "check_writable",
    "glance",
    "is_remote",
    "json_text",
    "remove_leftovers",
    "save_archive",
    "save_tensors",
    "short_path",
]
