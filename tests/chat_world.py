"""/api/chat in front of replicas that die: two ingresses, in real time."""

from __future__ import annotations

from dataclasses import dataclass

from actors.interfaces import MonotonicClock
from serving.ingress_chat import ChatEndpoint, ServedModel
from serving.resume import Tickets
from serving.session import ConversationHub
from serving.tenants import Tenants
from tests.chat_fakes import FakeClient
from tests.failover_fakes import World


@dataclass(frozen=True)
class ChatIngress:
    hub: ConversationHub
    endpoint: ChatEndpoint


class ChatWorld:
    """Two ingresses in front of the same replicas, in real time."""

    def __init__(self, tenants: Tenants | None = None) -> None:
        self.world = World(clock=MonotonicClock(), resume_grace_s=5.0)
        self.hubs = [self.world.hub, self.world.ingress("i1")]
        model = ServedModel("demo", trained=False, default_voice="voice")
        self.ingresses = [
            ChatIngress(hub, ChatEndpoint(hub, tenants or Tenants(), self.world.settings, model, Tickets("secret")))
            for hub in self.hubs
        ]

    def connect(self, ingress: int, headers: dict[str, str] | None = None, **query: str) -> FakeClient:
        return FakeClient(self.ingresses[ingress].endpoint, {"audio": "pcm", "seed": "7", **query}, headers or {})

    async def close(self) -> None:
        for hub in self.hubs:
            for conversation in hub.conversations:
                conversation.end()
            await hub.close()
        await self.world.run()
        assert all(not replica.held for replica in self.world.replicas.values())
