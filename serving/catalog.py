"""What a checkpoint offers, as the public API lists it; read once where the application is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from graphs.stages import Sampling


@dataclass(frozen=True, slots=True)
class Catalog:
    """The one model that is served and its voices. `trained` false: random weights, it cannot speak yet.

    notice: what everybody who meets the model is told of it; "" for a published one. sampling: what the checkpoint
    recommends, for callers who name none. roles: name and prompt of those it is known to play; () for a model that
    plays any.
    """

    model: str
    trained: bool
    voices: tuple[str, ...]
    codec_frames: int = 1000  # of 80 ms, on which the codec's state depends; the published Mimi's are 998
    notice: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    roles: tuple[tuple[str, str], ...] = ()

    @property
    def default_voice(self) -> str:
        """The voice of a caller who names none; "" where the checkpoint has none at all."""
        return self.voices[0] if self.voices else ""

    def has_voice(self, name: str) -> bool:
        """Voices are known with and without the `.pt` that the published client puts behind them."""
        return name.removesuffix(".pt") in self.voices

    @classmethod
    def read(cls, checkpoint: str) -> Catalog:
        """Read a checkpoint's names, not its weights; generates the demo checkpoint if need be.

        Raises models.checkpoint.CheckpointError.
        """
        from models.checkpoint import load_checkpoint  # torch: two seconds that an ingress never needs

        loaded = load_checkpoint(checkpoint, parts=frozenset())
        voices = tuple(sorted(loaded.voices.names()))
        frames = loaded.mimi_config.receptive_frames
        roles = tuple((role.name, role.text) for role in loaded.roles)
        return cls(loaded.name, loaded.trained, voices, frames, loaded.notice, loaded.sampling, roles)
