"""Looks into the journals of conversations while they go on, through the server's admin API, and keeps what it saw."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

_EVERY_S = 1.0
_AGAIN_S = 0.25
_TIMEOUT_S = 2.0  # while who should answer is dying; a codec's frames are kept for some seconds only


@dataclass
class Seen:
    """One conversation's journal, put together from many looks.

    `tokens`: by frame number, the text token and the agent's eight codes, as first seen. `changed`: frames that later
    looks showed with other tokens: history that was rewritten. `homes`: (epoch, replica), each once, in order.
    """

    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    changed: list[int] = field(default_factory=list)
    homes: list[tuple[int, str]] = field(default_factory=list)
    numerics: list[str] = field(default_factory=list)
    next_frame: int = 0
    apart: bool = True  # as last told: slot and journal are on two nodes, and one's death does not take both
    looks: int = 0
    trouble: str = ""  # why the last look that failed did

    def add(self, journal: dict[str, Any]) -> None:
        self.looks += 1
        self.next_frame = int(journal["next_frame"])
        self.apart = bool(journal.get("apart", self.apart))  # only the call's own ingress says
        home = (int(journal["epoch"]), str(journal["replica"]))
        if home not in self.homes:
            self.homes.append(home)
        if journal["numerics_id"] not in self.numerics:
            self.numerics.append(journal["numerics_id"])
        for row in journal["frames"]:
            frame, tokens = int(row["frame"]), (int(row["text_token"]), *map(int, row["codes"]))
            if self.tokens.setdefault(frame, tokens) != tokens and frame not in self.changed:
                self.changed.append(frame)

    @property
    def last(self) -> int:
        """The highest frame seen; looks begin there, so that each frame is seen at least twice."""
        return max(self.tokens, default=0)


class AdminClient:
    """The admin routes of a server, as far as a witness needs them. Raises httpx.HTTPError when they do not answer."""

    def __init__(self, server: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # No connection is kept: the next look may have to go another way than the last.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(base_url=server, headers=headers, timeout=_TIMEOUT_S, limits=limits)

    async def journal(self, session: str, first: int) -> dict[str, Any]:
        return await self._get(f"/admin/conversations/{session}/journal", {"from": first})

    async def replicas(self) -> list[dict[str, Any]]:
        answer = await self._get("/admin/replicas", {})
        found = answer["data"]
        assert isinstance(found, list), answer
        return found

    async def rooms(self) -> str:
        """What each replica holds and would still take, in words; never raises."""
        try:
            found = await self.replicas()
        except httpx.HTTPError as error:
            return f"nobody says what is free: {type(error).__name__}"
        return ", ".join(f"{each['busy']}+{each['arriving']} held, {each['free']} free" for each in found)

    async def conversations(self) -> dict[str, Any]:
        """Those that one of the ingresses carries, whichever answers, and its name, node and process."""
        return await self._get("/admin/conversations", {})

    async def drain(self, replica: str) -> None:
        answer = await self._http.post(f"/admin/replicas/{quote(replica, safe='')}/drain")
        answer.raise_for_status()

    async def close(self) -> None:
        await self._http.aclose()

    async def _get(self, path: str, query: dict[str, Any]) -> dict[str, Any]:
        answer = await self._http.get(path, params=query)
        answer.raise_for_status()
        found = answer.json()
        assert isinstance(found, dict)
        return found


async def look(admin: AdminClient, session: str, seen: Seen) -> bool:
    """One look at one journal; False if it could not be had just now."""
    try:
        seen.add(await admin.journal(session, max(0, seen.last - 1)))
    except httpx.HTTPStatusError as error:
        seen.trouble = f"HTTP {error.response.status_code} from {error.request.url.path}: {error.response.text[:200]}"
        return False
    except (httpx.HTTPError, KeyError, ValueError) as error:
        seen.trouble = f"{type(error).__name__}: {error}"
        return False
    return True


async def watch(admin: AdminClient, sessions: dict[str, Seen]) -> None:
    """Looks at all of them again and again, until cancelled."""
    while True:
        await asyncio.gather(*(look(admin, session, seen) for session, seen in sessions.items()))
        await asyncio.sleep(_EVERY_S)


async def look_until(admin: AdminClient, session: str, seen: Seen, frames: int, within_s: float) -> None:
    """Looks until `frames` frames are there, or `within_s` is over."""
    for _ in range(int(within_s / _AGAIN_S)):
        if await look(admin, session, seen) and seen.next_frame >= frames:
            return
        await asyncio.sleep(_AGAIN_S)
