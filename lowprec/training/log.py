"""The output of the "lowprec" logger."""

import logging
import sys

logger = logging.getLogger("lowprec")


def show_log() -> None:
    """Make the "lowprec" logger write to stderr, unless the program has set up logging. So a user
    sees what was converted."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
        logger.propagate = False
