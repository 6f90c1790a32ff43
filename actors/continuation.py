"""Whether a conversation can go on from a journal, and how well: same bits, flagged, or not at all."""

from __future__ import annotations

from actors.errors import JournalError
from actors.journal import Journal
from actors.messages import OpenRequest
from actors.stage_config import checkpoints_of


def continues(journal: Journal, request: OpenRequest, numerics_id: str) -> bool:
    """Whether a replica of `numerics_id` will say, token by token, what the one that wrote the journal would have.

    Raises JournalError for the journal of another conversation, an excerpt, or one of another checkpoint: other weights
    would make it another agent in the middle of a sentence.
    """
    if (journal.session, journal.spec) != (request.session, request.spec):
        raise JournalError("This journal is another conversation's.")
    if journal.is_excerpt:
        raise JournalError("This is an excerpt of a journal, not all that a rebuild needs.")
    theirs, ours = checkpoints_of(journal.numerics_id), checkpoints_of(numerics_id)
    if theirs and ours and theirs != ours:
        raise JournalError("This conversation was held with another checkpoint, which this replica does not have.")
    return journal.next_frame == 0 or journal.numerics_id == numerics_id
