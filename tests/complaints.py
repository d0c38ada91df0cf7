"""What a loader says of images that it cannot use."""

import traceback
from typing import Any

from gpd_cli.errors import DataError


def complaint(loader: Any) -> str:
    """The message that reading all batches ends with; empty where it does not fail."""
    # Not pytest.raises: the frames that it keeps would keep the workers waiting for seconds.
    try:
        list(loader)
    except DataError as error:
        traceback.clear_frames(error.__traceback__)
        return str(error)
    return ""
