"""How far a deploy has come: what Serve says of its replicas, put into one sentence, and when that is far enough.

Serve itself calls an application running when the last replica of the former build is gone, which for an ingress is
when the last of its calls ends. Whoever deploys wants to know something else: whether all that is new works, and
whether every conversation has left what is old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SOCKETS = "Ingress"  # the deployment whose replicas carry clients' connections, which cannot move
_RUNNING, _STOPPING = "RUNNING", "STOPPING"


@dataclass(frozen=True)
class Part:
    """One deployment. A former replica is one that ran before this deploy, and has either to be stopped yet (`staying`)
    or is leaving: at its last conversations or sockets."""

    name: str
    wanted: int
    running: int  # new ones that serve
    staying: int
    leaving: int

    @property
    def complete(self) -> bool:
        """Whether the new ones are there, and no former one takes anything new."""
        return self.running >= self.wanted and self.staying == 0

    def __str__(self) -> str:
        what = "ingresses" if self.name == SOCKETS else "replicas"
        told = [f"{min(self.running, self.wanted)} of {self.wanted} {what} are new"]
        told += [f"{self.staying} old to be stopped"] * bool(self.staying)
        told += [f"{self.leaving} old with calls to let go of"] * bool(self.leaving)
        return ", ".join(told)


@dataclass(frozen=True)
class Progress:
    """All deployments of the application, at one look."""

    parts: tuple[Part, ...]
    failure: str = ""  # Serve has given up, and why

    @property
    def serves(self) -> bool:
        """Whether all that is new runs, and every conversation has moved to it: only sockets of the former build are
        left, if anything."""
        done = all(part.complete and (part.name == SOCKETS or part.leaving == 0) for part in self.parts)
        return bool(self.parts) and done

    @property
    def over(self) -> bool:
        """Whether nothing of the former build is left."""
        return self.serves and self.old_ingresses == 0

    @property
    def old_ingresses(self) -> int:
        """Ingresses of the former build that still carry calls."""
        return sum(part.leaving for part in self.parts if part.name == SOCKETS)

    def __str__(self) -> str:
        return "; ".join(map(str, self.parts)) or "Serve is reading the application"


def replicas_of(application: Mapping[str, Any]) -> frozenset[str]:
    """Ids of all replicas of an application as Serve's REST schema shows it (ApplicationDetails)."""
    deployments = application.get("deployments", {}).values()
    return frozenset(replica["replica_id"] for each in deployments for replica in each["replicas"])


def progress(application: Mapping[str, Any], former: frozenset[str]) -> Progress:
    """application: as above, now; `former`: `replicas_of` it before the deploy."""
    parts = []
    for name, deployment in sorted(application.get("deployments", {}).items(), reverse=True):
        # Serve's states are enumerations over strings: equal to these, and shown otherwise.
        new = [each["state"] for each in deployment["replicas"] if each["replica_id"] not in former]
        old = [each["state"] for each in deployment["replicas"] if each["replica_id"] in former]
        part = Part(
            name=name,
            wanted=int(deployment["target_num_replicas"]),
            running=sum(state == _RUNNING for state in new),
            staying=sum(state != _STOPPING for state in old),
            leaving=sum(state == _STOPPING for state in old),
        )
        parts.append(part)
    failed = application.get("status") == "DEPLOY_FAILED"
    return Progress(tuple(parts), str(application.get("message") or "it does not say why") if failed else "")
