"""The page at `/` in a real browser: press talk, hear, read, end, be refused; in front of an echo for a replica.

Needs Chromium; without one these tests are skipped and say so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from actors.errors import Draining, EngineLost
from graphs.stages import Sampling
from serving.conversation import Conversation
from tests.browser import Page, find_chromium, open_page
from tests.chat_fakes import VOICES, EchoServer, EchoTrunk, served
from tests.chat_world import ChatWorld
from tests.polling import until

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or set PERSONAPLEX_CHROMIUM"
)


@pytest.fixture(scope="module")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a second of a tone, half a second of silence, for ever."""
    tone = (9000 * np.sin(np.arange(24_000) * 2 * np.pi * 440 / 48_000)).astype(np.int16)
    path = tmp_path_factory.mktemp("microphone") / "tone.wav"
    soundfile.write(path, np.concatenate((tone, np.zeros_like(tone))), 48_000)
    return path


@pytest.fixture
async def page(microphone: Path) -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    async with open_page(CHROMIUM, microphone) as opened:
        await opened.look(width=1200, height=900)
        yield opened


async def text(page: Page, element: str) -> str:
    return str(await page.run(f"document.getElementById('{element}').textContent"))


async def ready(page: Page, url: str) -> None:
    await page.open(url)
    await page.until("!document.getElementById('voice').disabled")


async def press(page: Page, element: str) -> None:
    await page.run(f"document.getElementById('{element}').click()")


def state(name: str) -> str:
    return f"document.getElementById('status').dataset.state === '{name}'"


async def note(page: Page) -> None:
    """Keep every state and text of the status from now on: some last for a moment, and the page may be busy."""
    await page.run(
        """window.told = [];
        for (const id of ['status', 'status-text']) {
            const element = document.getElementById(id);
            const look = () => told.push(element.dataset.state || element.textContent);
            new MutationObserver(look).observe(element, {attributes: true, childList: true, characterData: true});
        }"""
    )


def told(what: str) -> str:
    return f"told.some(each => each.includes('{what}'))"


COLOURED = """(id => {
    const canvas = document.getElementById(id);
    const dots = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let i = 3; i < dots.length; i += 4) count += dots[i] > 128;
    return count;
})"""


@pytest.mark.parametrize("sound", ["pcm", "opus"])
async def test_a_conversation_from_the_click_to_its_end(page: Page, sound: str) -> None:
    server = EchoServer(trunk=EchoTrunk(prompt_s=0.3, answer_s=0.05))
    async with served(server) as url:
        await ready(page, url)
        assert await page.run("[...document.getElementById('voice').options].map(o => o.value)") == list(VOICES)
        line = int(await page.run(f"{COLOURED}('agent-wave')"))
        await page.run(f"document.getElementById('sound').value = '{sound}'")
        await page.run("document.getElementById('voice').value = 'VARM3'; document.getElementById('seed').value = '42'")
        await page.run("[...document.querySelectorAll('.chip')].find(c => c.textContent === 'Teacher').click()")
        await note(page)
        await press(page, "talk")
        await page.until(state("live"))
        for what in ("busy", "Preparing"):
            assert await page.run(told(what))
        await page.until("document.getElementById('said').innerText.includes('hello there')")
        await page.until("document.getElementById('delay').textContent.endsWith('ms')")
        for wave in ("you-wave", "agent-wave"):
            await page.until(f"{COLOURED}('{wave}') > {line + 500}")
        assert (await text(page, "used-seed"), (await text(page, "format")).lower()) == ("42", sound)
        assert "varied, male" in await text(page, "agent-what")
        (opened,) = server.trunk.opened
        assert opened.spec.voice == "VARM3"
        assert opened.spec.role.startswith("You are a wise and friendly teacher")
        assert opened.spec.seed == 42
        await press(page, "talk")
        await page.until(state("idle"))
        assert "You ended" in await text(page, "status-text")
        await server.router.until_held(0)
    # The microphone's tone went all the way: half of what was heard is loud.
    loud = [frame for frame in server.trunk.heard if np.abs(frame.pcm.astype(int)).max() > 1000]
    assert len(loud) > len(server.trunk.heard) / 5
    assert not page.complaints


async def test_the_page_says_when_the_model_cannot_speak(page: Page) -> None:
    async with served(EchoServer(), trained=False) as url:
        await ready(page, url)
        assert await page.run("document.getElementById('untrained').checkVisibility()")
        assert "random weights and cannot speak yet" in await text(page, "untrained")
    async with served(EchoServer(), trained=True) as url:
        await ready(page, url)
        assert not await page.run("document.getElementById('untrained').checkVisibility()")
        assert not await page.run("document.getElementById('notice').checkVisibility()")


async def test_the_page_says_what_is_to_be_known_of_the_model(page: Page) -> None:
    calm = Sampling(0.4, 20, 0.6, 200)
    async with served(
        EchoServer(), trained=True, notice="A small one, <b>not</b> the published.", sampling=calm
    ) as url:
        await ready(page, url)
        assert await page.run("document.getElementById('notice').checkVisibility()")
        assert await text(page, "notice") == "A small one, <b>not</b> the published."
        fields = ("text-temperature", "text-topk", "audio-temperature", "audio-topk")
        left_empty = [await page.run(f"document.getElementById('{field}').placeholder") for field in fields]
        assert left_empty == ["0.4", "20", "0.6", "200"], "what the server takes then"
        assert not await page.run("document.getElementById('untrained').checkVisibility()")


async def test_a_model_that_knows_few_roles_has_them_offered(page: Page) -> None:
    offered = "[...document.querySelectorAll('.chip')].map(c => [c.textContent, c.getAttribute('aria-pressed')])"
    known = [("Café", "You sell coffee."), ("Teacher", "You teach.")]
    async with served(EchoServer(), trained=True, roles=known) as url:
        await ready(page, url)
        assert await page.run(offered) == [["Café", "true"], ["Teacher", "false"]]
        assert await page.run("document.getElementById('role').value") == "You sell coffee."
        # What somebody has written stays, whatever is offered beside it.
        await page.run(
            "document.getElementById('role').value = 'You are a pirate.'; document.getElementById('key').onchange()"
        )
        await page.until("!document.getElementById('voice').disabled")
        assert await page.run("document.getElementById('role').value") == "You are a pirate."


async def test_mute_sends_silence_and_keeps_the_clock(page: Page) -> None:
    server = EchoServer()
    async with served(server) as url:
        await ready(page, url)
        await press(page, "talk")
        await page.until(state("live"))
        await press(page, "mute")
        await page.until("document.getElementById('you-what').textContent === 'muted'")
        before = len(server.trunk.heard)
        await page.until("Number(document.getElementById('clock').textContent.split(':')[1]) >= 3")
        after = server.trunk.heard[before + 3 :]
        assert len(after) > 5
        assert not any(frame.pcm.any() for frame in after)
        await press(page, "talk")
        await page.until(state("idle"))


async def test_refusals_are_told_in_words(page: Page) -> None:
    async with served(EchoServer(slots=0)) as url:
        await ready(page, url)
        await press(page, "talk")
        await page.until(state("bad"))
        assert "Every slot is taken" in await text(page, "trouble")
        assert await text(page, "talk") == "Talk"


async def test_an_end_by_the_server_is_told_and_a_new_start_works(page: Page) -> None:
    server = EchoServer()
    async with served(server) as url:
        await ready(page, url)
        await press(page, "talk")
        await page.until(state("live"))
        for conversation in server.hub.conversations:
            conversation.fail(EngineLost("The engine is gone."))
        await page.until(state("bad"))
        assert "The engine is gone." in await text(page, "trouble")
        await press(page, "talk")
        await page.until(state("live"))
        assert not await page.run("document.getElementById('trouble').checkVisibility()")
        await press(page, "talk")
        await page.until(state("idle"))


async def answered(conversation: Conversation, frames: int) -> bool:
    return conversation.frames_answered > frames


@pytest.mark.parametrize("sound", ["pcm", "opus"])
async def test_the_page_outlives_its_connection(page: Page, sound: str) -> None:
    there = ChatWorld()
    async with there.world.running(), served(there.ingresses[0]) as url:
        await ready(page, url)
        await page.run(f"document.getElementById('sound').value = '{sound}'")
        await press(page, "talk")
        await page.until(state("live"))
        (conversation,) = there.hubs[0].conversations
        await until(lambda: answered(conversation, 10), within_s=60)
        await note(page)
        conversation.desert()
        conversation.fail(Draining("This server is being restarted."))  # 1012, and the slot waits
        await page.until(told("getting it back"))
        await page.until(state("live"))
        (again,) = there.hubs[0].conversations
        assert again.session == conversation.session
        before = again.frames_answered
        assert before >= conversation.frames_answered
        await until(lambda: answered(again, before + 10), within_s=60)
        assert not await page.run("document.getElementById('trouble').checkVisibility()")
        await press(page, "talk")
        await page.until(state("idle"))
        assert "You ended" in await text(page, "status-text")
        await there.close()
    assert not page.complaints


async def test_no_server_behind_the_page(page: Page) -> None:
    async with served(EchoServer()) as url:
        await ready(page, url)
    await press(page, "talk")
    await page.until(state("bad"))
    assert "cannot be reached" in await text(page, "trouble")


async def test_nothing_overflows_on_a_phone_and_the_conversation_comes_first(page: Page) -> None:
    async with served(EchoServer()) as url:
        await page.look(width=390, height=800, dark=True)
        await ready(page, url)
        assert await page.run("document.documentElement.scrollWidth <= 390")
        assert await page.run("document.documentElement.dataset.theme") == "dark"
        await press(page, "talk")
        await page.until(state("live"))
        assert await page.run("document.getElementById('agent-wave').getBoundingClientRect().bottom < 800")
        await press(page, "talk")
        await page.until(state("idle"))


async def test_every_control_has_a_name(page: Page) -> None:
    async with served(EchoServer()) as url:
        await ready(page, url)
        nameless = await page.run(
            """[...document.querySelectorAll('button, select, textarea, input, canvas')]
                .filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim() || e.title)).map(e => e.id)"""
        )
        assert nameless == []
