"""Safetensors files that carry the digest of what they hold, so that an altered one is refused.

The digest covers names, dtypes, shapes and bytes, and stands in the file's own metadata: one file,
replaced as a whole, which every reader of safetensors can still read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import UserError
from common.files import json_document, utf8, write_bytes

if TYPE_CHECKING:
    from common.records.run import SavedFacts

Tensors = dict[str, np.ndarray[Any, Any]]
T = TypeVar("T")
_DIGEST = "sha256"
"""Key of a tensor file's metadata, and of a checkpoint's facts.json."""
AS_WRITTEN = "the file as it was written"


class Altered(UserError):
    """A file that is not what was written: a damaged disk, another hand, an earlier FedRx.

    Its text holds nothing of the content and no folder: a hospital may tell it to the server.
    """


def content_sha256(tensors: Tensors) -> str:
    """Return sha256 of tensors as they are, keys sorted: key, dtype, shape, bytes.

    >>> a = {"step": np.array(1)}
    >>> content_sha256(a) == content_sha256({"step": np.array(1.0)})
    False
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = np.ascontiguousarray(tensors[key])
        shape = "x".join(map(str, tensors[key].shape))
        digest.update(f"{key}\0{value.dtype.str}\0{shape}\0".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def write_tensors(target: Path, tensors: Tensors) -> None:
    """Write a safetensors file with its digest, atomically.

    Raises:
        DiskFull: if there is no room.
    """
    whole = {key: np.asarray(value, order="C") for key, value in tensors.items()}
    write_bytes(target, save(whole, metadata={_DIGEST: content_sha256(whole)}))


def read_tensors(source: Path) -> Tensors:
    """Read a file that ``write_tensors`` wrote.

    Raises:
        Altered: if it cannot be read, or is not what was written.
    """
    try:
        with safe_open(source, framework="numpy") as file:
            digest = (file.metadata() or {}).get(_DIGEST)
            tensors: Tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        digest, tensors = None, {}
    if digest != content_sha256(tensors):
        raise Altered(
            f"{source.name} is damaged, was altered, or is an earlier FedRx's, which kept no "
            "digest: it is not used",
            allowed=AS_WRITTEN,
            fix="bring it back from a copy, or start a new run",
        )
    return tensors


def under(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors whose names begin with a prefix, without it.

    >>> under("own.", {"own.b": 1, "state.step": 2})
    {'b': 1}
    """
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def digests_of(b: Tensors, extra: Tensors) -> dict[str, str]:
    """Return the digests of a checkpoint's tensors."""
    return {"b": content_sha256(b), "extra": content_sha256(extra)}


def sealed(facts: Mapping[str, object], digests: Mapping[str, str]) -> bytes:
    """Render facts.json: the facts, the digests of the tensors beside it, and its own."""
    own = hashlib.sha256(utf8(json_document([dict(facts), dict(digests)]))).hexdigest()
    return utf8(json_document({**facts, _DIGEST: {**digests, "facts": own}}))


def unsealed(file: Path) -> "tuple[SavedFacts, dict[str, str]]":
    """Return the facts and digests that ``sealed`` rendered, if they are still the same bytes."""
    # What trains without a run directory (the benchmarks on a GPU) has no use for pydantic.
    from common.records.run import SavedFacts

    try:
        content = file.read_bytes()
        facts = json.loads(content)
        digests = facts.pop(_DIGEST)
        del digests["facts"]
        if sealed(facts, digests) == content:
            return SavedFacts.read(facts, what=file.name), digests
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        pass
    raise damaged(file.parent.name)


def damaged(checkpoint: str) -> Altered:
    """Return the error of a checkpoint that cannot be read or is not what was written."""
    return Altered(
        f"checkpoint {checkpoint} is damaged, was altered, or is an earlier FedRx's, which kept no "
        "digests: it is not used",
        allowed=AS_WRITTEN,
        fix="bring it back from a copy, or start a new run; a run whose training is not done goes "
        "on from the checkpoint before it, once this one is removed",
    )
