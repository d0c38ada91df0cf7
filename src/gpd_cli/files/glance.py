"""A look at the content of a checkpoint that does not read its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def glance(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, whose tensors stay in the file until they are used.

    Args:
        path: path of any file.

    Returns:
        The content; an empty dictionary if the file is missing, damaged or no checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # torch raises many types
        return {}
    return content if isinstance(content, dict) else {}
