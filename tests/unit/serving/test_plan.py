"""What a replica asks Ray for, and what processes know of a checkpoint without loading torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.config import LMConfig, MimiConfig
from serving.catalog import Catalog
from serving.pieces import Vocabulary
from serving.plan import Plan, PlanError, make_plan, slots_of
from serving.settings import ServeSettings
from serving.trunk_server import TrunkConfig

CATALOG = Catalog("demo", False, ("NATF0", "VARM3"))


def plan(device: str, accelerator: str | None, folder: Path = Path("/nowhere"), **changed: Any) -> Plan:
    settings = ServeSettings(checkpoint="nvidia/personaplex-7b-v1", **changed)
    return Plan(
        settings, CATALOG, device, accelerator, TrunkConfig("a secret of the tests", ping_s=0.2, dead_s=5.0), folder
    )


@pytest.mark.parametrize(
    ("device", "accelerator", "wanted"),
    [
        ("cpu", None, {}),
        ("cuda", "H100", {"GPU": 1.0, "accelerator_type:H100": 0.001}),
        ("cuda", None, {"GPU": 1.0}),
        ("cpu", "H100", {"H100": 1.0}),  # a simulated cluster: the CPU computes, the placement is as with real ones
    ],
)
def test_the_bundle_names_the_accelerator(device: str, accelerator: str | None, wanted: dict[str, float]) -> None:
    bundle = plan(device, accelerator).bundle()
    assert bundle.pop("CPU") < 1
    assert bundle == wanted


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_shares_of_the_actors_fit_the_bundle(device: str) -> None:
    it = plan(device, None)
    actors = [it.engine_options(), it.codec_options(), it.codec_options()]
    bundle = it.bundle()
    assert sum(options["num_cpus"] for options in actors) < bundle["CPU"]
    assert sum(options.get("num_gpus", 0.0) for options in actors) == pytest.approx(bundle.get("GPU", 0.0))


@pytest.mark.parametrize(
    ("settings", "router", "autoscaling"),
    [
        ({}, 0, 0),  # one replica: nobody could stand in for it
        ({"max_replicas": 3, "slots": 8}, None, 8),
        ({"max_replicas": 3, "slots": 8, "reserve_slots": 2}, 2, 2),
        ({"reserve_slots": 1}, 1, 1),
    ],
)
def test_the_reserve_is_a_replica_where_there_may_be_more_than_one(
    settings: dict[str, int], router: int | None, autoscaling: int
) -> None:
    it = plan("cpu", None, **settings)
    assert (it.router.reserve_slots, it.reserve_slots) == (router, autoscaling)


def test_slots_are_four_on_a_cpu_and_what_was_asked_for() -> None:
    assert plan("cpu", None).slots == 4
    assert plan("cuda", None, slots=9).slots == 9


def test_slots_on_a_gpu_that_is_elsewhere_are_counted_from_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head node without a GPU plans replicas for an H100."""
    published = SimpleNamespace(lm_config=LMConfig(), mimi_config=MimiConfig())
    monkeypatch.setattr("models.checkpoint.load_checkpoint", lambda *_, **__: published)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    in_bf16 = slots_of(ServeSettings(), "H100")
    assert 32 <= in_bf16 < slots_of(ServeSettings(), "H200")
    assert slots_of(ServeSettings(kv_dtype="fp8"), "H100") >= 72
    assert slots_of(ServeSettings(kv_overcommit=1.5), "H100") > in_bf16
    with pytest.raises(PlanError, match="say how many with --slots"):
        slots_of(ServeSettings(), "L4")


def test_fp8_without_cuda_is_refused_before_anything_starts() -> None:
    with pytest.raises(PlanError, match="leave --kv-dtype out"):
        make_plan(ServeSettings(device="cpu", kv_dtype="fp8"))


def test_the_window_is_shorter_on_a_gpu() -> None:
    assert plan("cuda", None).window_s < plan("cpu", None).window_s < 0.08


def test_a_node_with_the_folder_uses_it_and_another_asks_the_hub(tmp_path: Path) -> None:
    assert plan("cpu", None, tmp_path).nearest_checkpoint == str(tmp_path)
    assert plan("cpu", None).nearest_checkpoint == "nvidia/personaplex-7b-v1"


def test_voices_are_known_with_and_without_the_published_ending() -> None:
    assert CATALOG.has_voice("NATF0")
    assert CATALOG.has_voice("NATF0.pt")
    assert not CATALOG.has_voice("../NATF0")
    assert CATALOG.default_voice == "NATF0"


def test_a_token_outside_the_vocabulary_shows_nothing() -> None:
    vocabulary = Vocabulary(("", " a"))
    assert [vocabulary.piece(token) for token in (-1, 0, 1, 2)] == ["", "", " a", ""]


def test_neither_an_ingress_nor_a_replica_loads_torch() -> None:
    code = "import sys, serving.ingress, serving.replica_deployment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
