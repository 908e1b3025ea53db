"""Where the "lowprec" logger writes."""

import logging
import sys

logger = logging.getLogger("lowprec")


def show_log() -> None:
    """Let the "lowprec" logger write to stderr, unless the program has set up logging: a user
    should see what was converted."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
        logger.propagate = False
