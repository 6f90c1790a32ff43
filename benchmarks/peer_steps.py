"""The peers' frame steps at our shapes: moshi's batched LMGen and vllm-omni's native PersonaPlex step, random weights.

One call is one frame of all slots. Both packages live in an environment of their own (benchmarks.peers --setup).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_parts import recorded
from models.config import AUDIO_CODEBOOKS, STREAMS, LMConfig

Step = Callable[[], object]

_OMNI = "vllm_omni.model_executor.models.personaplex"


def moshi_step(config: LMConfig, slots: int, device: torch.device, dtype: torch.dtype) -> Step:
    """moshi 0.2.13's LMGen with its default sampling; dep_q is 8, though it ships with 16: its favourable reading."""
    from moshi.models.lm import LMGen, LMModel  # type: ignore[import-not-found]  # lives in .venv-peers only

    model = LMModel(
        delays=list(config.delays),
        n_q=config.n_q,
        dep_q=AUDIO_CODEBOOKS,
        card=config.card,
        text_card=config.text_card,
        dim=config.dim,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        hidden_scale=config.hidden_scale,
        norm="rms_norm_f32",
        gating="silu",
        positional_embedding="rope",
        context=config.context,
        max_period=config.max_period,
        causal=True,
        layer_scale=None,
        depformer_dim=config.depformer_dim,
        depformer_dim_feedforward=config.depformer_dim_feedforward,
        depformer_num_heads=config.depformer_num_heads,
        depformer_num_layers=config.depformer_num_layers,
        depformer_layer_scale=None,
        depformer_multi_linear=True,
        depformer_context=8,
        depformer_max_period=10_000,
        depformer_gating="silu",
        depformer_pos_emb="none",
        depformer_weights_per_step=True,
        device=device,
        dtype=dtype,
    ).eval()
    generator = LMGen(model)
    generator.streaming_forever(slots)
    codes = torch.randint(0, config.card, (slots, AUDIO_CODEBOOKS, 1), device=device)
    return lambda: generator.step(codes)


def omni_step(config: LMConfig, slots: int, device: torch.device, dtype: torch.dtype, wheel: Path | None) -> Step:
    """vllm-omni 0.28.0's PersonaPlexTemporalStreaming and PersonaPlexDepformer, on CUDA as one graph.

    Its engine draws greedily, in text and audio, so this does: an argmax where ours and moshi's sample. dep_q is 8, its
    engine's 16. wheel: a folder with the wheel's files; None: where it is installed. Raises ModuleNotFoundError.
    """
    modules = _omni(wheel)
    temporal: Any = modules("personaplex_temporal").PersonaPlexTemporalStreaming(
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden=config.ffn_hidden,
        context=config.context,
        text_card=config.text_card,
        max_period=config.max_period,
    )
    configurations = modules("configuration_personaplex")
    depth = configurations.PersonaPlexDepformerConfig(
        hidden_size=config.depformer_dim,
        num_hidden_layers=config.depformer_num_layers,
        num_attention_heads=config.depformer_num_heads,
        num_key_value_heads=config.depformer_num_heads,
        head_dim=config.depformer_dim // config.depformer_num_heads,
        intermediate_size=config.depformer_hidden,
        dep_q=AUDIO_CODEBOOKS,
        card=config.card,
    )
    depformer: Any = modules("personaplex_depformer").PersonaPlexDepformer(depth, config.dim, config.text_card)
    whole = configurations.PersonaPlexConfig(
        temporal_config={"hidden_size": config.dim},
        depformer_config=depth.to_dict(),
        text_vocab_size=config.text_card,
        text_embedding_rows=config.text_card + 1,
        audio_vocab_size=config.card,
        num_audio_codebooks=config.n_q,
    )
    embeddings: Any = modules("personaplex_embeddings").PersonaPlexInputEmbeddings(whole)
    for module in (temporal, depformer, embeddings):
        module.to(device, dtype).eval()
        for parameter in module.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
            elif parameter.dim() == 3 and parameter.shape[1] > 1:  # a stack of matrices; norms are [1, 1, dim]
                torch.nn.init.normal_(parameter, 0.0, parameter.shape[2] ** -0.5)
    temporal.streaming_init(slots)
    columns = torch.randint(0, min(config.card, config.text_card), (slots, STREAMS, 1), device=device)

    def step() -> None:
        hidden, logits = temporal.step(embeddings(columns))
        text = logits.float().view(slots, -1).argmax(-1)
        codes = depformer(text, hidden)
        columns[:, 0, 0] = text
        columns[:, 1 : 1 + AUDIO_CODEBOOKS, 0] = codes

    return recorded(step, device)


def _omni(wheel: Path | None) -> Callable[[str], Any]:
    """Imports single modules of vllm-omni, past its packages' own imports, which want all of vLLM."""
    if _OMNI in sys.modules:
        return lambda name: importlib.import_module(f"{_OMNI}.{name}")
    root = wheel
    if root is None:
        found = importlib.util.find_spec("vllm_omni")
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError("vllm_omni is not installed: see benchmarks.peers --setup")
        root = Path(found.submodule_search_locations[0]).parent
    if importlib.util.find_spec("transformers") is None:
        _stand_in_for_transformers()
    parts = _OMNI.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*parts[:depth]))]
        sys.modules[name] = package
    return lambda name: importlib.import_module(f"{_OMNI}.{name}")


def _stand_in_for_transformers() -> None:
    """On a machine without transformers: the configurations' base class, which only keeps what it is given."""

    class PretrainedConfig:
        def __init__(self, **kwargs: Any) -> None:
            self.__dict__.update(kwargs)

        def to_dict(self) -> dict[str, Any]:
            return dict(self.__dict__)

    class Log:
        def get_logger(self, name: str) -> Log:
            return self

        def info(self, *words: object) -> None:
            """Nobody reads it here."""

    package, configuration, utils = (
        types.ModuleType(name) for name in ("transformers", "transformers.configuration_utils", "transformers.utils")
    )
    vars(package)["PretrainedConfig"] = vars(configuration)["PretrainedConfig"] = PretrainedConfig
    vars(utils)["logging"] = Log()
    sys.modules |= {module.__name__: module for module in (package, configuration, utils)}
