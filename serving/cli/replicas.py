"""`personaplex replicas`: who holds conversations, and how many."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from serving.cli.admin import DEFAULT_SERVER, AdminClient, KeyOption, ServerOption
from serving.cli.console import note, out


def replicas(
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line instead of a table.")] = False,
) -> None:
    """List the replicas of a running server: their slots, and what they hold.

    FREE is what the router may still give away there. On a server with
    keys this needs the key of a tenant with admin = true in its keys file.

    \b
      personaplex replicas
      personaplex replicas --server http://10.0.0.1:8998 --json
    """
    seen = AdminClient(server, key).replicas()
    if as_json:
        for each in seen:
            print(json.dumps(asdict(each)))
        return
    if not seen:
        note("no replica has reported: the first takes a while to load its checkpoint")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("replica", "node", "host", "state"):
        table.add_column(column)
    for column in ("slots", "busy", "arriving", "free"):
        table.add_column(column, justify="right")
    for each in seen:
        counts = (each.slots, each.busy, each.arriving, each.free)
        table.add_row(each.name, each.node[:8], each.host, each.state, *map(str, counts))
    out.print(table)
