"""Errors on the wire: every one of the tree has a status, a close code and a body."""

from __future__ import annotations

import pytest

from actors import errors
from serving.errors import close_code, error_body, http_status


@pytest.mark.parametrize(
    ("error", "close", "status"),
    [
        (errors.NoCapacity, 1013, 503),
        (errors.TenantLimit, 1008, 429),
        (errors.Draining, 1012, 503),
        (errors.UnknownVoice, 1008, 400),
        (errors.Unauthorized, 1008, 401),
        (errors.SlowClient, 1008, 400),
        (errors.ReplicaLost, 1011, 500),
        (errors.ServingError, 1011, 500),
    ],
)
def test_codes(error: type[errors.ServingError], close: int, status: int) -> None:
    assert close_code(error("x")) == close
    assert http_status(error("x")) == status


def test_every_error_of_the_tree_has_both() -> None:
    for error in errors.BY_CODE.values():
        assert 1008 <= close_code(error("x")) <= 1015
        assert 400 <= http_status(error("x")) < 600


def test_the_body_has_the_shape_of_the_api() -> None:
    body = error_body(errors.TenantLimit("Your limit of 2 is reached."))
    assert body["error"]["type"] == "rate_limit_error"
    assert body["error"]["code"] == "tenant_limit"
    assert body["error"]["param"] is None
    assert "limit of 2" in body["error"]["message"]
