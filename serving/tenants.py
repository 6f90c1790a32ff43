"""Who may talk, and how much at once: API keys, kept as SHA-256, each belonging to a tenant with a limit.

A keys file is TOML or JSON:

    [[tenants]]
    name = "acme"
    max_conversations = 10                     # at once, in the whole cluster; left out: no limit
    admin = true                               # may use /admin; left out: it may not
    keys = ["sha256:9f86d081884c7d65…"]        # as `printf %s "$KEY" | sha256sum` prints it

Keys are random and long, so a plain hash is enough: there is no short secret to guess behind it. Finding one is
a dictionary lookup by the hash, whose timing tells nothing of use about the key.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.errors import Unauthorized


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays for a conversation. `max_conversations` counts over the whole cluster; None: no limit."""

    name: str
    max_conversations: int | None = None
    admin: bool = False  # may look after the system: /admin


OPEN_TENANT = Tenant("local")  # whoever reaches a server without keys; it listens on loopback alone


class KeysFileError(Exception):
    """The keys file cannot be used; says what is wrong with it and where."""


class _TenantEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    max_conversations: int | None = Field(default=None, ge=1)
    admin: bool = False
    keys: list[str] = Field(min_length=1)


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenants: list[_TenantEntry] = Field(min_length=1)


class Tenants:
    """The keys that are known. Without any, everybody is `OPEN_TENANT`."""

    def __init__(self, by_hash: Mapping[str, Tenant] | None = None) -> None:
        self._by_hash = dict(by_hash or {})

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return not self._by_hash

    @classmethod
    def load(cls, path: Path | None) -> Tenants:
        """Read a keys file. Raises KeysFileError when it is missing, malformed, or holds a key in plain text."""
        if path is None:
            return cls()
        try:
            text = path.read_text()
            document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
            entries = _KeysFile.model_validate(document).tenants
        except FileNotFoundError as error:
            raise KeysFileError(f"there is no keys file {path}; make one: personaplex keys TENANT >> {path}") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
            raise KeysFileError(f"keys file {path}: {error}") from error
        except ValidationError as error:
            first = error.errors(include_input=False)[0]  # the input may be a key
            where = ".".join(str(part) for part in first["loc"])
            raise KeysFileError(f"keys file {path}: {where}: {first['msg']}") from None
        by_hash: dict[str, Tenant] = {}
        for entry in entries:
            tenant = Tenant(entry.name, entry.max_conversations, entry.admin)
            for key in entry.keys:
                digest = _digest_of(key, path, entry.name)
                if by_hash.setdefault(digest, tenant) != tenant:
                    raise KeysFileError(
                        f"keys file {path}: tenants {by_hash[digest].name} and {entry.name} share a key"
                    )
        return cls(by_hash)

    def authenticate(self, headers: Mapping[str, str], query: Mapping[str, str]) -> Tenant:
        """The tenant of a request, by `Authorization: Bearer KEY` or, for browsers, `?api_key=KEY`.

        `headers` are looked up in lower case. Raises Unauthorized.
        """
        if self.open:
            return OPEN_TENANT
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else query.get("api_key", "")
        if not key:
            raise Unauthorized("No API key was given.", "Send it as `Authorization: Bearer KEY` or `?api_key=KEY`.")
        tenant = self._by_hash.get(hash_key(key))
        if tenant is None:
            raise Unauthorized("This API key is not known.")
        return tenant


def hash_key(key: str) -> str:
    """What a keys file stores of a key, without the `sha256:`."""
    return hashlib.sha256(key.encode()).hexdigest()


def _digest_of(entry: str, path: Path, tenant: str) -> str:
    scheme, _, digest = entry.partition(":")
    if scheme != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise KeysFileError(
            f"keys file {path}: a key of tenant {tenant} is not 'sha256:' and 64 lower-case hex digits; "
            'store the hash, never the key: printf %s "$KEY" | sha256sum'
        )
    return digest
