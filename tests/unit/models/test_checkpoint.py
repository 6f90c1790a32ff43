"""Checkpoints: names and shapes against the published manifests, and what loading one does and refuses."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import checkpoint_files, checkpoint_tensors
from models.checkpoint import CheckpointError, load_checkpoint
from models.checkpoint_files import find_checkpoint
from models.checkpoint_tensors import Shape, check_shapes, lm_shapes, module_shapes, stored_depth_steps
from models.config import PUBLISHED_SILENCE_CODES, PUBLISHED_SINE_CODES, LMConfig, MimiConfig
from models.lm import LanguageModel
from models.mimi import Mimi
from tests.small_checkpoint import config, lm_tensors, write_small_checkpoint

DATA = Path(__file__).parents[2] / "data"
LM_ONLY = frozenset({"lm"})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small"))


def manifest(name: str) -> dict[str, Shape]:
    return {key: tuple(shape) for key, (shape, _) in json.loads((DATA / name).read_text()).items()}


def test_the_7b_manifest_is_the_default_model() -> None:
    model = LanguageModel(LMConfig(), device="meta", dtype=torch.bfloat16)
    stored = manifest("lm_7b_state_dict.json")
    assert stored_depth_steps(stored, LMConfig()) == 16
    check_shapes(stored, lm_shapes(model, 16), "the 7B manifest")


def test_the_mimi_manifest_is_the_default_codec() -> None:
    with torch.device("meta"):
        mimi = Mimi(MimiConfig())
    check_shapes(manifest("mimi_state_dict.json"), module_shapes(mimi), "the Mimi manifest")


def test_the_user_half_of_the_7b_model_takes_no_memory() -> None:
    model = LanguageModel(LMConfig(), device="meta", dtype=torch.bfloat16)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert 15.3e9 < held < 15.41e9  # of 16.74 GB in the file


def test_every_misfit_is_named_in_one_error() -> None:
    stored = manifest("lm_7b_state_dict.json")
    del stored["emb.3.weight"], stored["depformer_in.12.weight"]
    stored["emb.16.weight"] = (2049, 4096)
    stored["text_linear.weight"] = (48_000, 4096)
    stored["depformer.layers.2.self_attn.in_proj_weight"] = (8 * 3072, 1024)
    with pytest.raises(CheckpointError) as raised:
        check_shapes(stored, lm_shapes(LanguageModel(LMConfig(), device="meta"), 16), "model.safetensors")
    lines = {line.strip() for line in str(raised.value).splitlines()}
    assert lines >= {
        "missing: emb.3.weight 2049×4096",
        "missing: depformer_in.12.weight 1024×4096",
        "superfluous: emb.16.weight 2049×4096",
        "misshaped: text_linear.weight is 48000×4096, expected 32000×4096",
        "misshaped: depformer.layers.2.self_attn.in_proj_weight is 24576×1024, expected 49152×1024",
    }
    assert "5 tensors" in str(raised.value)


def test_a_small_checkpoint_loads_whole(small: Path) -> None:
    loaded = load_checkpoint(small)
    stored = load_file(small / "model.safetensors")
    assert loaded.lm is not None
    assert loaded.mimi is not None
    assert loaded.tokenizer is not None
    for name, tensor in loaded.lm.state_dict().items():
        # All that is kept of a stacked tensor is its first half, the agent's steps.
        assert torch.equal(tensor, stored[name][: tensor.shape[0]].float()), name
    for name, tensor in loaded.mimi.state_dict().items():
        assert torch.equal(tensor, load_file(small / "tokenizer-0123-checkpoint1.safetensors")[name]), name
    assert (loaded.name, loaded.trained) == ("small", False)
    assert loaded.silence_codes == tuple(range(8))
    assert loaded.sine_codes == tuple(range(7, -1, -1))
    assert loaded.voices.names() == ["A"]
    assert not any(tensor.requires_grad for tensor in loaded.lm.parameters())
    assert not loaded.lm.training


def test_what_was_loaded_outlives_its_file(tmp_path: Path) -> None:
    loaded = load_checkpoint(write_small_checkpoint(tmp_path), parts=LM_ONLY)
    assert loaded.lm is not None
    before = loaded.lm.text_linear.weight.clone()
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(loaded.lm.text_linear.weight, before)


def test_only_the_asked_for_parts_are_loaded(small: Path) -> None:
    loaded = load_checkpoint(small, parts=frozenset({"text"}))
    assert loaded.lm is None
    assert loaded.mimi is None
    assert loaded.tokenizer is not None
    with pytest.raises(ValueError, match="unknown parts"):
        load_checkpoint(small, parts=frozenset({"llm"}))


def test_weights_are_cast_and_norms_stay_fp32(small: Path) -> None:
    model = load_checkpoint(small, dtype=torch.float16, parts=LM_ONLY).lm
    assert model is not None
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {kind for name, kind in kinds.items() if not name.endswith("alpha")} == {torch.float16}
    assert {kind for name, kind in kinds.items() if name.endswith("alpha")} == {torch.float32}


def test_the_user_half_is_checked_and_not_read(tmp_path: Path) -> None:
    tensors = lm_tensors()
    for name, tensor in tensors.items():
        if ".self_attn." in name and name.startswith("depformer"):
            tensor[tensor.shape[0] // 2 :] = torch.nan
    tensors["linears.11.weight"].fill_(torch.nan)
    model = load_checkpoint(write_small_checkpoint(tmp_path, lm=tensors), parts=LM_ONLY).lm
    assert model is not None
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    tensors["linears.11.weight"] = tensors["linears.11.weight"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"misshaped: linears\.11\.weight"):
        load_checkpoint(tmp_path, parts=LM_ONLY)


def test_a_file_that_stops_at_the_agents_half_loads(tmp_path: Path, small: Path) -> None:
    whole = lm_tensors()
    half = {name: whole[name][: shape[0]].clone() for name, shape in shapes_of(8).items()}
    model = load_checkpoint(write_small_checkpoint(tmp_path, lm=half), parts=LM_ONLY).lm
    same = load_checkpoint(small, parts=LM_ONLY).lm
    assert model is not None
    assert same is not None
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in same.state_dict().items())


def shapes_of(steps: int) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in lm_tensors(steps).items()}


class Watched:
    """safe_open that counts how many of the tensors it handed out are alive at once."""

    def __init__(self) -> None:
        self.alive = self.most = self.read = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Watched:
        self.file = safe_open(*args, **kwargs)
        return self

    def __enter__(self) -> Watched:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> Tensor:
        return self.counted(self.file.get_tensor(name))

    def get_slice(self, name: str) -> WatchedSlice:
        return WatchedSlice(self, self.file.get_slice(name))

    def counted(self, tensor: Tensor) -> Tensor:
        self.alive += 1
        self.read += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        self.alive -= 1


class WatchedSlice:
    def __init__(self, watched: Watched, piece: Any) -> None:
        self._watched, self._piece = watched, piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self._piece, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._watched.counted(self._piece[index])


def test_tensors_are_read_one_at_a_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(checkpoint_tensors, "safe_open", watched)
    model = load_checkpoint(small, dtype=torch.bfloat16, parts=LM_ONLY).lm
    assert model is not None
    assert watched.read == len(model.state_dict())
    assert watched.most == 1
    assert watched.alive == 0


def test_the_hash_follows_the_weights_and_nothing_else(tmp_path: Path, small: Path) -> None:
    first = find_checkpoint(small).weights_hash
    assert find_checkpoint(write_small_checkpoint(tmp_path)).weights_hash == first
    os.utime(tmp_path / "model.safetensors", (0, 0))
    (tmp_path / "config.json").write_text(json.dumps(config(name="renamed")))
    assert find_checkpoint(tmp_path).weights_hash == first
    (tmp_path / "config.json").write_text(json.dumps(config(sine_codes=[9] * 8)))
    assert find_checkpoint(tmp_path).weights_hash != first
    tensors = lm_tensors()
    tensors["emb.5.weight"][3, 3] += 1
    write_small_checkpoint(tmp_path, lm=tensors)
    assert find_checkpoint(tmp_path).weights_hash != first


def test_a_large_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_HASH_WHOLE_BELOW", 1000)
    monkeypatch.setattr(checkpoint_files, "_SAMPLE_BLOCKS", 8)
    monkeypatch.setattr(checkpoint_files, "_SAMPLE_BYTES", 512)
    first = find_checkpoint(write_small_checkpoint(tmp_path)).weights_hash
    assert find_checkpoint(tmp_path).weights_hash == first
    write_small_checkpoint(tmp_path, lm={name: tensor + 1 for name, tensor in lm_tensors().items()})
    assert find_checkpoint(tmp_path).weights_hash != first


def test_a_published_config_says_nothing_of_shapes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "personaplex", "version": "7b-v1"}')
    loaded = load_checkpoint(tmp_path, parts=frozenset())
    assert loaded.lm_config == LMConfig()
    assert loaded.mimi_config == MimiConfig()
    assert loaded.trained
    assert (loaded.silence_codes, loaded.sine_codes) == (PUBLISHED_SILENCE_CODES, PUBLISHED_SINE_CODES)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def containing(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def store_as(dtype: torch.dtype) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = lm_tensors()
        save_file({**tensors, "text_emb.weight": tensors["text_emb.weight"].to(dtype)}, folder / "model.safetensors")

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "no config.json"),
        (without("model.safetensors"), "no language model"),
        (without("tokenizer-0123-checkpoint1.safetensors"), "no codec"),
        (without("tokenizer_spm_2k.model"), "no text tokenizer"),
        (containing("config.json", "{"), "cannot be read as JSON"),
        (containing("config.json", "[]"), "no JSON object"),
        (containing("config.json", json.dumps(config(format="personaplex-serving/9"))), "format 'personaplex-serv"),
        (containing("config.json", json.dumps(config(lm=[1]))), "'lm' must be an object"),
        (containing("config.json", json.dumps(config(lm={"n_q": 8}))), "n_q=8"),
        (containing("config.json", json.dumps(config(sine_codes=[64] * 8))), "'sine_codes' must be 8 codes"),
        (containing("config.json", json.dumps(config(silence_codes=[1]))), "'silence_codes' must be 8 codes"),
        (containing("tokenizer_spm_3k.model", ""), "several files tokenizer_spm_"),
        (containing("tokenizer.model", "no model"), "not a SentencePiece model"),
        (truncate, "cannot be read as safetensors"),
        (store_as(torch.int8), r"text_emb\.weight is I8 without text_emb\.weight\.row_scale"),
        (store_as(torch.int16), r"neither floating point nor int8: text_emb\.weight I16"),
    ],
)
def test_a_damaged_checkpoint_says_what_is_wrong(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_small_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    settings = config()
    settings["lm"]["text_card"] = 100
    with pytest.raises(CheckpointError, match="2000 pieces, the model 100"):
        load_checkpoint(write_small_checkpoint(tmp_path, settings=settings), parts=frozenset({"text"}))


def test_a_checkpoint_may_say_that_it_reads_no_text(tmp_path: Path) -> None:
    write_small_checkpoint(tmp_path, settings=config(tokenizer=None))
    assert load_checkpoint(tmp_path, parts=frozenset({"text"})).tokenizer is None


@pytest.mark.parametrize("ref", ["/no/such/folder", "nowhere", "a/b/c", "../x", ""])
def test_a_reference_to_nothing_is_refused(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        load_checkpoint(ref)


REPO = "nvidia/personaplex-7b-v1"


def test_a_repository_is_fetched_with_the_token(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(small)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    found = find_checkpoint(f"{REPO}@main")
    assert (asked["repo"], asked["revision"], asked["token"]) == (REPO, "main", "hf_test")
    assert {"config.json", "model.safetensors", "tokenizer-*.safetensors", "voices.tgz"} <= set(asked["allow_patterns"])
    assert found.folder == small


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError, 403), "accept its licence at https://huggingface.co/nvidia.*HF_TOKEN"),
        (http_error(errors.RepositoryNotFoundError, 401), "shows no nvidia/personaplex-7b-v1"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError("No space left on device"), "could not be fetched: No space"),
    ],
)
def test_a_repository_that_cannot_be_had_says_why(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(REPO)


def test_demo_is_the_model_that_ships_and_else_the_random_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "assets" / "demo"
    shipped.mkdir(parents=True)
    monkeypatch.setenv("PERSONAPLEX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(checkpoint_files, "SHIPPED_DEMO", shipped)
    (shipped / "README.md").write_text("A card without a model is none.")
    assert find_checkpoint("demo").name == "personaplex-demo-untrained"
    (shipped / "config.json").write_text(json.dumps(config(name="shipped")))
    assert find_checkpoint("demo").folder == shipped
    assert find_checkpoint("demo-random").name == "personaplex-demo-untrained"


def test_a_checkpoint_that_is_nowhere_is_told_both_demos() -> None:
    with pytest.raises(CheckpointError, match="'demo', or 'demo-random'"):
        find_checkpoint("demo_random")
