"""The slot engine: which slot reads which column next, prompts and journals prefilled beside live frames.

Slots are plain numbers here; who owns one, and in which order frames may come, is the business of `actors`. A slot's
keys lie in a ring of the cache; an anchor gives it another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graphs.anchors import AnchorPolicy
from graphs.backends import Backends, make_cache
from graphs.batch import Batch, StepOut, nothing, stacked
from graphs.conversation import Conversation, Fill, check_past
from graphs.frame_step import GENERATED, FrameStep
from graphs.kv_pressure import KVPressure, PressurePolicy
from graphs.page_keeper import PageKeeper
from graphs.paging import OutOfPages
from graphs.prefill_budget import LEAST_ROWS, PrefillBudget, share
from graphs.prefix_cache import PrefixCache, PrefixOwners
from graphs.rings import Rings, spare_rings
from graphs.stages import Past, Sampling
from models.config import STREAMS
from models.lm import LanguageModel
from models.prompt import USER, Prompt, Tokens, next_column

__all__ = ["DEFAULT_TILE", "SlotEngine", "StepOut"]

DEFAULT_TILE = 64  # prefill rows in a step: a multiple of four; larger delays live frames, smaller wastes weight reads


class SlotEngine:
    """All slots of one model. One call of `step` is one frame for every slot named, plus a tile of prefill."""

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        *,
        tile: int = DEFAULT_TILE,
        backend: str | Backends = "auto",
        anchors: AnchorPolicy | None = None,
        spares: int | None = None,
        budget: PrefillBudget | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Reserves full contexts for `slots` conversations on the model's device, and for anchors being prepared; or,
        if `backend` says to overcommit, pages for a part of them.

        anchors: None lets windows slide. spares: rings for anchors, one per sixteen slots where nobody says. budget:
        None takes a whole tile in every step. prefixes: None keeps no prompts.
        """
        self._model = model
        self.slots = slots
        self._tile = tile
        self._anchors = anchors
        if spares is None or anchors is None:
            spares = spare_rings(slots, anchors)
        rings = slots + spares
        chosen = backend if isinstance(backend, Backends) else Backends(step=backend)
        self.cache = make_cache(model.config, rings, tile, device=model.device, dtype=model.dtype, backend=backend)
        fixed = model.device.type == "cuda"
        self.frame_step = FrameStep(
            model,
            self.cache,
            fixed_rows=slots + tile if fixed else 0,
            fixed_emits=slots if fixed else 0,
            backends=chosen,
        )
        self._budget = budget
        self._open: dict[int, Conversation] = {}
        self._prefilling: list[int] = []  # in order of arrival
        self._rings = Rings(self.cache, rings, prefixes if prefixes is not None else PrefixCache(0))
        self._pages: PageKeeper | None = None
        if self.cache.pool is not None and chosen.paged:
            policy = PressurePolicy(self.cache.blocks, chosen.kv_reserve_s)
            self._pages = PageKeeper(self.cache.pool, policy, self._open, self._take_rings_of)
        self.anchors_done = 0
        self.anchors_late = 0  # those that made a step longer, because no spare ring was free before

    @property
    def prompt_limit(self) -> int:
        """A prompt longer than the window would have lost its beginning before the first word is spoken."""
        return self._model.config.window

    def open(
        self,
        slot: int,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        *,
        past: Past | None = None,
        owners: PrefixOwners | None = None,
    ) -> None:
        """Gives a slot to a conversation; its prompt is prefilled by the steps to come.

        past: a conversation that was held elsewhere before; its frames are prefilled as well, and the next ones come
        out as they would have there. owners: who may know how fast the prompt's parts are.
        Raises ValueError if the slot is taken, does not exist, the prompt is too long, or the past does not fit;
        OutOfPages for a new conversation that would take the others' reserve. One with a past waits instead.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} does not exist, this engine has {self.slots}")
        if slot in self._open:
            raise ValueError(f"slot {slot} is taken")
        if prompt.frames > self.prompt_limit:
            raise ValueError(
                f"voice and role together take {prompt.frames} frames of 80 ms, this model has room for "
                f"{self.prompt_limit}: shorten the role by some {prompt.frames - self.prompt_limit} tokens"
            )
        if past is not None:
            check_past(self._model.config, past)
        if self._pages is not None and past is None and not self._pages.admits(prompt.frames):
            raise OutOfPages("the conversations held here need what is left of the KV cache")
        plan = None if self._anchors is None else self._anchors.plan(self.prompt_limit, prompt.frames, seed)
        talk = Conversation(prompt, sampling, seed, Fill(0, 0), owners or PrefixOwners(), plan)
        talk.rebuildable = self._pages is not None
        if past is not None:
            talk.restore(past)
        talk.fill = Fill(self._rings.take(prefer=slot), talk.fill.first_row)
        self._open[slot] = talk
        if self._pages is not None and not self._pages.resumes(slot):
            self._pages.park(slot)
        else:
            self._begin(slot)

    def close(self, slot: int) -> None:
        """Frees a slot, whatever it was doing. Its cache needs no clearing: a key is only seen by position."""
        talk = self._open.pop(slot, None)
        if talk is None:
            return
        for fill in (talk.fill, talk.upcoming):
            if fill is not None:
                self._rings.let_go(fill.ring)
        for waiting in (self._prefilling, [] if self._pages is None else self._pages.parked):
            if slot in waiting:
                waiting.remove(slot)

    def make_room(self, slots: Sequence[int]) -> tuple[int, ...]:
        """To be called before a step with the same slots, where more is promised than there is: those that cannot go on
        now, because they are parked. Later steps report them ready again."""
        return () if self._pages is None else self._pages.make_room(slots)

    @property
    def parked(self) -> Sequence[int]:
        """Slots that wait for pages, and say nothing meanwhile."""
        return () if self._pages is None else self._pages.parked

    @property
    def pressure(self) -> KVPressure | None:
        """What the router should know about the KV cache; None where full contexts are reserved."""
        return None if self._pages is None else self._pages.report()

    def step(self, slots: Sequence[int], codes: npt.NDArray[np.int16]) -> StepOut:
        """One frame for each live slot of `slots` (each at most once), and some rows of waiting prompts.

        codes: [n, 8] int16, what the user said, as Mimi codes (-1: no input).
        Raises ValueError if a slot is not live, or is not any more because there is no page for it (see make_room).
        """
        self.make_room(slots)
        for slot in slots:
            if slot not in self._open or not self._open[slot].live:
                raise ValueError(f"slot {slot} has no live conversation: wait until it is reported ready")
        started = self._budget.clock() if self._budget is not None else 0.0
        talks = [self._open[slot] for slot in slots]
        for talk in talks:
            if talk.anchor is not None and talk.frame >= talk.anchor:
                self._switch(talk)
        if self._pages is not None:
            while (due := self._pages.due()) is not None:
                self._begin(due)
            self._pages.begin([talk.fill for talk in talks])
        batch = Batch()
        journal = [self._live_row(batch, talk, codes[i]) for i, talk in enumerate(talks)]
        self._anchor_rows(batch, slots, talks)
        finishing = self._prefill_rows(batch, len(talks))
        drawn = nothing(GENERATED)
        if batch.rows:
            drawn = self.frame_step.run(np.stack(batch.rows), batch.spans, batch.emits, batch.overrides)
        frames = [self._answer(talk, drawn[i], codes[i]) for i, talk in enumerate(talks)]
        self._finish(finishing, drawn[len(talks) :])
        if self._budget is not None and batch.emits:  # without, a GPU may still be at it
            took_ms = (self._budget.clock() - started) * 1e3
            self._budget.note(len(talks), len(batch.rows) - len(talks), took_ms)
        return StepOut(
            tokens=stacked(frames, GENERATED),
            journal=stacked(journal, STREAMS),
            ready=tuple(finishing),
            pending=len(self._prefilling),
            next_columns=stacked([talk.pending for talk in talks if talk.pending is not None], STREAMS),
            first_rows=np.array([talk.fill.first_row for talk in talks], dtype=np.int32),
        )

    # ---- a step's rows -------------------------------------------------------------------------------------

    def _live_row(self, batch: Batch, talk: Conversation, codes: npt.NDArray[np.int16]) -> Tokens:
        assert talk.pending is not None  # or it would not be live
        column = next_column(self._model.config, talk.pending, codes, talk.pending[USER])
        talk.read(column)
        batch.emits.append(talk.emit_live(batch.add(talk, talk.fill, 1)))
        return column

    def _anchor_rows(self, batch: Batch, slots: Sequence[int], talks: Sequence[Conversation]) -> None:
        """Begins rings for anchors that come near, and fills those begun at the pace that has them full in time."""
        near = [(talk.anchor - talk.frame, i) for i, talk in enumerate(talks) if talk.anchor is not None]
        left = self._tile
        for frames, i in sorted(near):
            talk, plan = talks[i], talks[i].plan
            assert plan is not None
            spare = self._rings.free > self.slots - len(self._open)  # a slot may yet be opened for each of the others
            begins = talk.upcoming is None and frames <= plan.lead and spare
            if begins and (self._pages is None or self._pages.prepares(slots[i])):
                talk.upcoming = self._rings.begin(talk, talk.frame + frames - plan.keep)
            if talk.upcoming is not None and left > 0:
                to_do = talk.prompt.frames + plan.keep - talk.upcoming.filled
                pace = -(-to_do // (frames + 1) // 4) * 4 + 4  # this step included; in fours, as rows are padded
                count = min(pace, talk.missing(talk.upcoming), left)
                if self._pages is not None:
                    count = self._pages.take(talk.upcoming, count, spare_only=True)
                if count > 0:
                    batch.add(talk, talk.upcoming, count)
                    left -= count

    def _prefill_rows(self, batch: Batch, live: int) -> list[int]:
        """Adds waiting prompts' and journals' columns, as many as the budget has; returns the slots that finish."""
        if not self._prefilling:
            return []
        taken, budget = len(batch.rows) - live, self._tile
        if self._budget is not None:
            anybody = any(talk.live for talk in self._open.values())
            budget = max(self._budget.rows(live, anybody_live=anybody), taken + LEAST_ROWS)
        waiting = [self._open[slot] for slot in self._prefilling]
        finishing = []
        portions = share(min(budget, self._tile) - taken, [talk.missing(talk.fill) for talk in waiting])
        for slot, talk, portion in zip(list(self._prefilling), waiting, portions, strict=True):
            count = portion if self._pages is None else self._pages.take(talk.fill, portion)
            if count == 0:
                continue
            last = batch.add(talk, talk.fill, count)
            if talk.missing(talk.fill) == 0:
                if talk.pending is None:
                    batch.emits.append(talk.emit_last(last))
                self._prefilling.remove(slot)
                finishing.append(slot)
        return finishing

    # ---- what becomes of it --------------------------------------------------------------------------------

    def _answer(self, talk: Conversation, drawn: Tokens, user: npt.NDArray[np.int16]) -> Tokens:
        """Takes what was drawn after a column; returns the frame that became complete with it: [9].

        The text and the undelayed codebook of that frame were drawn a step ago, the delayed ones just now. The
        published code answers a call later, with the same tokens: it reads a column only when the next frame is in.
        """
        assert talk.pending is not None
        delayed = np.array(self._model.config.delays[:GENERATED]) > 0
        frame = np.where(delayed, drawn, talk.pending[:GENERATED]).astype(np.int16)
        talk.draw(self._model.config, drawn, user)
        return frame

    def _finish(self, slots: Sequence[int], drawn: npt.NDArray[np.int16]) -> None:
        """Makes conversations live whose last row was run; drawn: [n, 9], for those that had tokens to draw."""
        rows = iter(drawn)
        for slot in slots:
            talk = self._open[slot]
            if talk.pending is None:
                talk.draw(self._model.config, next(rows), talk.user_before if talk.frame else None)
            talk.live = True
            self._rings.keep_prompt(talk)

    def _switch(self, talk: Conversation) -> None:
        """Puts a conversation onto the ring of its anchor, which is due with the frame that comes now.

        Where that ring is not full, because none was free or the frames came in a burst, it is filled here and now:
        the frame may be late, but when an anchor happens must not depend on who else is here.
        """
        assert talk.plan is not None
        anchor, upcoming = talk.anchor, talk.upcoming
        assert anchor is not None
        self._rings.let_go(talk.fill.ring)
        if upcoming is None:
            upcoming = self._rings.begin(talk, anchor - talk.plan.keep, prefer=talk.fill.ring)
        self.anchors_done += 1
        self.anchors_late += talk.missing(upcoming) > 0
        while (missing := talk.missing(upcoming)) > 0:
            rows = Batch()
            rows.add(talk, upcoming, min(missing, self._tile))
            self.frame_step.run(np.stack(rows.rows), rows.spans, [], rows.overrides)
        talk.fill, talk.upcoming = upcoming, None

    def _begin(self, slot: int) -> None:
        """Has a conversation's ring filled by the steps to come; what is known of its prompt is there at once."""
        talk = self._open[slot]
        self._rings.restore_prompt(talk, talk.fill)
        self._prefilling.append(slot)

    def _take_rings_of(self, slot: int) -> None:
        """Leaves a conversation its ring's number and nothing in it."""
        talk = self._open[slot]
        if talk.upcoming is not None:
            self._rings.let_go(talk.upcoming.ring)
        self.cache.release(talk.fill.ring)
        talk.park()
        if slot in self._prefilling:
            self._prefilling.remove(slot)
