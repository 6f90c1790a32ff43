"""What `personaplex replicas` and `personaplex drain` ask a running server, and how its refusals are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from serving.cli.console import fail

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 15.0  # a router that was killed is back within this

ServerOption = Annotated[str, typer.Option("--server", metavar="URL", help="A running server.")]
KeyOption = Annotated[
    str | None,
    typer.Option(envvar="PERSONAPLEX_KEY", help="API key of a tenant with admin = true.", show_default=False),
]
DEFAULT_SERVER = "http://localhost:8998"


@dataclass(frozen=True)
class Seen:
    """One replica, as the server tells of it."""

    name: str
    node: str
    address: str  # ws://host:port
    slots: int
    busy: int
    arriving: int
    free: int
    admitting: bool
    draining: bool

    @property
    def host(self) -> str:
        """Of its node."""
        return self.address.rpartition("/")[2].rpartition(":")[0].strip("[]")

    @property
    def held(self) -> int:
        """Conversations that are here."""
        return self.busy + self.arriving

    @property
    def state(self) -> str:
        return "draining" if self.draining else "ready" if self.admitting else "not admitting"


class AdminClient:
    """The admin routes of one server. Whatever goes wrong ends the command with one clear sentence."""

    def __init__(self, server: str, key: str | None) -> None:
        self._server = server.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def replicas(self) -> list[Seen]:
        """All replicas, by name."""
        body = self._ask("GET", "/admin/replicas")
        try:
            return [
                Seen(
                    name=str(each["replica"]),
                    node=str(each["node"]),
                    address=str(each["address"]),
                    slots=int(each["slots"]),
                    busy=int(each["busy"]),
                    arriving=int(each["arriving"]),
                    free=int(each["free"]),
                    admitting=bool(each["admitting"]),
                    draining=bool(each["draining"]),
                )
                for each in body["data"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            fail(f"{self._server} answers, but not as a PersonaPlex server of this version does: {error!r}")

    def drain(self, replica: str) -> None:
        """Have a replica emptied."""
        self._ask("POST", f"/admin/replicas/{quote(replica, safe='')}/drain")

    def _ask(self, method: str, path: str) -> Any:
        import httpx

        try:
            answer = httpx.request(method, self._server + path, headers=self._headers, timeout=TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fail(f"{self._server} cannot be reached ({error}). Is it running? Say where with --server URL.")
        if not answer.is_success:
            fail(_reason(answer))
        return answer.json()


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.request.url} answered {answer.status_code}: is this a PersonaPlex server?"


def chosen(replicas: Sequence[Seen], name: str | None, node: str | None) -> list[Seen]:
    """Those that a name (or the beginning of one) or a node (its Ray id, or the beginning of it, or its host) means.

    Raises LookupError that says what there is.
    """
    if name is not None:
        exact = [each for each in replicas if each.name == name]
        found = exact or [each for each in replicas if each.name.startswith(name)]
        if len(found) > 1:
            raise LookupError(
                f"{name} could be any of {', '.join(each.name for each in found)}: give more of its name."
            )
    else:
        assert node is not None
        found = [each for each in replicas if each.host == node or each.node.startswith(node)]
    if not found:
        there = ", ".join(f"{each.name} (node {each.node[:8]}, {each.host})" for each in replicas) or "none"
        raise LookupError(f"There is no replica {name or f'on {node}'}. There are: {there}.")
    return found
