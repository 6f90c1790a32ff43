"""A language model of random weights whose rings have several pages. Also imported where there is torch alone."""

from __future__ import annotations

import torch

from models.config import AUDIO_CODEBOOKS, LMConfig
from models.lm import LanguageModel

SMALL = LMConfig(
    dim=64,
    text_card=64,
    dep_q=AUDIO_CODEBOOKS,
    card=32,
    num_heads=2,
    num_layers=2,
    context=450,  # rings of 640 positions: five pages
    depformer_dim=16,
    depformer_dim_feedforward=64,
    depformer_num_heads=2,
    depformer_num_layers=1,
)


def small_model(dtype: torch.dtype) -> LanguageModel:
    model, generator = LanguageModel(SMALL), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model.to(dtype)
