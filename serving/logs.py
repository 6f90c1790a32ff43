"""Where our own log lines go: to stderr of each process, which Ray keeps in a file, with the time."""

from __future__ import annotations

import logging
import time

PACKAGES = ("serving", "actors", "cluster", "graphs", "models")
_FORMAT = "%(levelname)s %(asctime)s.%(msecs)03d %(name)s -- %(message)s"


def log_from(level: str) -> None:
    """Have our packages say what is of this level or above. Without it Python prints warnings alone, without a time.
    Twice is once."""
    formatter = logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S")
    formatter.converter = time.gmtime  # machines of one cluster may stand in different time zones
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(level)
        logger.handlers = [handler]
