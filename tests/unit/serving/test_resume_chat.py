"""Coming back over /api/chat: at another ingress, impatiently, with somebody else's token."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import numpy as np

from serving.tenants import Tenants
from tests.chat_world import ChatWorld
from tests.fake_replica import spoken


def said(number: int) -> bytes:
    return b"\x01" + spoken(number).astype("<i2").tobytes()


async def test_over_the_socket_at_another_ingress() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0, resume="1")
        told = await client.live()
        assert told["resumed"] is False
        assert (told["first_frame"], told["heard_frames"]) == (0, 0)
        for number in range(6):
            client.say(said(number))
        for number in range(6):
            assert await client.hear_kind(1) == (spoken(number) + 1).astype("<i2").tobytes()
        client.vanish()
        await client.ended()
        again = there.connect(1, resume=told["resume_token"], missed="replay", have="4")
        told_again = await again.live()
        assert told_again["session"] == told["session"]
        assert told_again["seed"] == "7"
        assert told_again["resumed"] is True
        assert (told_again["first_frame"], told_again["heard_frames"]) == (4, 6)
        assert told_again["resume_token"] != told["resume_token"]
        again.say(said(6))
        for number in range(4, 7):
            assert await again.hear_kind(1) == (spoken(number) + 1).astype("<i2").tobytes()
        late = there.connect(0, resume=told["resume_token"])
        sentence, code = await late.refusal()
        assert code == 1008
        assert "resume token" in sentence
        again.hang_up()
        await again.ended()
        await there.hubs[1].close()
        assert not there.world.router.leases, "who hangs up is not waited for"
        await there.close()


async def test_who_comes_back_and_loses_patience_comes_back_again_with_the_same_token() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0, resume="1")
        told = await client.live()
        client.say(said(0))
        await client.hear_kind(1)
        client.vanish()
        await client.ended()
        there.world.router.gate.clear()  # the router is away for a while
        impatient = there.connect(1, resume=told["resume_token"])
        await asyncio.sleep(0.01)
        impatient.hang_up()  # before it was told anything, and as politely as can be
        there.world.router.gate.set()
        await impatient.ended()
        assert there.hubs[1].live == 1, "its slot waits"
        lost = there.connect(1, resume=told["resume_token"])
        await lost.live()  # it is told the next token, and whether that arrives nobody knows
        lost.vanish()
        await lost.ended()
        again = there.connect(1, resume=told["resume_token"])
        told_again = await again.live()
        assert told_again["session"] == told["session"]
        again.say(said(1))
        await again.hear_kind(1)
        again.vanish()
        await again.ended()
        late = there.connect(1, resume=told["resume_token"])
        assert (await late.refusal())[1] == 1008, "it has spoken since, so it has the next one"
        last = there.connect(0, resume=told_again["resume_token"])
        await last.live()
        last.hang_up()
        await last.ended()
        await there.close()


async def test_one_message_of_audio_for_each_frame_even_if_there_is_nothing_to_hear() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0, resume="1", silence_gate="1")
        await client.live()
        client.say(b"\x01" + np.full(1920, -1, dtype="<i2").tobytes())  # answered with zeros
        assert await client.hear_kind(1) == b""
        client.hang_up()
        await client.ended()
        await there.close()


async def test_a_client_without_a_token_is_not_waited_for() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0)
        assert "resume_token" not in await client.live()
        client.vanish()
        await client.ended()
        await there.hubs[0].close()
        assert not there.world.router.leases
        await there.close()


async def test_a_token_is_its_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    tenants = [
        {"name": name, "keys": [f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"]} for name in ("ali", "eve")
    ]
    keys.write_text(json.dumps({"tenants": tenants}))
    there = ChatWorld(Tenants.load(keys))
    async with there.world.running():
        client = there.connect(0, {"Authorization": "Bearer ali"}, resume="1")
        token = (await client.live())["resume_token"]
        client.vanish()
        await client.ended()
        thief = there.connect(0, {"Authorization": "Bearer eve"}, resume=token)
        assert (await thief.refusal())[1] == 1008
        owner = there.connect(0, {"Authorization": "Bearer ali"}, resume=token)
        assert (await owner.live())["resumed"] is True
        owner.hang_up()
        await owner.ended()
        await there.close()
