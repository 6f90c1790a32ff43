"""The conversation engine of a checkpoint: what a session asks for (voice, role, seed), turned into a slot's life."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from graphs.anchors import AnchorPolicy
from graphs.backends import Backends
from graphs.kv_pressure import KVPressure
from graphs.prefill_budget import PrefillBudget
from graphs.prefix_cache import DEFAULT_LIMIT_BYTES, PrefixCache, PrefixOwners
from graphs.sampling import HAS_NUMBA
from graphs.self_test import settle
from graphs.slot_engine import DEFAULT_TILE, SlotEngine, StepOut
from graphs.stages import Past, SessionSpec
from models.checkpoint import Checkpoint
from models.lm import LanguageModel
from models.prompt import Prompt, build_prompt


class PromptInfo(NamedTuple):
    """What became of a session's voice and role: how many frames to prefill, and their hash."""

    frames: int
    digest: str


class ConversationEngine:
    """SlotEngine for people: slots are opened by SessionSpec, with voices and tokenizer of the checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        slots: int,
        *,
        tile: int = DEFAULT_TILE,
        anchors: AnchorPolicy | None = None,
        prefix_bytes: int = DEFAULT_LIMIT_BYTES,
        backend: str | Backends = "auto",
    ) -> None:
        """anchors: None lets windows slide, as the published code does. prefix_bytes: for prompts' beginnings.

        backend: one of graphs.backends.BACKENDS, or all that can be chosen; attention and products that are `auto` are
        tried out here and now (graphs.self_test).

        Raises ValueError if the checkpoint was loaded without its language model, or the choice cannot serve it.
        """
        if checkpoint.lm is None:
            raise ValueError("this checkpoint was loaded without its language model: ask for the part 'lm'")
        self._checkpoint = checkpoint
        chosen = Backends(step=backend) if isinstance(backend, str) else backend
        self.backends = settle(chosen, checkpoint.lm, slots, tile)
        self.prefixes = PrefixCache(prefix_bytes)
        self.slot_engine = SlotEngine(
            checkpoint.lm,
            slots,
            tile=tile,
            backend=self.backends,
            anchors=anchors,
            budget=PrefillBudget(tile),
            prefixes=self.prefixes,
        )
        layout = f"{self.slot_engine.cache.layout}{self.backends.id}"
        self.numerics_id = numerics_id(checkpoint.lm, checkpoint.weights_hash, layout, tile, anchors)

    def prompt(self, spec: SessionSpec) -> Prompt:
        """The columns of a session's system prompt. Raises ValueError with a sentence for the user."""
        checkpoint = self._checkpoint
        if not checkpoint.voices.has(spec.voice):
            known = ", ".join(checkpoint.voices.names())
            raise ValueError(f"there is no voice {spec.voice!r}; this model has {known}")
        if spec.role_tokens is not None:
            tokens: Sequence[int] = spec.role_tokens
        elif not spec.role:
            tokens = ()
        elif checkpoint.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, so it can take no role")
        else:
            tokens = checkpoint.tokenizer.encode_role(spec.role)
        return build_prompt(
            checkpoint.lm_config,
            checkpoint.voices.load(spec.voice),
            tokens,
            silence_codes=checkpoint.silence_codes,
            sine_codes=checkpoint.sine_codes,
        )

    def open(self, slot: int, spec: SessionSpec, *, past: Past | None = None, tenant: str | None = None) -> PromptInfo:
        """Gives `slot` to a conversation: a new one, or one that goes on from its `past`.

        tenant: whose role it is. Their next conversation with it starts faster, nobody else's does; without a name only
        the voice, which is the checkpoint's, is remembered. Raises ValueError with a sentence for the user, OutOfPages
        if the KV cache is promised to others (see SlotEngine.open).
        """
        spec.sampling.check()
        prompt = self.prompt(spec)
        owners = PrefixOwners(role=tenant or None)
        self.slot_engine.open(slot, prompt, spec.sampling, spec.seed, past=past, owners=owners)
        return PromptInfo(prompt.frames, prompt.digest)

    def step(self, slots: Sequence[int], codes: npt.NDArray[np.int16]) -> StepOut:
        """See SlotEngine.step: a frame for each of `slots`, and a tile of waiting prompts beside them."""
        return self.slot_engine.step(slots, codes)

    # ---- where the slots share less memory than full contexts take -------------------------------------------

    @property
    def overcommitted(self) -> bool:
        return self.backends.paged

    def make_room(self, slots: Sequence[int]) -> tuple[int, ...]:
        """See SlotEngine.make_room."""
        return self.slot_engine.make_room(slots)

    @property
    def parked(self) -> Sequence[int]:
        """Slots that wait for pages."""
        return self.slot_engine.parked

    @property
    def pressure(self) -> KVPressure | None:
        """See SlotEngine.pressure."""
        return self.slot_engine.pressure

    def close(self, slot: int) -> None:
        """Frees a slot; closing a free one is no error, since whoever closes may be cleaning up."""
        self.slot_engine.close(slot)


def numerics_id(
    model: LanguageModel, weights_hash: str, layout: str, tile: int, anchors: AnchorPolicy | None = None
) -> str:
    """Engines of equal id compute equal bits from equal inputs; recovery is only token-identical between those."""
    on_cpu = model.device.type == "cpu"
    capability = torch.backends.cpu.get_cpu_capability() if on_cpu else _cuda_build(model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    kept = anchors.id if anchors is not None else "a0"
    if on_cpu and HAS_NUMBA:  # its compiler decides the order of sums
        capability = f"{capability}-numba{version('numba')}"
    return f"{weights_hash[:16]}-{dtype}-{capability}-torch{torch.__version__}-{layout}-t{tile}-{kept}"


def _cuda_build(device: torch.device) -> str:
    """The chip's generation and the compiler of the kernels that run on it: either may change the order of a sum."""
    major, minor = torch.cuda.get_device_capability(device)
    try:
        compiler = f"triton{version('triton')}"
    except PackageNotFoundError:
        compiler = "torch"
    return f"cuda{torch.version.cuda}-sm{major}{minor}-{compiler}"
