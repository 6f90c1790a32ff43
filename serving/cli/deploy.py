"""`personaplex deploy`: the application onto a Ray cluster that is already there, or a new build over an old one."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.console import err, fail, introduce, note, out
from serving.cli.options import Accelerator, Checkpoint, Host, KeysFile, Slots
from serving.cli.serve import settings_from

if TYPE_CHECKING:
    from rich.status import Status

    from serving.rollout import Progress
    from serving.settings import ServeSettings

REACHABLE_S = 5.0
_SECRET_KEY = b"personaplex/trunk-secret"  # in the GCS's key-value store


def deploy(
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="The cluster: HOST:PORT of its GCS, or auto on one of its nodes.")
    ] = "auto",
    checkpoint: Checkpoint = None,
    port: Annotated[int | None, typer.Option(min=1, help="HTTP port on every node.", show_default="8998")] = None,
    host: Host = None,
    slots: Slots = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas kept even when nobody calls.", show_default="1")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most replicas autoscaling may start.", show_default="as --replicas")
    ] = None,
    ingresses: Annotated[
        int | None, typer.Option(min=1, help="Ingress processes, one a node.", show_default="1")
    ] = None,
    accelerator: Accelerator = None,
    keys_file: KeysFile = None,
    prepared_nodes: Annotated[
        bool,
        typer.Option(
            "--prepared-nodes", help="All nodes have the environment that `python -m serving.haproxy` prints."
        ),
    ] = False,
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Return only when the last call on an ingress of the former build is over, too."),
    ] = False,
) -> None:
    """Deploy on a running Ray cluster and leave; deploy again to roll out a change.

    What runs is replaced replica by replica, and its conversations move.
    It returns when everything new serves and every conversation has
    moved. Clients' connections cannot: a former ingress takes no new
    ones and keeps its own until they end, for five minutes at most.

    The trunks' secret is made once a cluster and kept there, so that old
    and new processes can speak to each other. All other settings come
    from the environment as PERSONAPLEX_NAME (personaplex serve
    --list-settings). Which proxy stands in front is the cluster's own
    configuration, in the environment of its nodes.

    Workers get theirs with this command, which costs each of them another
    interpreter's start, 0.4 s of a core. --prepared-nodes spares them that
    where every node was started with the environment that
    python -m serving.haproxy prints; ingresses look whether it is so.

    \b
      ray start --head
      personaplex deploy
      personaplex deploy --address 10.0.0.1:6379 --replicas 3 --ingresses 3
      personaplex deploy --prepared-nodes
    """
    settings = settings_from(
        checkpoint=checkpoint,
        port=port,
        host=host,
        slots=slots,
        min_replicas=replicas,
        max_replicas=max_replicas if max_replicas is not None else replicas,
        ingresses=ingresses,
        accelerator=accelerator,
        keys_file=keys_file,
    )
    from models.checkpoint import CheckpointError
    from serving.catalog import Catalog
    from serving.plan import PlanError
    from serving.tenants import KeysFileError

    with err.status(f"deploying on {address}") as status:
        try:
            done = _deploy(address, settings, prepared_nodes, wait, partial(_show, status))
            catalog = Catalog.read(settings.checkpoint)
        except (CheckpointError, KeysFileError, PlanError, ConnectionError) as error:
            fail(str(error))
        except RuntimeError as error:  # Serve's word for "it did not become healthy"
            fail(f"the deployment failed: {error}")
    out.print(f"[bold]Deployed at http://{settings.host}:{settings.port}[/bold]", highlight=False)
    introduce(catalog.trained, catalog.notice)
    slots = "as many slots as fit" if settings.slots == "auto" else f"{settings.slots} slots"
    note(f"{settings.min_replicas} to {settings.max_replicas} replicas with {slots} each")
    if done.old_ingresses:
        note(
            f"{done.old_ingresses} ingresses of the former build still carry calls; they take no new ones, and end "
            f"with the last of them or in {settings.ingress_drain_s:g} s (--wait waits for that)"
        )


def _show(status: Status, progress: Progress) -> None:
    """What is being waited for: in place on a terminal, a line each in a log."""
    if err.is_terminal:
        status.update(f"deploying: {progress}")
    else:
        note(str(progress))


def _deploy(
    address: str, settings: ServeSettings, prepared: bool, wait: bool, tell: Callable[[Progress], None]
) -> Progress:
    _check_reachable(address)
    import ray

    from serving.app import build_app
    from serving.haproxy import node_environment
    from serving.local import deploy

    logging.getLogger("ray.serve").setLevel(settings.log_level)
    environment = None if prepared else {"env_vars": node_environment(settings)}
    ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if settings.trunk_secret is None:
            settings = settings.model_copy(update={"trunk_secret": _trunk_secret()})
        return deploy(build_app(settings), settings, wait_for_old=wait, tell=tell)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes before it says so. Raises ConnectionError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # `auto`, or one of Ray's other forms
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=REACHABLE_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with ray start --head"
        ) from error


def _trunk_secret() -> str:
    """The cluster's own, made by whoever deploys first."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_SECRET_KEY, secrets.token_urlsafe(32), overwrite=False)
    kept = internal_kv._internal_kv_get(_SECRET_KEY)
    assert kept is not None
    return str(kept.decode())
