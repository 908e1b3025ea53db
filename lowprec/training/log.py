"""The log of a run: where it goes, and the plan in it."""

import logging
import sys

from lowprec.conversion.plan import Plan
from lowprec.log import logger, tell, write_unless_shown


def show_log() -> None:
    """Make the "lowprec" logger write to stderr, unless the program has set up logging. So a user
    sees what was converted."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
        logger.propagate = False


def show_plan(plan: Plan) -> None:
    """Log a plan, which ends with its summary, and its warnings. If the program's log does not show
    the plan, the summary is written to stderr."""
    show_log()
    logger.info("%s", plan)
    write_unless_shown(plan.summary(), logging.INFO)
    show_warnings(plan)


def show_warnings(plan: Plan) -> None:
    """Log the warnings of a plan."""
    show_log()
    for warning in plan.warnings:
        tell(warning, logging.WARNING)
