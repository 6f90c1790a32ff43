"""Shapes and constants of language model and codec, and how tokens are drawn: what a config.json may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SAMPLE_RATE = 24_000
FRAME_SAMPLES = 1_920  # 80 ms at 24 kHz, the model's only clock
FRAME_MS = 80.0
FRAMES_PER_S = 12.5

AUDIO_CODEBOOKS = 8  # per speaker; 8 agent and 8 user streams follow the text stream
STREAMS = 1 + 2 * AUDIO_CODEBOOKS  # 17 tokens a frame

TEXT_PAD = 3  # "nothing is being said"
TEXT_END_OF_PAD = 0  # stands before a word
NO_INPUT = -1  # contributes nothing to the input embedding
UNGENERATED = -2  # to be sampled by the step

MAX_TEMPERATURE = 10.0
MAX_TOP_K = 512  # a static bound, so that a captured step has one shape

# Codes of silence and of a 440 Hz sine under the published Mimi. Another codec has its own, in config.json.
PUBLISHED_SILENCE_CODES = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
PUBLISHED_SINE_CODES = (430, 1268, 381, 1611, 1095, 1495, 56, 472)


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `values` that `cls` has a field for; a published config carries many that nothing reads."""
    names = {f.name for f in fields(cls)}
    return {key: value for key, value in values.items() if key in names}


@dataclass(frozen=True)
class LMConfig:
    """The temporal and the depth transformer; the defaults are nvidia/personaplex-7b-v1."""

    dim: int = 4096
    text_card: int = 32_000
    n_q: int = 16
    dep_q: int = 16
    card: int = 2048
    num_heads: int = 32
    num_layers: int = 32
    hidden_scale: float = 4.125
    context: int = 3000
    max_period: float = 10_000.0
    depformer_dim: int = 1024
    depformer_dim_feedforward: int = 4224
    depformer_num_heads: int = 16
    depformer_num_layers: int = 6
    delays: tuple[int, ...] = (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LMConfig:
        known = _known(LMConfig, values)
        if "delays" in known:
            known["delays"] = tuple(known["delays"])
        config = LMConfig(**known)
        if config.n_q != 2 * AUDIO_CODEBOOKS or len(config.delays) != STREAMS:
            raise ValueError(
                f"a PersonaPlex checkpoint has {2 * AUDIO_CODEBOOKS} audio streams and {STREAMS} delays, "
                f"this one has n_q={config.n_q} and {len(config.delays)} delays"
            )
        return config

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_hidden(self) -> int:
        """Width after gating: two thirds of dim_feedforward, as the published gating layer computes it."""
        return gated_hidden(int(self.hidden_scale * self.dim), self.dim)

    @property
    def depformer_hidden(self) -> int:
        return gated_hidden(self.depformer_dim_feedforward, self.depformer_dim)

    @property
    def window(self) -> int:
        """Keys a step attends to, its own included: the published ring has already lost its oldest once full."""
        return self.context - 1

    @property
    def max_delay(self) -> int:
        return max(self.delays)


def gated_hidden(dim_feedforward: int, dim: int) -> int:
    """Hidden width of a gated feed-forward layer with the published rounding."""
    return 21 * dim // 8 if dim_feedforward == 4 * dim else 2 * dim_feedforward // 3


@dataclass(frozen=True)
class SeanetConfig:
    dimension: int = 512
    n_filters: int = 64
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    compress: int = 2
    ratios: tuple[int, ...] = (8, 6, 5, 4)


@dataclass(frozen=True)
class CodecTransformerConfig:
    d_model: int = 512
    num_heads: int = 8
    num_layers: int = 8
    context: int = 250
    max_period: float = 10_000.0
    dim_feedforward: int = 2048


@dataclass(frozen=True)
class QuantizerConfig:
    dimension: int = 256
    n_q: int = 32
    bins: int = 2048


@dataclass(frozen=True)
class MimiConfig:
    """The codec; the defaults are the published Mimi (tokenizer-e351c8d8-checkpoint125)."""

    seanet: SeanetConfig = field(default_factory=SeanetConfig)
    transformer: CodecTransformerConfig = field(default_factory=CodecTransformerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    num_codebooks: int = AUDIO_CODEBOOKS

    @property
    def receptive_frames(self) -> int:
        """Frames back that a stream's state, and so all it will say, can depend on: 998 for the published codec."""
        # A position sees context - 2 others at most (models.mimi_transformer.visibility), in every layer; a frame has
        # two. Beside that the encoder's convolutions reach 3,320 samples back, the decoder's six positions and a little
        # more, and each direction resamples over one frame more: five frames, and one to be safe.
        return self.transformer.num_layers * (self.transformer.context - 2) // 2 + 6

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MimiConfig:
        seanet = _known(SeanetConfig, values.get("seanet", {}))
        if "ratios" in seanet:
            seanet["ratios"] = tuple(seanet["ratios"])
        return MimiConfig(
            seanet=SeanetConfig(**seanet),
            transformer=CodecTransformerConfig(**_known(CodecTransformerConfig, values.get("transformer", {}))),
            quantizer=QuantizerConfig(**_known(QuantizerConfig, values.get("quantizer", {}))),
            num_codebooks=int(values.get("num_codebooks", AUDIO_CODEBOOKS)),
        )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a conversation's tokens are drawn; the defaults are the published ones. Temperature 0 is greedy.

    A checkpoint's config.json may recommend others under "sampling", which then hold for whoever names none.
    """

    text_temperature: float = 0.7
    text_top_k: int = 25
    audio_temperature: float = 0.8
    audio_top_k: int = 250

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Sampling:
        """Any of the four by name. Raises ValueError for another name, TypeError for what is no number, and as `check`.

        A name that is misspelt would otherwise leave a model as it must not be sampled, and nobody would know.
        """
        names = [f.name for f in fields(Sampling)]
        for name, value in values.items():
            if name not in names:
                raise ValueError(f"sampling has no {name!r}, only {', '.join(names)}")
            whole = name.endswith("top_k")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(f"sampling's {name} must be a {'whole ' if whole else ''}number, not {value!r}")
        sampling = Sampling(**values)
        sampling.check()
        return sampling

    def check(self) -> None:
        """Raises ValueError if a temperature or top-k is outside what a step can draw from."""
        for name, temperature in (("text", self.text_temperature), ("audio", self.audio_temperature)):
            if not 0.0 <= temperature <= MAX_TEMPERATURE:
                raise ValueError(f"{name} temperature {temperature} is not in 0 … {MAX_TEMPERATURE:g}")
        for name, top_k in (("text", self.text_top_k), ("audio", self.audio_top_k)):
            if not 1 <= top_k <= MAX_TOP_K:
                raise ValueError(f"{name} top-k {top_k} is not in 1 … {MAX_TOP_K}")
