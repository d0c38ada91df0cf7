"""Suppression of warnings and messages of libraries that a user of this tool cannot act on."""

from __future__ import annotations

import logging
import warnings

_CHATTER = (
    "Tip:",
    "Loading `train_dataloader`",
    "Seed set to",
    "TPU available",
    "Restoring states",
    "Loaded model weights",
    "Detected KeyboardInterrupt",
    "`weights_only` was not set",
)


def quieten() -> None:
    """Suppress these warnings and messages in this process."""
    for message in (
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*The dirpath has changed.*",
        ".*is smaller than the logging interval.*",
        ".*Couldn't infer the batch indices.*",  # arises with streams
        ".*Your `IterableDataset` has `__len__` defined.*",  # workers do read separate parts
        ".*Total length of `list` across ranks is zero.*",  # arises without validation images
        ".*lr_scheduler.step\\(\\)` before.*",
        ".*monitor='val/student_top1'.*could not find the monitored key",  # without validation
    ):
        warnings.filterwarnings("ignore", message)
    for name in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.rank_zero",
        "fabric.utilities.seed",
        "pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(f"lightning.{name}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _CHATTER)
