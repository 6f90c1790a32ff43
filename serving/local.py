"""The whole system on this machine: a Ray of its own, Serve, the application; started together, stopped together."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cluster.ports import free_port
from serving.haproxy import bundled_haproxy, haproxy_environment, node_environment
from serving.rollout import Progress, progress, replicas_of
from serving.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve._private.client import ServeControllerClient

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 600.0  # loading 17 GB from a slow disk; the demo checkpoint takes seconds
STOP_WITHIN_S = 5.0
LOOK_EVERY_S = 0.25  # at how far a deploy has come
_SEE_MORE = "Start it with --log-level DEBUG to see what its processes say."
OBJECT_STORE_BYTES = 160 << 20  # everything that matters travels inline; Ray would reserve a third of the memory


class LocalStartError(Exception):
    """The system could not be started on this machine; says why and what to do."""


class LocalServer:
    """A running system. `url` is where to talk; `stop` ends it and leaves nothing running."""

    def __init__(self, url: str, folder: Path, environment: dict[str, str | None]) -> None:
        self.url = url
        self._folder = folder
        self._environment = environment  # what was there before
        self.ready = False

    def stop(self) -> None:
        """Hang up on whoever still talks, stop Serve and Ray, remove what they wrote. Twice is no error."""
        import ray
        from ray import serve

        from serving.app import APP_NAME

        if ray.is_initialized() and self.ready:
            try:
                serve.get_app_handle(APP_NAME).hang_up.remote("The server is stopping.").result(timeout_s=5.0)
            except Exception as error:  # noqa: BLE001 - whatever keeps it from saying goodbye, we are leaving
                log.warning("could not hang up: %s", error)
        if ray.is_initialized():
            _stop_ray()
        _restore(self._environment)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def start_local(settings: ServeSettings, *, ready_timeout_s: float = READY_TIMEOUT_S) -> LocalServer:
    """Start Ray, Serve and the application, and wait until a conversation can be held.

    Raises LocalStartError: the port is taken, the checkpoint or the keys file cannot be used, Ray does not start, or
    nothing was ready within `ready_timeout_s`. Nothing is left running then.
    """
    port = settings.port or free_port(settings.host)
    _check_port(settings.host, port)
    settings = settings.model_copy(
        # It has hung up on everybody by the time that Serve is told to stop; a socket that hangs may not keep it.
        update={"port": port, "trunk_host": settings.trunk_host or "127.0.0.1", "ingress_drain_s": STOP_WITHIN_S}
    )
    folder = Path(tempfile.mkdtemp(prefix="personaplex-"))  # short: a Unix socket's path has 107 bytes
    before = _set(_environment(settings, folder))
    server = LocalServer(f"http://{_host_in_url(settings.host)}:{port}", folder, before)
    try:
        _start(settings, folder)
        _wait_until_ready(server.url, ready_timeout_s)
        server.ready = True
    except LocalStartError:
        server.stop()
        raise
    except BaseException as error:
        server.stop()
        if isinstance(error, Exception):
            raise LocalStartError(f"{type(error).__name__}: {error}. {_SEE_MORE}") from error
        raise
    return server


def _environment(settings: ServeSettings, folder: Path) -> dict[str, str]:
    environment = {
        "RAY_worker_niceness": "0",  # Ray's default of 15 loses every race for a core against the desktop
        "RAY_SERVE_LOG_TO_STDERR": "1" if settings.log_level == "DEBUG" else "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; said now, it does not warn
    }
    environment |= node_environment(settings)
    binary = None if settings.proxy == "python" else bundled_haproxy()
    if binary is not None:
        environment |= haproxy_environment(folder, binary)
    elif settings.proxy == "haproxy":
        raise LocalStartError("There is no HAProxy for this platform: use proxy=python (PERSONAPLEX_PROXY=python).")
    return environment


def deploy(
    app: Application,
    settings: ServeSettings,
    *,
    wait_for_old: bool = False,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Start Serve and the application on the Ray cluster this process is connected to; returns when all of it runs.

    Over an application that runs already this is a rolling update: replica by replica, and calls move. The router is
    replaced first, so that it is of this build and has these settings. Returns when everything new serves and every
    conversation has moved; with `wait_for_old` only when the last call on an ingress of the former build is over as
    well, `ingress_drain_s` at most. `tell` hears of what is being waited for. Raises RuntimeError if Serve gives up.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serving.app import APP_NAME
    from serving.router_actor import replace_router
    from serving.router_config import router_config

    replace_router(router_config(settings))
    serve.start(
        proxy_location="HeadOnly" if settings.ingresses == 1 else "EveryNode",
        http_options=HTTPOptions(host=settings.host, port=settings.port),
        logging_config={"log_level": settings.log_level, "enable_access_log": False},
    )
    former = replicas_of(_application())
    # Without autoscaling of ours, an operator or a scaler of theirs may set the number of replicas over Serve's API.
    fixed = settings.min_replicas == settings.max_replicas
    target = serve.RunTarget(app, name=APP_NAME, route_prefix="/", external_scaler_enabled=fixed)
    # Serve would wait until the last call on a former ingress has ended.
    serve.run_many([target], wait_for_applications_running=False)
    said = ""
    while True:
        seen = progress(_application(), former)
        if seen.failure:
            raise RuntimeError(seen.failure)
        if str(seen) != said:
            said = str(seen)
            tell(seen)
        if seen.over or (seen.serves and not wait_for_old):
            _serve().wait_for_proxies_serving()  # until they know the way
            return seen
        time.sleep(LOOK_EVERY_S)


def _application() -> dict[str, Any]:
    """The application as Serve's REST schema has it; empty while there is none, or nobody to ask."""
    from ray.exceptions import RayActorError

    from serving.app import APP_NAME

    try:
        applications = _serve().get_serve_details()["applications"]
    except RayActorError as error:
        log.info("Serve's controller does not answer: %s", error)
        return {}
    return dict(applications.get(APP_NAME, {}))


def _serve() -> ServeControllerClient:
    """Serve's own client; `serve.start` has connected it."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    return client


def _start(settings: ServeSettings, folder: Path) -> None:
    import ray

    from serving.app import build_app

    app = build_app(settings)  # first: a wrong checkpoint should not cost a start of Ray
    loud = settings.log_level == "DEBUG"
    logging.getLogger("ray.serve").setLevel(settings.log_level)
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=loud,
        logging_level=logging.DEBUG if loud else logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(folder / "ray"),
    )
    deploy(app, settings)


def _wait_until_ready(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            last = error
        if time.monotonic() >= deadline:
            raise LocalStartError(f"The server was not ready within {timeout_s:g} s: {last}. {_SEE_MORE}")
        time.sleep(0.1)


def _stop_ray() -> None:
    import ray
    from ray import serve

    from serving.app import APP_NAME

    try:
        # Not serve.shutdown(): it kills the controller under its own feet, and Ray reports that to the terminal.
        serve.delete(APP_NAME)
    finally:
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what the last server left in TIME_WAIT is no one
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LocalStartError(
                f"{host}:{port} cannot be listened on ({error.strerror}). "
                "Choose another with --port, or 0 for a free one."
            ) from error


def _host_in_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _set(environment: dict[str, str]) -> dict[str, str | None]:
    before = {name: os.environ.get(name) for name in environment}
    for name, value in environment.items():
        os.environ.setdefault(name, value)  # whoever set it knows why
    return before


def _restore(before: dict[str, Any]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
