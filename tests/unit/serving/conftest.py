"""What tests of serving share."""

from __future__ import annotations

import pytest

from tests.unit.serving.router_stage import Stage


@pytest.fixture
def stage() -> Stage:
    return Stage()
