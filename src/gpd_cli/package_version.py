"""The version of this package, as it is printed and written into files."""

from importlib.metadata import PackageNotFoundError, version


def gpd_version() -> str:
    """The version of the installed package; ``unknown`` if the package is not installed."""
    try:
        return version("gpd-cli")
    except PackageNotFoundError:
        return "unknown"
