"""`personaplex keys`: a new API key, and what to store of it."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer

from serving.cli.console import WRONG_USE, fail, note

KEY_PREFIX = "ppx_"
KEY_BYTES = 32  # so many random bytes that a plain hash of the key is as good as the key is secret


def keys(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    max_conversations: Annotated[
        int | None, typer.Option("--max", min=1, metavar="N", help="Conversations at once; without it, no limit.")
    ] = None,
) -> None:
    """Make an API key. It is shown once; the server's file keeps its hash.

    \b
      personaplex keys acme --max 10 >> keys.toml
      personaplex serve --host 0.0.0.0 --keys-file keys.toml
    """
    if not tenant.strip() or any(c in '"\\' or not c.isprintable() for c in tenant):
        fail("a tenant's name is printable text without quotes and backslashes", WRONG_USE)
    from serving.tenants import hash_key

    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    print(f'[[tenants]]\nname = "{tenant}"')
    if max_conversations is not None:
        print(f"max_conversations = {max_conversations}")
    print(f'keys = ["sha256:{hash_key(key)}"]')
    # On stderr: redirected into the keys file, stdout holds nothing that opens a door.
    note(f"the key, shown this once: {key}")
