"""Log lines of ours: as many as were asked for, with the time, each once."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from serving.logs import PACKAGES, log_from


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    loggers = [logging.getLogger(package) for package in PACKAGES]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


def test_the_level_is_that_of_the_settings_and_a_line_has_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    log_from("INFO")
    log_from("INFO")
    logging.getLogger("serving.somewhere").info("heard")
    logging.getLogger("actors.somewhere").debug("too much")
    logging.getLogger("elsewhere").info("not ours")
    said = capsys.readouterr().err
    assert re.fullmatch(r"INFO \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} serving\.somewhere -- heard\n", said)
