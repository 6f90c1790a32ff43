"""Journal: round trips, holes, anchors, and bytes that are no journal."""

from __future__ import annotations

import struct
import zlib

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import journal as journal_module
from actors import journal_bytes
from actors.errors import JournalError
from actors.journal import Control, Journal
from actors.journal_bytes import HEADER, MAGIC, VERSION
from graphs.stages import Sampling, SessionSpec

Rows = npt.NDArray[np.int16]
SPEC = SessionSpec("NATF0", "You are a baker.", 7)


def row(width: int, value: int) -> Rows:
    return ((np.arange(width) * 7 + value * 131) % 30_000 - 2).astype(np.int16)


def grown(frames: int, *, receptive_s: float = 0.4, heard_ahead: int = 0, spec: SessionSpec = SPEC) -> Journal:
    """A journal of `frames` steps; 0.4 s of PCM are 5 frames."""
    journal = Journal("s1", spec, receptive_s)
    journal.begin("hash", 31, "build-1")
    for frame in range(frames + heard_ahead):
        journal.heard(frame, row(1920, frame))
    for frame in range(frames):
        journal.record(frame, row(17, frame), row(8, frame), row(8, frame + 1))
    return journal


def same(a: Journal, b: Journal) -> None:
    assert (a.session, a.spec, a.prompt_hash, a.prompt_frames) == (b.session, b.spec, b.prompt_hash, b.prompt_frames)
    assert (a.numerics_id, a.anchor_frame, a.controls) == (b.numerics_id, b.anchor_frame, b.controls)
    assert (a.first_row, a.next_frame, a.heard_frames) == (b.first_row, b.next_frame, b.heard_frames)
    np.testing.assert_array_equal(a.pending, b.pending)
    for name in ("rows", "pcm", "user_codes", "agent_codes"):
        assert getattr(a, name).start == getattr(b, name).start
        np.testing.assert_array_equal(getattr(a, name).array(), getattr(b, name).array())


specs = st.builds(
    SessionSpec,
    voice=st.text(max_size=20),
    role=st.text(st.characters(codec=None), max_size=50),
    seed=st.integers(0, 2**63 - 1),
    sampling=st.builds(Sampling, st.floats(0, 10), st.integers(1, 2048), st.floats(0, 10), st.integers(1, 2048)),
    role_tokens=st.none() | st.lists(st.integers(0, 32_000), max_size=5).map(tuple),
)
controls = st.lists(
    st.tuples(st.sampled_from(["force_text", "mute", "sampling"]), st.lists(st.floats(-10, 10), max_size=4)), max_size=4
)


@settings(max_examples=150, deadline=None)
@given(st.data(), specs, controls)
def test_a_journal_survives_the_journey(
    data: st.DataObject, spec: SessionSpec, said: list[tuple[str, list[float]]]
) -> None:
    frames = data.draw(st.integers(0, 14))
    journal = grown(frames, heard_ahead=data.draw(st.integers(0, 3)), spec=spec)
    if frames and data.draw(st.booleans()):
        anchor = data.draw(st.integers(1, frames))
        journal.anchor(anchor, data.draw(st.integers(0, anchor)))
    for kind, values in said:
        journal.control(frames, kind, values)
    if data.draw(st.booleans()):
        journal.pending = np.stack([row(17, 1), np.full(17, -2, dtype=np.int16)])
    same(Journal.from_bytes(journal.to_bytes(), 0.4), journal)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_journal_gives_one_clear_error(data: st.DataObject) -> None:
    blob = bytearray(grown(3).to_bytes())
    match data.draw(st.sampled_from(["flip", "cut", "grow"])):
        case "flip":
            blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del blob[data.draw(st.integers(0, len(blob) - 1)) :]
        case "grow":
            blob += data.draw(st.binary(min_size=1, max_size=40))
    with pytest.raises(JournalError):
        Journal.from_bytes(bytes(blob))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_foreign_bytes_give_one_clear_error(blob: bytes) -> None:
    with pytest.raises(JournalError):
        Journal.from_bytes(blob)


def repacked(**changes: object) -> bytes:
    """A journal whose frame is sound and whose map was tampered with; None removes a field."""
    fields = msgpack.unpackb(grown(3).to_bytes()[HEADER.size :])
    fields.update(changes)
    body = msgpack.packb({name: value for name, value in fields.items() if value is not None})
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(body)) + body


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"session": None}, "'session' is missing"),
        ({"session": 5}, "'session' is missing or of the wrong kind"),
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": True}, "'seed' is missing or of the wrong kind"),
        ({"seed": 2**63}, "'seed' is 9223372036854775808"),
        ({"sampling": [0.7, 25, 0.8]}, "'sampling' does not hold 4 numbers"),
        ({"sampling": [0.7, 25, float("nan"), 250]}, "'sampling' does not hold 4 numbers"),
        ({"role_tokens": [1, -5]}, "'role_tokens' does not hold tokens"),
        ({"rows": b"x" * 33}, "'rows' has 33 bytes"),
        ({"pending": bytes(34 * 17)}, "'pending' has 578 bytes"),
        ({"rows": b""}, "came with codes up to frame 3"),
        ({"pcm": b""}, "only 0 frames of the user"),
        ({"first_row": 1}, "came with codes up to frame 3"),
        ({"anchor_frame": 9}, "anchor at frame 9"),
        ({"controls": [[1, "sing", []]]}, "no control 'sing'"),
        ({"controls": [[1, "mute"]]}, "unreadable control"),
        ({"controls": [["1", "mute", [1]]]}, "unreadable control"),
        ({"controls": [[5, "mute", [1]], [4, "mute", [0]]]}, "control for frame 4 came after"),
        ({"controls": 3}, "'controls' is missing"),
    ],
)
def test_what_is_wrong_with_a_journal_is_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(JournalError, match=complaint):
        Journal.from_bytes(repacked(**changes))


def test_a_journal_of_another_version_is_named() -> None:
    body = msgpack.packb({})
    with pytest.raises(JournalError, match="version 2, this build reads version 1"):
        Journal.from_bytes(HEADER.pack(MAGIC, 2, zlib.crc32(body)) + body)


def test_a_sound_frame_around_no_map_is_refused() -> None:
    for body in (msgpack.packb([1]), b"\xc1", b"\x91" * 2000, msgpack.packb({1: 2}), struct.pack(">BI", 0xDF, 2**31)):
        with pytest.raises(JournalError, match="no readable map"):
            Journal.from_bytes(HEADER.pack(MAGIC, VERSION, zlib.crc32(body)) + body)


def test_a_journal_that_is_too_big_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = grown(3).to_bytes()
    monkeypatch.setattr(journal_bytes, "MAX_BYTES", len(blob) - 1)
    with pytest.raises(JournalError, match="at most"):
        Journal.from_bytes(blob)


def test_rows_grow_while_pcm_and_codes_keep_to_the_receptive_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.journal.PCM_AHEAD", 0)
    journal = grown(12)
    assert (journal.first_row, journal.next_frame, len(journal.rows.array())) == (0, 12, 12)
    for log in (journal.pcm, journal.user_codes, journal.agent_codes):
        assert (log.start, log.next, len(log.array())) == (7, 12, 5)
    np.testing.assert_array_equal(journal.pcm.array()[0], row(1920, 7))


def test_noting_a_frame_twice_changes_nothing_and_a_hole_is_refused() -> None:
    journal = grown(3)
    assert journal.heard(1, row(1920, 9)) is False
    assert journal.record(2, row(17, 9), row(8, 9), row(8, 9)) is False
    same(journal, grown(3))
    with pytest.raises(JournalError, match="frame 5 came where frame 3 was due"):
        journal.heard(5, row(1920, 5))
    with pytest.raises(JournalError, match="before it was heard"):
        journal.record(3, row(17, 3), row(8, 3), row(8, 3))


def test_what_the_caller_does_with_its_array_afterwards_is_not_the_journals_business() -> None:
    journal, pcm = Journal("s", SPEC), row(1920, 1)
    journal.heard(0, pcm)
    pcm[:] = 0
    np.testing.assert_array_equal(journal.pcm.array()[0], row(1920, 1))


def test_an_anchor_forgets_what_came_before_its_first_row() -> None:
    journal = grown(10)
    journal.anchor(10, 6)
    assert (journal.anchor_frame, journal.first_row, journal.next_frame) == (10, 6, 10)
    np.testing.assert_array_equal(journal.rows.array()[0], row(17, 6))
    with pytest.raises(JournalError, match="does not fit"):
        journal.anchor(11, 6)
    with pytest.raises(JournalError, match="does not fit"):
        journal.anchor(10, 5)


def test_a_row_of_the_wrong_shape_or_type_is_refused() -> None:
    journal = Journal("s", SPEC)
    with pytest.raises(JournalError, match=r"\[1920\] int16"):
        journal.heard(0, row(960, 0))
    with pytest.raises(JournalError, match=r"\[1920\] int16"):
        journal.heard(0, row(1920, 0).astype(np.float32))  # type: ignore[arg-type] # the mistake under test


def test_rows_and_controls_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = grown(3, heard_ahead=1)
    monkeypatch.setattr(journal_module, "MAX_ROWS", 3)
    monkeypatch.setattr(journal_module, "MAX_CONTROLS", 1)
    with pytest.raises(JournalError, match="at most"):
        journal.record(3, row(17, 3), row(8, 3), row(8, 3))
    journal.control(3, "mute", [1])
    with pytest.raises(JournalError, match="1 controls at most"):
        journal.control(3, "mute", [0])


def test_a_control_of_a_kind_that_is_known_is_kept() -> None:
    journal = grown(2)
    journal.control(2, "sampling", (0.0, 1, 0.0, 1))
    assert journal.controls == [Control(2, "sampling", (0.0, 1, 0.0, 1))]
    with pytest.raises(JournalError, match="no control 'dance'"):
        journal.control(2, "dance", [])


def test_audio_is_kept_for_what_is_under_way_as_well() -> None:
    """A rebuild counts back from what was answered, while frames that are not answered yet push audio out."""
    journal = grown(60, heard_ahead=journal_module.PCM_AHEAD)
    encoder, decoder = journal.codec_pasts()
    assert (encoder.next_frame, len(encoder.rows)) == (60, 5) == (decoder.next_frame, len(decoder.rows))
    assert np.array_equal(encoder.rows, np.stack([row(1920, frame) for frame in range(55, 60)]))
    assert np.array_equal(decoder.rows, np.stack([row(8, frame + 1) for frame in range(55, 60)]))
    assert encoder.first_frame == 55


def test_an_excerpt_is_small_and_cannot_be_continued() -> None:
    journal = grown(12, receptive_s=0.8, heard_ahead=3)
    journal.pending = row(17, 99)[None]
    part = Journal.from_bytes(journal.excerpt(9).to_bytes())
    assert (part.first_row, part.next_frame, part.heard_frames) == (9, 12, 15)
    assert np.array_equal(part.rows.array(), np.stack([row(17, frame) for frame in (9, 10, 11)]))
    assert np.array_equal(part.agent_codes.array(), np.stack([row(8, frame + 1) for frame in (9, 10, 11)]))
    assert np.array_equal(part.pending, journal.pending)
    assert len(part.pcm.array()) == 0
    for ask in (part.past, part.codec_pasts):
        with pytest.raises(JournalError, match="excerpt"):
            ask()
    assert not journal.is_excerpt
    assert journal.codec_pasts()[0].next_frame == 12


@pytest.mark.parametrize("first_row", [0, 2, 12, 500])
def test_an_excerpt_gives_what_is_kept_of_what_is_asked_for(first_row: int) -> None:
    journal = grown(12)
    journal.anchor(10, 4)
    part = Journal.from_bytes(journal.excerpt(first_row).to_bytes())
    assert (part.first_row, part.next_frame) == (min(max(first_row, 4), 12), 12)
    assert (part.user_codes.start, part.user_codes.next) == (min(max(first_row, 7), 12), 12)
    assert part.anchor_frame == 10


def test_a_journal_whose_audio_begins_too_late_is_none() -> None:
    journal = grown(5, heard_ahead=3)
    journal.pcm.drop_before(6)
    with pytest.raises(JournalError, match="from 6 on"):
        Journal.from_bytes(journal.to_bytes())
