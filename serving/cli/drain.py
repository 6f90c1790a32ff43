"""`personaplex drain`: empty a replica, or all of a node, without anybody noticing."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from serving.cli.admin import DEFAULT_SERVER, AdminClient, KeyOption, ServerOption, chosen
from serving.cli.console import FAILED, WRONG_USE, err, fail, note

LOOK_EVERY_S = 0.25


def drain(
    replica: Annotated[
        str | None, typer.Argument(metavar="REPLICA", help="Its name, or as much of it as is unique.")
    ] = None,
    all_on: Annotated[
        str | None,
        typer.Option("--all-on", metavar="NODE", help="All replicas of a node: its Ray id, or its address."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when they are empty; exit status 1 if that takes too long.")
    ] = False,
    within_s: Annotated[
        float, typer.Option("--within", min=0.1, metavar="S", help="How long --wait waits, in seconds.")
    ] = 60,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Empty a replica: its conversations move to others, live, and it is replaced.

    It takes nobody new from now on, and every conversation moves at a
    frame boundary as soon as another replica has a slot for it. A node
    that is about to go (a spot notice, maintenance) is emptied with
    --all-on, for example in a pod's preStop hook. On a server with keys
    this needs the key of a tenant with admin = true in the keys file.

    \b
      personaplex replicas
      personaplex drain abc123
      personaplex drain --all-on 10.0.0.7 --wait --within 100
    """
    if (replica is None) == (all_on is None):
        fail("say what to drain: a REPLICA (see personaplex replicas), or --all-on NODE", WRONG_USE)
    client = AdminClient(server, key)
    try:
        leaving = chosen(client.replicas(), replica, all_on)
    except LookupError as error:
        fail(str(error), WRONG_USE)
    for each in leaving:
        client.drain(each.name)
        note(f"draining {each.name}: {each.held} of {each.slots} slots in use")
    if wait:
        _wait(client, {each.name for each in leaving}, within_s)


def _wait(client: AdminClient, names: set[str], within_s: float) -> None:
    start_s = time.monotonic()
    with err.status("conversations move") as status:
        while True:
            left = [each for each in client.replicas() if each.name in names]
            held = sum(each.held for each in left)
            if not held:
                break
            status.update(f"{held} conversations have yet to move")
            if time.monotonic() - start_s > within_s:
                note(
                    f"{held} conversations are still on {', '.join(each.name for each in left)} after {within_s:g} s. "
                    "Is there room elsewhere? personaplex replicas shows it; they move as soon as there is."
                )
                raise typer.Exit(FAILED)
            time.sleep(LOOK_EVERY_S)
    note(f"empty after {time.monotonic() - start_s:.1f} s")
