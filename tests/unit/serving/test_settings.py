"""Settings: from the environment, checked at start, safe by default."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.settings import ServeSettings, is_loopback


def test_defaults_are_a_laptop() -> None:
    settings = ServeSettings()
    assert (settings.checkpoint, settings.host, settings.port, settings.slots) == ("demo", "127.0.0.1", 8998, "auto")


def test_every_field_says_what_it_is() -> None:
    assert [name for name, field in ServeSettings.model_fields.items() if not field.description] == []


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONAPLEX_SLOTS", "7")
    monkeypatch.setenv("PERSONAPLEX_OTLP_ENDPOINT", "")
    settings = ServeSettings()
    assert settings.slots == 7
    assert settings.otlp_endpoint is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"slots": 0}, "slots"),
        ({"min_replicas": 2}, "max_replicas"),
        ({"stale_audio_s": 11.0}, "slow_client_s"),
        ({"trunk_ping_s": 2.0}, "trunk_dead_s"),
        ({"report_interval_s": 2.0}, "lease_s"),
        ({"opus_complexity": 11}, "opus_complexity"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"host": "0.0.0.0"}, "keys-file"),
        ({"host": "voice.example.org"}, "keys-file"),
    ],
)
def test_nonsense_is_refused_by_name(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServeSettings(**wrong)  # type: ignore[arg-type] # wrong on purpose


def test_with_keys_any_address_may_be_bound(tmp_path: Path) -> None:
    assert ServeSettings(host="0.0.0.0", keys_file=tmp_path / "keys.toml").host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False), ("example.org", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
