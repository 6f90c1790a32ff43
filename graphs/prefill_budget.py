"""How many prefill rows a step may carry beside its live rows, from how long steps have taken.

A live frame waits for the step that is running when it comes and then for its own, so both together have to leave room
in its 80 ms for codec and network. What a row costs (machine, model, neighbours) is measured as it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from graphs.attention import ROW_PAD
from graphs.kv_cache import round_up
from models.config import FRAME_MS

STEP_MS = 0.35 * FRAME_MS  # two steps are 56 ms; encode, decode and the batching window have the other 24
# Of that, what live frames wait for rows that are not theirs: beside their own, and in the step that is running when
# they come. A GPU, which reads its weights once for all of them, has a whole tile done in that. On a CPU rows cost the
# same between frames as beside them, and between frames nobody waits for most of them.
OTHERS_MS = 0.1 * FRAME_MS
LEAST_ROWS = 8  # a prompt always advances, or an overloaded engine would never let anybody in
_MEMORY = 0.2  # weight of the newest measurement: five steps back counts for a third


class PrefillBudget:
    """Learns what live rows and prefill rows cost; answers with a number of rows. One engine, one thread.

    tile: the most rows a step can take. step_ms: how long a step with live rows may become, and others_ms: how much
    of that its prefill rows may take. clock: monotonic seconds.
    """

    def __init__(
        self,
        tile: int,
        *,
        step_ms: float = STEP_MS,
        others_ms: float = OTHERS_MS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tile = tile
        self.step_ms = step_ms
        self.others_ms = others_ms
        self.clock = clock
        self._live_ms: dict[int, float] = {}  # live rows, in fours → ms of a step without prefill
        self._row_ms: float | None = None

    def rows(self, live: int, *, anybody_live: bool = True, left_ms: float | None = None) -> int:
        """Prefill rows for a step with `live` live rows.

        anybody_live: whether a conversation could send a frame while the step runs; if none can, nothing waits.
        left_ms: what remains until the step has to be done, where the caller knows better than the two limits.
        """
        if not anybody_live:
            return self.tile
        if self._row_ms is None:
            return min(LEAST_ROWS, self.tile)
        expected_ms = self._expected_ms(live)
        spare_ms = min(self.step_ms - expected_ms, self.others_ms) if left_ms is None else left_ms - expected_ms
        affordable = int(max(0.0, spare_ms) / max(self._row_ms, 1e-6))
        return min(self.tile, max(LEAST_ROWS, affordable // ROW_PAD * ROW_PAD))

    def note(self, live: int, prefill: int, took_ms: float) -> None:
        """A step of `live` and `prefill` rows took so long. One without live rows goes behind all frames of this
        machine and may have stood there: it can only show that rows cost less."""
        if prefill == 0:
            key = _in_fours(live)
            self._live_ms[key] = _blend(self._live_ms.get(key), took_ms)
        elif prefill >= LEAST_ROWS:
            row_ms = max(0.0, took_ms - self._expected_ms(live)) / prefill
            if live == 0 and self._row_ms is not None and row_ms > self._row_ms:
                return
            # Slow steps are believed at once, fast ones only after a while: a missed deadline is heard. But not more
            # than twice as slow: once, that may have been anything.
            if self._row_ms is None or row_ms > self._row_ms:
                self._row_ms = row_ms if not self._row_ms else min(row_ms, 2 * self._row_ms)
            else:
                self._row_ms = _blend(self._row_ms, row_ms)

    def _expected_ms(self, live: int) -> float:
        """Of a step without prefill; from the nearest count measured, 0 as long as none was."""
        if not live or not self._live_ms:
            return 0.0
        key = min(self._live_ms, key=lambda known: abs(known - _in_fours(live)))
        return self._live_ms[key] * max(1.0, _in_fours(live) / key)


def share(budget: int, wanted: Sequence[int]) -> list[int]:
    """Splits `budget` rows among prompts that still want so many: evenly, what one does not need goes to the others,
    what does not divide to those who came first.

    So a journal of thousands of rows does not keep a prompt of a hundred waiting.
    """
    given = [0] * len(wanted)
    hungry = [i for i, want in enumerate(wanted) if want > 0]
    while budget > 0 and hungry:
        each = max(1, budget // len(hungry))
        for i in hungry:
            portion = min(each, wanted[i] - given[i], budget)
            given[i] += portion
            budget -= portion
        hungry = [i for i in hungry if given[i] < wanted[i]]
    return given


def _in_fours(rows: int) -> int:
    return round_up(rows, ROW_PAD)  # as the step pads them


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - _MEMORY) * old + _MEMORY * new
