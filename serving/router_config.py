"""The router's settings, out of the server's."""

from __future__ import annotations

from serving.routing import RouterConfig
from serving.settings import ServeSettings


def reserve_by_size(settings: ServeSettings) -> bool:
    """Whether the reserve is as large as the largest replica. Where there will only ever be one replica, no other can
    stand in for it."""
    return settings.reserve_slots == "auto" and settings.max_replicas > 1


def router_config(settings: ServeSettings) -> RouterConfig:
    fixed = 0 if settings.reserve_slots == "auto" else settings.reserve_slots
    return RouterConfig(
        settings.lease_s,
        settings.max_waiting,
        reserve_slots=None if reserve_by_size(settings) else fixed,
        rebuilds_at_once=settings.rebuilds_at_once,
        settle_s=2 * settings.report_interval_s,
        log_level=settings.log_level,
    )
