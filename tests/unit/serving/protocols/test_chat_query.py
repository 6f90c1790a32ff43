"""The query of /api/chat: defaults, limits, and one clear sentence for each mistake."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import BadRequest, RoleTooLong
from graphs.stages import Sampling, SessionSpec
from serving.protocols.chat_query import MAX_SEED, ChatRequest, parse_query


def parse(query: dict[str, str]) -> ChatRequest:
    return parse_query(query, role_max_chars=4000, draw_seed=lambda: 99)


def test_nothing_given_is_the_published_default() -> None:
    assert parse({}) == ChatRequest(voice=None, role="", seed=99, sampling=Sampling())


def test_what_the_checkpoint_recommends_holds_where_nothing_is_named_and_nowhere_else() -> None:
    calm = Sampling(0.4, 20, 0.6, 100)
    assert parse_query({}, role_max_chars=1, sampling=calm).sampling == calm
    named = {"text_temperature": "0.7", "audio_topk": "250"}
    assert parse_query(named, role_max_chars=1, sampling=calm).sampling == Sampling(0.7, 20, 0.6, 250)


def test_livekits_query() -> None:
    request = parse({"voice_prompt": "NATF2.pt", "text_prompt": "You are a helpful assistant.", "seed": "7"})
    assert request.spec("NATM0") == SessionSpec("NATF2.pt", "You are a helpful assistant.", 7)
    assert request.not_applied == ()


def test_the_published_web_clients_query() -> None:
    request = parse(
        {
            "worker_auth_id": "w", "email": "a@b.c", "text_temperature": "0.65", "text_topk": "30",
            "audio_temperature": "0", "audio_topk": "512", "pad_mult": "0", "text_seed": "1", "audio_seed": "2",
            "repetition_penalty_context": "64", "repetition_penalty": "1", "text_prompt": "", "voice_prompt": "VARM1",
        }
    )  # fmt: skip
    assert request.sampling == Sampling(0.65, 30, 0.0, 512)
    assert request.voice == "VARM1"
    assert request.seed == 99
    assert request.not_applied == (
        "audio_seed", "email", "pad_mult", "repetition_penalty", "repetition_penalty_context", "text_seed",
        "worker_auth_id",
    )  # fmt: skip


def test_our_own_parameters() -> None:
    request = parse({"audio": "pcm", "audio_rate": "48000", "silence_gate": "true", "api_key": "secret"})
    assert (request.audio, request.pcm_rate_hz, request.silence_gate, request.api_key) == (
        "pcm",
        48_000,
        True,
        "secret",
    )
    assert request.not_applied == ()
    assert "secret" not in repr(request)


def test_a_voice_is_a_name_and_passed_on_as_one() -> None:
    assert parse({"voice_prompt": "../../etc/passwd"}).voice == "../../etc/passwd"  # no such voice, says the checkpoint
    assert parse({}).spec("NATM0").voice == "NATM0"
    with pytest.raises(BadRequest, match="no voice's name"):
        parse({"voice_prompt": "a" * 5000})


def test_what_nobody_knows_is_listed() -> None:
    assert parse({"colour": "blue"}).not_applied == ("colour",)


@pytest.mark.parametrize("seed", ["-1", "", "  "])
def test_no_seed_draws_one(seed: str) -> None:
    assert parse({"seed": seed}).seed == 99


def test_drawn_seeds_differ() -> None:
    seeds = {parse_query({}, role_max_chars=1).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"seed": "banana"}, "seed is a whole number from 0 to 9223372036854775807, not 'banana'"),
        ({"seed": "1.5"}, "seed is a whole number"),
        ({"seed": str(2**63)}, "seed is a whole number"),
        ({"seed": "-2"}, "seed is a whole number"),
        ({"seed": "9" * 5000}, "seed is a whole number"),
        ({"text_temperature": "nan"}, "text_temperature is a number from 0.0 to 2.0"),
        ({"text_temperature": "inf"}, "text_temperature is a number"),
        ({"audio_temperature": "2.01"}, "audio_temperature is a number"),
        ({"audio_temperature": "-0.1"}, "audio_temperature is a number"),
        ({"text_topk": "0"}, "text_topk is a whole number from 1 to 512"),
        ({"audio_topk": "513"}, "audio_topk is a whole number from 1 to 512"),
        ({"audio": "mp3"}, "audio is opus or pcm, not 'mp3'"),
        ({"audio_rate": "1"}, "audio_rate is a whole number from 8000 to 96000"),
        ({"silence_gate": "maybe"}, "silence_gate is true or false, not 'maybe'"),
    ],
)
def test_mistakes_are_named(query: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(query)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_role_of_100_000_characters() -> None:
    with pytest.raises(RoleTooLong, match="100000 characters; 4000 are allowed"):
        parse({"text_prompt": "x" * 100_000})
    assert parse({"text_prompt": "x" * 4000}).role == "x" * 4000


NAMES = st.sampled_from(["seed", "text_topk", "audio_temperature", "audio", "silence_gate", "voice_prompt", "x"])


@given(st.dictionaries(NAMES, st.text(max_size=60)))
def test_whatever_is_asked_is_a_request_or_a_bad_request(query: dict[str, str]) -> None:
    try:
        request = parse(query)
    except BadRequest:
        return
    assert 0 <= request.seed <= MAX_SEED
