"""Weights quantised while they are read are those of the whole model, quantised afterwards."""

import json
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from common.model.adapter.falora import AdapterSpec
from common.model.backbone import reading
from common.model.backbone.load import load_model, resolve_backbone
from common.model.backbone.reading import Destination
from common.model.backbone.tiny import tiny_config, tiny_tokenizer
from common.model.kernels import frozen
from common.model.kernels.elementwise import TORCH
from common.model.kernels.frozen import Fp8Weight, Quantiser
from common.model.kernels.nf4 import Nf4Weight
from common.model.session import DTYPES, Session, open_session
from common.text.batches import Encoded, pack

CPU = torch.device("cpu")
PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
SETTINGS = [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}]


def random_llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(tiny_config().to_diff_dict() | settings)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model.eval()


def saved(folder: Path, *, on_disk: torch.dtype = torch.float32, **settings) -> Path:
    random_llama(**settings).to(on_disk).save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(params=["fp8", "nf4"])
def quantiser(request, monkeypatch) -> Quantiser:
    monkeypatch.setattr(frozen, "fp8_obstacle", lambda device, dtype: "")
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return Quantiser(weights=request.param, kernels=TORCH)


def parts(weight: Fp8Weight | Nf4Weight) -> list[Tensor]:
    """All that a quantised weight consists of."""
    if isinstance(weight, Fp8Weight):
        return [weight.values_OD.view(torch.uint8), weight.scales_O1]
    state = weight.state
    inner = [state.state2.absmax, state.state2.code]
    return [weight.blocks, state.absmax, state.code, state.offset, *inner]


def loaded(folder: Path, cache: Path, dtype: torch.dtype, quantiser: Quantiser, *, early: bool):
    destination = Destination(device=CPU, dtype=dtype, quantiser=quantiser) if early else None
    spec = resolve_backbone(str(folder), cache_dir=cache, destination=destination)
    return load_model(spec, device=CPU, dtype=dtype, quantiser=quantiser)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_quantised_on_their_way_are_those_of_the_whole_model(
    tmp_path, monkeypatch, quantiser, settings, on_disk, dtype
):
    folder = saved(tmp_path / "llama", on_disk=on_disk, **settings)
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    mapped = loaded(folder, tmp_path / "cache", dtype, quantiser, early=False)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("twice"))
    ours = loaded(folder, tmp_path / "cache", dtype, quantiser, early=True)
    of = Nf4Weight.of if quantiser.weights == "nf4" else lambda w: Fp8Weight.of(w, TORCH)
    for number, layer in enumerate(whole.model.layers):
        for child, parent in PROJECTIONS.items():
            linear = getattr(getattr(layer, parent), child)
            name = f"model.layers.{number}.{parent}.{child}"
            expected = parts(of(linear.weight))
            for model in (ours, mapped):
                found = model.get_submodule(name)
                assert found.weight.float().shape == linear.weight.shape
                for one, other in zip(parts(found.weight), expected, strict=True):
                    assert torch.equal(one, other), name
                biases = [found.bias, linear.bias]
                assert biases == [None, None] or torch.equal(*biases)
    left = dict(ours.named_parameters())
    theirs = dict(whole.named_parameters())
    projections = {n for n in theirs if n.endswith("_proj.weight")}
    assert left.keys() == theirs.keys() - projections
    for name, tensor in left.items():
        assert tensor.dtype is dtype
        assert torch.equal(tensor, theirs[name]), name
    assert not any(one.requires_grad for one in ours.parameters())
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == whole.config.tie_word_embeddings
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours(input_ids=ids).logits, mapped(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_sessions_compute_the_same(tmp_path, quantiser, dtype):
    folder = saved(tmp_path / "llama")
    batch = pack([Encoded(input_ids=tuple(range(5, 45)), answer_start=30, unit=0)])

    def opened(destination: Destination | None) -> Session:
        spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=destination)
        options = {"device": "cpu", "dtype": dtype, "weights": quantiser.weights}
        session = open_session(spec, AdapterSpec(rank=2), **options)
        assert spec.held is None or spec.held.tensors == {}
        assert len(session.adapter.modules) == 2 * spec.shape.layers
        return session

    destination = Destination(device=CPU, dtype=DTYPES[dtype], quantiser=quantiser)
    with torch.inference_mode():
        found, expected = (opened(one).hidden_states(batch) for one in (destination, None))
    assert torch.equal(found, expected)


def test_a_weight_is_gone_before_the_next_one_of_its_file_comes(tmp_path, monkeypatch, quantiser):
    folder, mine = saved(tmp_path / "llama"), threading.local()
    kept, of = Destination.kept, Quantiser.of
    alive, threads, shapes = [], set(), []

    def seen(tensor):
        vars(mine).setdefault("weights", []).append(weakref.ref(tensor))

    def watched_kept(self, name, tensor):
        if name.endswith("_proj.weight"):
            seen(tensor)
        return kept(self, name, tensor)

    def watched_of(self, weight_OD):
        seen(weight_OD)
        threads.add(threading.current_thread())
        shapes.append(weight_OD.shape)
        return of(self, weight_OD)

    def watched_empty(*args, **options):
        alive.append(sum(one() is not None for one in vars(mine).get("weights", [])))
        return torch.empty(*args, **options)

    monkeypatch.setattr(Destination, "kept", watched_kept)
    monkeypatch.setattr(Quantiser, "of", watched_of)
    destination = Destination(device=CPU, dtype=torch.bfloat16, quantiser=quantiser)
    with monkeypatch.context() as patched:
        patched.setattr(reading, "torch", SimpleNamespace(**vars(torch) | {"empty": watched_empty}))
        spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache", destination=destination)
    assert len(alive) > len(shapes) == 7 * spec.shape.layers
    assert max(alive) == 0
    assert threading.main_thread() not in threads
    load_model(spec, device=CPU, dtype=torch.bfloat16, quantiser=quantiser)
    assert len(shapes) == 7 * spec.shape.layers


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_quantised_on_its_way_are_the_layers_linear_maps(settings):
    model = random_llama(**settings)
    linear = {
        f"{name}.weight"
        for name, one in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(one, nn.Linear)
    }
    destination = Destination(
        device=CPU, dtype=torch.float32, quantiser=Quantiser(weights="fp8", kernels=TORCH)
    )
    found = {
        name
        for name, tensor in model.state_dict().items()
        if not isinstance(destination.kept(name, tensor), Tensor)
    }
    assert found == linear
    assert "lm_head.weight" in model.state_dict()


def test_weights_are_quantised_one_after_the_other(monkeypatch):
    inside, most = [], []

    def slow(weight_OD, kernels):
        inside.append(weight_OD)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    monkeypatch.setattr(Fp8Weight, "of", slow)
    quantiser = Quantiser(weights="fp8", kernels=TORCH)
    threads = [threading.Thread(target=quantiser.of, args=(torch.ones(2, 2),)) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert most == [1, 1, 1, 1]


def test_nf4_is_imported_before_threads_want_it(monkeypatch):
    asked = []
    monkeypatch.setattr(frozen, "blockwise", lambda: asked.append(threading.current_thread()))
    Quantiser(weights="fp8", kernels=TORCH)
    assert not asked
    Quantiser(weights="nf4", kernels=TORCH)
    assert asked == [threading.current_thread()]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_head_of_its_own_is_refused_where_it_should_be_tied(tmp_path, early, same):
    """Read early it would be dropped, mapped it would be kept: two functions of one fingerprint."""
    model = random_llama(tie_word_embeddings=False)
    if same:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    content = json.loads(config.read_text()) | {"tie_word_embeddings": True}
    config.write_text(json.dumps(content))
    destination = Destination(device=CPU, dtype=torch.float32) if early else None
    spec = resolve_backbone(str(tmp_path / "llama"), cache_dir=tmp_path, destination=destination)
    if same:
        load_model(spec, device=CPU, dtype=torch.float32)
        return
    with pytest.raises(UserError, match="another lm_head.weight"):
        load_model(spec, device=CPU, dtype=torch.float32)
