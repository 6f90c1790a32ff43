"""API keys: hashed, from a file; who has none is let in on loopback alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.errors import Unauthorized
from serving.tenants import OPEN_TENANT, KeysFileError, Tenant, Tenants, hash_key

KEY = "pp_0123456789abcdef"


def toml(folder: Path, text: str) -> Path:
    path = folder / "keys.toml"
    path.write_text(text)
    return path


@pytest.fixture
def tenants(tmp_path: Path) -> Tenants:
    return Tenants.load(
        toml(
            tmp_path,
            f'[[tenants]]\nname = "acme"\nmax_conversations = 2\nkeys = ["sha256:{hash_key(KEY)}"]\n'
            f'[[tenants]]\nname = "free"\nkeys = ["sha256:{hash_key("other")}", "sha256:{hash_key("third")}"]\n',
        )
    )


def test_without_a_file_everybody_is_the_open_tenant() -> None:
    assert Tenants.load(None).authenticate({}, {}) is OPEN_TENANT


def test_a_key_is_taken_from_the_header_or_the_query(tenants: Tenants) -> None:
    acme = Tenant("acme", 2)
    assert tenants.authenticate({"authorization": f"Bearer {KEY}"}, {}) == acme
    assert tenants.authenticate({"authorization": f"bearer  {KEY} "}, {}) == acme
    assert tenants.authenticate({}, {"api_key": KEY}) == acme
    assert tenants.authenticate({}, {"api_key": "third"}) == Tenant("free", None)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({}, {}),
        ({"authorization": "Bearer "}, {}),
        ({"authorization": f"Basic {KEY}"}, {}),
        ({"authorization": "Bearer wrong"}, {"api_key": KEY}),  # one wrong key is not made good by another
        ({}, {"api_key": hash_key(KEY)}),  # the hash is no key
    ],
)
def test_everything_else_is_unauthorized(tenants: Tenants, headers: dict[str, str], query: dict[str, str]) -> None:
    with pytest.raises(Unauthorized):
        tenants.authenticate(headers, query)


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"tenants": [{"name": "acme", "keys": [f"sha256:{hash_key(KEY)}"]}]}))
    assert Tenants.load(path).authenticate({}, {"api_key": KEY}).name == "acme"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[tenants", "keys.toml"),
        ("", "tenants"),
        ("tenants = []", "tenants"),
        ('[[tenants]]\nname = "a"\nkeys = []', "keys"),
        ('[[tenants]]\nname = "a"\nkeys = ["plain text secret"]', "store the hash"),
        ('[[tenants]]\nname = "a"\nmax_conversations = 0\nkeys = ["x"]', "max_conversations"),
        ('[[tenants]]\nname = "a"\nlimit = 3\nkeys = ["x"]', "limit"),
        (
            "".join(f'[[tenants]]\nname = "{name}"\nkeys = ["sha256:{hash_key(KEY)}"]\n' for name in "ab"),
            "share a key",
        ),
    ],
)
def test_a_bad_file_says_what_is_wrong_and_shows_no_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(KeysFileError, match=said) as error:
        Tenants.load(toml(tmp_path, text))
    assert "plain text secret" not in str(error.value)


def test_of_a_missing_file_it_is_said_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match=r"personaplex keys TENANT >> \S*nowhere\.toml"):
        Tenants.load(tmp_path / "nowhere.toml")
