"""Every error a caller of this system can meet, as one tree.

    ServingError                internal            ours to fix; the message is safe to show
    ├── BadRequest              bad_request         what was asked for cannot be done as asked
    │   ├── UnknownVoice        unknown_voice
    │   └── RoleTooLong         role_too_long
    ├── Unauthorized            unauthorized        no key, or a key we do not know
    ├── Refused                 refused             well asked, but not here and now
    │   ├── NoCapacity          no_capacity         every slot is taken
    │   ├── TenantLimit         tenant_limit        the tenant's own limit is reached
    │   └── Draining            draining            this replica takes no new conversations
    ├── NotYours                not_yours           a message about something its sender does not own
    │   ├── StaleEpoch          stale_epoch         the conversation has changed hands since
    │   ├── UnknownSession      unknown_session     no such conversation here
    │   └── UnknownReplica      unknown_replica     no replica of this name
    ├── ClientFault             client_fault        the conversation ended because of its own client
    │   ├── SlowClient          slow_client         it stopped reading
    │   └── IdleClient          idle_client         it sent nothing
    ├── Lost                    lost                the conversation ended because of us
    │   ├── EngineLost          engine_lost         an actor that held its state died
    │   ├── ReplicaLost         replica_lost        the whole replica is out of reach
    │   └── ConversationBroken  conversation_broken this conversation's state is unusable, no other's is
    ├── Quarantined             quarantined         the conversation has killed what served it, more than once
    └── JournalError            bad_journal         these bytes are not a journal we can continue from

`code` is stable and travels on the wire (`messages.Failed.code`); `from_code` turns it back into its class on
the other side. `next_step` says what the reader should do. Both survive pickling: Ray ships errors between
processes, and only `args` and the instance's dictionary make that journey.
"""

from __future__ import annotations

from typing import ClassVar


class ServingError(Exception):
    """Base of all. `message` is one sentence for a human; it never holds secrets, paths or a stack."""

    code: ClassVar[str] = "internal"
    default_next_step: ClassVar[str] = "Try again; if it happens twice, report it with the time it happened."

    def __init__(self, message: str, next_step: str | None = None) -> None:
        # All of it goes into args, so that the default unpickling calls this constructor with the same values.
        # The attributes are the instance's own: Ray's mixed-in error class looks them up on the cause.
        super().__init__(message, next_step)
        self.message = message
        self.next_step = self.default_next_step if next_step is None else next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()


class BadRequest(ServingError):
    code = "bad_request"
    default_next_step = "Correct the request and send it again."


class UnknownVoice(BadRequest):
    code = "unknown_voice"
    default_next_step = "Ask /v1/voices for the names there are."


class RoleTooLong(BadRequest):
    code = "role_too_long"
    default_next_step = "Shorten the role."


class Unauthorized(ServingError):
    code = "unauthorized"
    default_next_step = "Send a valid API key."


class Refused(ServingError):
    code = "refused"
    default_next_step = "Try again in a few seconds."


class NoCapacity(Refused):
    code = "no_capacity"


class TenantLimit(Refused):
    code = "tenant_limit"
    default_next_step = "End another conversation first, or ask for a higher limit."


class Draining(Refused):
    code = "draining"


class NotYours(ServingError):
    code = "not_yours"
    default_next_step = "Ask the router who owns the conversation."


class StaleEpoch(NotYours):
    code = "stale_epoch"


class UnknownSession(NotYours):
    code = "unknown_session"
    default_next_step = "Open the conversation again."


class UnknownReplica(NotYours):
    code = "unknown_replica"
    default_next_step = "Ask for the replicas there are: personaplex replicas."


class ClientFault(ServingError):
    code = "client_fault"
    default_next_step = "Connect again."


class SlowClient(ClientFault):
    code = "slow_client"
    default_next_step = "Connect again, and read audio as fast as it is sent."


class IdleClient(ClientFault):
    code = "idle_client"
    default_next_step = "Connect again, and send audio."


class Lost(ServingError):
    code = "lost"
    default_next_step = "Connect again."


class EngineLost(Lost):
    code = "engine_lost"


class ReplicaLost(Lost):
    code = "replica_lost"


class ConversationBroken(Lost):
    code = "conversation_broken"


class Quarantined(ServingError):
    code = "quarantined"
    default_next_step = "Start a new conversation, and report this one with the time it ended."


class JournalError(ServingError):
    code = "bad_journal"
    default_next_step = "Start a new conversation; this one cannot be continued."


def _tree(root: type[ServingError]) -> list[type[ServingError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


# Fixed at import: a subclass made later (Ray derives one per error it ships) must not take over a code.
BY_CODE: dict[str, type[ServingError]] = {cls.code: cls for cls in _tree(ServingError)}


def from_code(code: str, message: str, next_step: str | None = None) -> ServingError:
    """The error a code off the wire stands for; a code of a newer build becomes its nearest relative we know."""
    return BY_CODE.get(code, ServingError)(message, next_step)
