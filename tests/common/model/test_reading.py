"""Weights are read once, hashed from what was read, and become the model that was saved."""

import hashlib
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from common.configio import from_flat
from common.errors import UserError
from common.model import session as session_module
from common.model.backbone import load, reading
from common.model.backbone.load import load_model, resolve_backbone
from common.model.backbone.reading import Destination, Reading
from common.model.kernels import frozen, nf4
from common.model.kernels.choice import kernels_named
from common.model.kernels.elementwise import TORCH
from common.model.kernels.frozen import Quantiser
from common.model.session import early_destination
from common.training import worker as worker_module
from common.training.worker import Worker

CPU = torch.device("cpu")
FP32, BF16 = (Destination(device=CPU, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
FP8 = Destination(
    device=CPU, dtype=torch.float32, quantiser=Quantiser(weights="fp8", kernels=TORCH)
)
WAIT = 120  # seconds until a test fails that would otherwise hang


class Watched:
    """Counts what is read and hashed of weight files; may do something before each read."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.hashed = 0
        self.before = lambda path: None

    def reset(self) -> None:
        self.read.clear()
        self.hashed = 0


class WatchedFile:
    def __init__(self, watched: Watched, path: Path, file) -> None:
        self.watched, self.path, self.file = watched, path, file

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def readinto(self, view):
        self.watched.before(self.path)
        count = self.file.readinto(view)
        self.watched.read[self.path.name] += count
        return count


class WatchedHash:
    def __init__(self, watched: Watched, honest) -> None:
        self.watched, self.honest = watched, honest
        self.digest, self.hexdigest = honest.digest, honest.hexdigest

    def update(self, content) -> None:
        self.watched.hashed += len(content) * isinstance(content, memoryview)
        self.honest.update(content)


@pytest.fixture
def watched(monkeypatch):
    seen, opened, sha256 = Watched(), Path.open, hashlib.sha256

    def open_watched(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        return WatchedFile(seen, path, file) if path.suffix == ".safetensors" else file

    monkeypatch.setattr(Path, "open", open_watched)
    monkeypatch.setattr(hashlib, "sha256", lambda *a, **k: WatchedHash(seen, sha256(*a, **k)))
    return seen


@pytest.fixture
def folder(tmp_path, save_tiny):
    return save_tiny(tmp_path / "llama", shard_size="100KB")


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(reading, "_TIMESTAMP_GRANULARITY_NANOSECONDS", 0)
    time.sleep(0.02)  # the file system's clock ticks every 4 ms


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def by_hand(folder: Path) -> str:
    """The digest as it is defined, of whole files."""
    whole = b"".join(
        file.name.encode() + hashlib.sha256(file.read_bytes()).digest() for file in files_of(folder)
    )
    return hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("destination", [FP32, FP8])
def test_every_byte_is_read_once_and_hashed_the_first_time(
    tmp_path, folder, settled, watched, monkeypatch, destination
):
    asked = {"device": CPU, "dtype": torch.float32, "quantiser": destination.quantiser}
    sizes = {file.name: file.stat().st_size for file in files_of(folder)}
    total = sum(sizes.values())
    assert len(sizes) > 2
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("twice"))
    first = resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=destination)
    load_model(first, **asked)
    assert (dict(watched.read), watched.hashed) == (sizes, total)
    watched.reset()
    again = resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=destination)
    load_model(again, **asked)
    assert (dict(watched.read), watched.hashed) == (sizes, 0)
    watched.reset()
    known = resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    assert (dict(watched.read), watched.hashed) == ({}, 0)
    alone = resolve_backbone(str(folder), cache_dir=tmp_path / "other")
    assert (dict(watched.read), watched.hashed) == (sizes, total)
    assert first == again == known == alone


@pytest.mark.parametrize("destination", [None, FP32, BF16, FP8])
def test_the_hash_is_that_of_the_files(tmp_path, folder, monkeypatch, destination):
    monkeypatch.setattr(reading, "CHUNK_BYTES", 999)
    with Reading(files_of(folder), tmp_path / "cache", destination=destination) as under_way:
        assert under_way.digest() == by_hand(folder)


def turn_head(file: Path) -> None:
    """Name the tensors in another order than that of their bytes."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    turned = json.dumps(dict(reversed(head.items()))).encode()
    file.write_bytes(len(turned).to_bytes(8, "little") + turned + content[8 + size :])


@pytest.mark.parametrize("destination", [FP32, BF16])
@pytest.mark.parametrize("chunk", [1, 37, 2**20])
def test_tensors_are_what_the_library_reads(tmp_path, monkeypatch, destination, chunk):
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    content = {f"t{n}": torch.randn(3, n, 5).to(dtype) for n, dtype in enumerate(dtypes)}
    content |= {"number": torch.tensor(1.5), "row": torch.randn(7)}
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
    turn_head(tmp_path / "model.safetensors")
    with Reading([tmp_path / "model.safetensors"], tmp_path, destination=destination) as under_way:
        held = under_way.held()
    found, expected = held.take(destination), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is destination.dtype
        assert torch.equal(found[name], tensor.to(destination.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
)
def test_the_model_is_the_one_that_transformers_loads(
    tmp_path, folder, set_config, dtype, settings
):
    set_config(folder, **settings)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    destination = Destination(device=CPU, dtype=dtype)
    spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=destination)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = load_model(spec, device=CPU, dtype=dtype)
    for names in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(theirs, names)()), dict(getattr(ours, names)())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype is tensor.dtype
            assert torch.equal(found[name], tensor), name
    assert not any(one.requires_grad for one in ours.parameters())
    assert not ours.training
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.dtype is ours.config.dtype is dtype
    assert ours.generation_config.eos_token_id == [1, 7]
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_held_weights_are_handed_over_once_and_kept_by_nobody(tmp_path, folder):
    def held():
        spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=FP32)
        return spec, spec.held

    spec, waiting = held()
    assert waiting.take(FP32)
    assert waiting.take(FP32) == {}
    load_model(spec, device=CPU, dtype=torch.float32)
    spec, waiting = held()
    model = load_model(spec, device=CPU, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert waiting.tensors == {}


@pytest.mark.parametrize(("held", "wanted"), [(FP8, FP32), (FP32, FP8)])
def test_weights_in_another_format_are_not_taken(tmp_path, folder, held, wanted):
    spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=held)
    waiting = spec.held
    model = load_model(spec, device=CPU, dtype=torch.float32, quantiser=wanted.quantiser)
    assert waiting.tensors == {}
    quantised = not isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert quantised == (wanted is FP8)


def test_without_held_weights_another_device_reads_them_itself(tmp_path, folder, watched):
    spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    watched.reset()
    model = load_model(spec, device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(watched.read.values()) == sum(file.stat().st_size for file in files_of(folder))
    assert {(one.device.type, one.dtype) for one in model.parameters()} == {("meta", model.dtype)}
    assert {one.device.type for one in model.buffers()} == {"meta"}


@pytest.mark.parametrize("destination", [None, FP32, FP8])
def test_all_shards_are_read_at_once_and_beside_the_caller(
    tmp_path, folder, watched, monkeypatch, destination
):
    """Each thread waits for all others, and for the caller to come as far as the configuration."""
    together, arrived = threading.Barrier(len(files_of(folder))), threading.Event()
    begun = set()

    def first_read(path):
        if path not in begun:
            begun.add(path)
            together.wait(WAIT)
            assert arrived.wait(WAIT)

    def read_llama_config(*args):
        arrived.set()
        return honest(*args)

    watched.before, honest = first_read, load.read_llama_config
    monkeypatch.setattr(load, "read_llama_config", read_llama_config)
    resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=destination)
    assert begun == set(files_of(folder))


def test_the_model_is_imported_while_its_weights_come(tmp_path, folder, watched, monkeypatch):
    imported, honest = threading.Event(), load._llama
    monkeypatch.setattr(load, "_llama", lambda: imported.set() or honest())
    watched.before = lambda path: imported.wait(WAIT) or pytest.fail("nobody imports it")
    resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=FP32)
    assert imported.is_set()


def test_a_refusal_ends_the_reading(tmp_path, folder, watched, monkeypatch, set_config):
    """Nothing is read before it, and then 64 bytes a millisecond of each file."""
    refused, honest = threading.Event(), load.read_llama_config

    def read_llama_config(*args):
        try:
            return honest(*args)
        finally:
            refused.set()

    monkeypatch.setattr(load, "read_llama_config", read_llama_config)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 64)
    watched.before = lambda path: refused.wait(WAIT) and time.sleep(0.001)
    set_config(folder, model_type="gpt2")
    running = threading.active_count()
    with pytest.raises(UserError, match="not a Llama"):
        resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=FP32)
    assert threading.active_count() == running
    assert sum(watched.read.values()) < sum(file.stat().st_size for file in files_of(folder)) / 4


def grown(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 4)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def touched(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("destination", [None, FP32, FP8])
@pytest.mark.parametrize("change", [grown, cut, touched])
def test_a_file_that_changes_meanwhile_is_refused(
    tmp_path, folder, settled, watched, monkeypatch, destination, change
):
    files, done = files_of(folder), threading.Event()

    def once(path):
        if path == files[0] and not done.is_set():
            done.set()
            change(path)

    watched.before = once
    with Reading(files, tmp_path / "cache", destination=destination) as under_way:
        with pytest.raises(UserError, match="changed while|cannot be read") as refused:
            under_way.digest()
        if destination:
            with pytest.raises(UserError, match="changed while|cannot be read"):
                under_way.held()
    assert str(folder) in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_other_weights_are_another_fingerprint_also_when_they_are_loaded(tmp_path, folder):
    """What a resumed run, a handshake and an answer are held against."""
    cache = tmp_path / "cache"
    before = resolve_backbone(str(folder), cache_dir=cache, destination=FP32).fingerprint
    content = bytearray(files_of(folder)[-1].read_bytes())
    content[-1] ^= 1
    files_of(folder)[-1].write_bytes(content)
    assert resolve_backbone(str(folder), cache_dir=cache, destination=FP32).fingerprint != before


@pytest.fixture
def a_gpu(monkeypatch):
    there = session_module.Choice("cuda:1", "asked for")
    monkeypatch.setattr(session_module, "choose_device", lambda device: there)
    monkeypatch.setattr(frozen, "fp8_obstacle", lambda device, dtype: "")


def test_a_cpus_weights_are_not_read_beforehand():
    for weights in ("bf16", "nf4"):
        assert early_destination("cpu", "bf16", weights, "auto") is None


@pytest.mark.parametrize("weights", ["bf16", "fp8", "nf4"])
def test_a_gpus_weights_are_read_beforehand(a_gpu, weights):
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    found = early_destination("cuda:1", "bf16", weights, "torch")
    quantiser = None if weights == "bf16" else Quantiser(weights=weights, kernels=TORCH)
    cuda = torch.device("cuda:1")
    assert found == Destination(device=cuda, dtype=torch.bfloat16, quantiser=quantiser)


def test_other_kernels_or_another_format_are_another_destination(a_gpu):
    pytest.importorskip("triton")
    asked = [("fp8", "torch"), ("fp8", "triton"), ("bf16", "torch")]
    found = [early_destination("cuda:1", "bf16", *one) for one in asked]
    assert [found.index(one) for one in found] == [0, 1, 2]
    assert found[1].quantiser.kernels is kernels_named("triton")


@pytest.mark.parametrize("weights", ["nf4", "int4"])
def test_a_format_is_refused_before_weights_are_read(a_gpu, monkeypatch, weights):
    monkeypatch.setattr(nf4.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="model.weights="):
        early_destination("cuda:1", "bf16", weights, "torch")


def test_a_worker_opens_what_was_read_beforehand(folder, watched, monkeypatch):
    """With the CPU in a GPU's place: the run's check and its session share one reading."""
    monkeypatch.setattr(worker_module, "early_destination", lambda *asked: FP32)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("twice"))
    keys = {"train.device": "cpu", "train.dtype": "fp32", "train.threads": 1}
    config, worker = from_flat({**keys, "model.backbone": str(folder)}), Worker()
    spec = worker.backbone_to_open(config)
    assert worker.session(config).spec is spec
    assert sum(watched.read.values()) == sum(file.stat().st_size for file in files_of(folder))
