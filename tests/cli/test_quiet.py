"""Messages of libraries that are not shown."""

import logging

from lightning.pytorch.trainer.connectors import checkpoint_connector

from gpd_cli.cli.quiet import quieten


def test_checkpoints_are_saved_without_remarks_of_lightning() -> None:
    """They would stand in the middle of the bar when Ctrl-C saves and stops."""
    quieten()

    def shown(text: str) -> bool:
        log = checkpoint_connector.log
        return bool(log.filter(logging.LogRecord(log.name, logging.INFO, "", 0, text, (), None)))

    assert not shown("`weights_only` was not set, defaulting to `False`.")
    assert shown("something else")
