"""Weights that are not all there are refused by name, before anything is made or loaded."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.configio import from_flat
from common.errors import UserError
from common.model.backbone import load, reading
from common.model.backbone.load import resolve_backbone
from common.model.backbone.reading import Reading
from common.model.backbone.weights import INDEX
from sim.runs.federate import federate
from sim.runs.single import single

NORM = "model.layers.1.input_layernorm.weight"


def of(folder: Path, tensor: str) -> Path:
    """The shard that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit(file: Path, change) -> None:
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


def without_index(folder: Path, tensor: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][tensor]
    (folder / INDEX).write_text(json.dumps(index))


def shard_gone(folder: Path) -> None:
    of(folder, NORM).unlink()


def tensor_gone_from_its_shard(folder: Path) -> None:
    edit(of(folder, NORM), lambda content: content.pop(NORM))


def tensor_gone_everywhere(folder: Path) -> None:
    tensor_gone_from_its_shard(folder)
    without_index(folder, NORM)


def misnamed(folder: Path) -> None:
    tensor_gone_everywhere(folder)
    index = json.loads((folder / INDEX).read_text())
    file = folder / next(iter(index["weight_map"].values()))
    edit(file, lambda content: content.update({NORM + "s": torch.ones(64)}))
    index["weight_map"][NORM + "s"] = file.name
    (folder / INDEX).write_text(json.dumps(index))


def one_too_many(folder: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    edit(of(folder, NORM), lambda content: content.update({name: torch.zeros(64)}))


def misshapen(folder: Path) -> None:
    edit(of(folder, NORM), lambda content: content.update({NORM: torch.ones(1, 64)}))


def of_another_size(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))


def twice(folder: Path) -> None:
    file = of(folder, "model.embed_tokens.weight")
    assert file != of(folder, NORM)
    edit(file, lambda content: content.update({NORM: torch.ones(64)}))


def cut(folder: Path) -> None:
    file = of(folder, NORM)
    file.write_bytes(file.read_bytes()[:-1])


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def index_of_nothing(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": []}')


def integers(folder: Path) -> None:
    edit(of(folder, NORM), lambda content: content.update({NORM: torch.ones(64, dtype=torch.int8)}))


CASES = [
    (shard_gone, [NORM, "is missing"]),
    (tensor_gone_from_its_shard, [NORM, "index"]),
    (tensor_gone_everywhere, [NORM, "lacks"]),
    (misnamed, [NORM, "lacks"]),
    (one_too_many, ["model.layers.1.self_attn.q_proj.bias", "does not have"]),
    (misshapen, [NORM, "[1, 64]", "[64]"]),
    (of_another_size, ["model.layers.2.", "lacks", "more"]),
    (twice, [NORM, "in two files"]),
    (cut, ["damaged or incomplete"]),
    (no_index, ["neither model.safetensors nor"]),
    (index_of_nothing, [INDEX, "not readable"]),
    (integers, ["quantised (I8)", "fp32, fp16 or bf16"]),
]


@pytest.mark.parametrize(("damage", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_incomplete_weights_are_refused_by_name(tmp_path, save_tiny, monkeypatch, damage, words):
    folder = save_tiny(tmp_path / "llama", shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    damage(folder)
    monkeypatch.setattr(load, "load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError) as refused:
        resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    assert all(word in str(refused.value) for word in [*words, "fix: "]), refused.value
    assert "\n" not in str(refused.value)
    assert refused.value.exit_status == 2


@pytest.mark.parametrize("verb", [federate, single])
def test_no_run_directory_is_made_for_them(tmp_path, save_tiny, verb):
    folder = save_tiny(tmp_path / "llama", shard_size="100KB")
    tensor_gone_everywhere(folder)
    config = from_flat(
        {"model.backbone": str(folder), "data.synthetic-patients": 60, "federation.hospitals": 2}
    )
    with pytest.raises(UserError, match=NORM):
        verb(config, command_line=[], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tied_head_and_old_frequencies_may_be_there_or_not(tmp_path, save_tiny, set_config):
    folder = save_tiny(tmp_path / "llama")
    file = folder / "model.safetensors"
    assert "lm_head.weight" not in load_file(file)
    embedding = load_file(file)["model.embed_tokens.weight"]
    old = {
        "lm_head.weight": embedding.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    edit(file, lambda content: content.update(old))
    resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    set_config(folder, tie_word_embeddings=False)
    resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    edit(file, lambda content: content.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        resolve_backbone(str(folder), cache_dir=tmp_path / "cache")


def test_the_fingerprint_covers_what_is_loaded_and_nothing_else(tmp_path, save_tiny):
    folder, cache = save_tiny(tmp_path / "llama"), tmp_path / "cache"
    first = resolve_backbone(str(folder), cache_dir=cache).fingerprint
    # transformers reads model.safetensors where there is one
    save_file({"stray": torch.ones(1)}, folder / "consolidated.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "consolidated.safetensors"}}))
    assert resolve_backbone(str(folder), cache_dir=cache).fingerprint == first
    ends = folder / "generation_config.json"
    ends.write_text(json.dumps(json.loads(ends.read_text()) | {"eos_token_id": [1, 7]}))
    assert resolve_backbone(str(folder), cache_dir=cache).fingerprint != first


@pytest.mark.parametrize("ends", ["a", True, [1, [2]], [1, None], {}, 1.5])
def test_an_end_that_is_no_token_is_refused(tmp_path, save_tiny, ends):
    """Such an end would stop the answers after hours of training."""
    folder = save_tiny(tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UserError, match="eos_token_id that is no token"):
        resolve_backbone(str(folder), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
def test_json_too_deep_to_read_is_not_readable(tmp_path, save_tiny, file):
    folder = save_tiny(tmp_path / "llama")
    if file == INDEX:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text("[" * 100_000)
    with pytest.raises(UserError, match="readable"):
        resolve_backbone(str(folder), cache_dir=tmp_path / "cache")


def test_a_hub_behind_a_proxy_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_socks)
    with pytest.raises(UserError, match=r"ImportError.*proxy"):
        resolve_backbone("someone/llama", cache_dir=tmp_path)


def no_socks(*args, **keys) -> None:
    """What httpx says of a SOCKS proxy."""
    raise ImportError("socksio")


def digest(file: Path, cache: Path) -> str:
    with Reading([file], cache) as under_way:
        return under_way.digest()


def test_the_same_size_and_date_do_not_fool_it(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_TIMESTAMP_GRANULARITY_NANOSECONDS", 0)
    file, cache = tmp_path / "model.safetensors", tmp_path / "cache"
    file.write_bytes(b"one")
    time.sleep(0.02)  # the file system's clock ticks every 4 ms
    dates = file.stat().st_atime_ns, file.stat().st_mtime_ns
    first = digest(file, cache)
    remembered = list((cache / "fingerprints").iterdir())
    assert [one.read_text().strip() for one in remembered] == [first]
    remembered[0].write_text("known\n")
    assert digest(file, cache) == "known"
    file.write_bytes(b"two")
    os.utime(file, ns=dates)
    assert file.stat().st_mtime_ns == dates[1]
    assert digest(file, cache) not in ("known", first)
    (tmp_path / "other").write_bytes(b"one")
    (tmp_path / "other").replace(file)
    os.utime(file, ns=dates)
    assert digest(file, cache) == first


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    digest(file, tmp_path / "cache")
    assert not (tmp_path / "cache" / "fingerprints").exists()
