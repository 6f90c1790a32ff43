"""What the language model that ships has learnt from: so many numbers of each plan. Imports nothing, for `--help`."""

from __future__ import annotations

SPOKEN = {"first": 12_000, "counter": 1_000, "readings": 100}
SAID_AGAIN = {"again": 16_000, "listening": 4_000, "recitals": 4_000}  # made of the same words, or of text alone
