"""The engine on a GPU: the golden run, a conversation's bits in any company, and the published shape's arithmetic.

Run by `make gpu` on machines with torch and pytest alone, so nothing else is imported here.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.lm import LanguageModel
from tests.golden import NOBODY, golden_lm, golden_prompt, golden_run, golden_user, prefill, random_user, talk

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LOGITS_TOLERANCE = 2e-5


def on_device(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The golden model; norms stay fp32 in any dtype."""
    model = copy.deepcopy(golden_lm()).to(DEVICE)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype)
    return model


def test_golden_run() -> None:
    engine = SlotEngine(on_device(), 3)
    text: list[Tensor] = []
    engine.frame_step.probe = lambda logits, _: text.append(logits[0].cpu())
    prefill(engine, 2, golden_prompt())
    frames = talk(engine, 2, golden_user())
    assert np.array_equal(frames[:99], golden_run()["expected_tokens"].numpy()[1:, :9])
    assert (torch.stack(text[:100]) - golden_run()["expected_text_logits"]).abs().max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_depend_on_company(dtype: torch.dtype) -> None:
    """One conversation alone, then among four that talk on every other frame, in an engine of the same shape."""
    model, user, mine = on_device(dtype), random_user(60, 5), 3
    alone = SlotEngine(model, 5)
    prefill(alone, mine, golden_prompt(), Sampling(), 1234)
    expected = talk(alone, mine, user)

    crowd = SlotEngine(model, 5)
    others = (0, 1, 2, 4)
    for slot in others:
        crowd.open(slot, golden_prompt(), Sampling(1.0, 20, 1.5, 30), slot)
    crowd.open(mine, golden_prompt(), Sampling(), 1234)
    waiting = {*others, mine}
    while waiting:
        waiting -= set(crowd.step([], NOBODY).ready)
    heard = []
    for frame, codes in enumerate(user):
        speakers = [*others, mine] if frame % 2 else [mine]
        said = [codes if slot == mine else random_user(1, frame * 7 + slot)[0] for slot in speakers]
        heard.append(crowd.step(speakers, np.stack(said)).tokens[speakers.index(mine)])
    assert np.array_equal(np.stack(heard), expected)
