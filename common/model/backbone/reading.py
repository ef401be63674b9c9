"""Weight files on their way into memory: every byte read once, hashed and placed as it comes.

Each file has a thread of its own, beside whatever the caller does meanwhile (importing
transformers takes longer): reading, hashing and copying let go of the interpreter. What is wanted
in fp8 or nf4 is quantised where it arrives, weight by weight. The format is
https://huggingface.co/docs/safetensors: 8 bytes that say how long the head is, the head (JSON:
tensor -> dtype, shape, first and last byte), the tensors without a gap.
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_text
from common.model.kernels.frozen import FrozenWeight, Quantiser

CHUNK_BYTES = 2**25
"""Read, hashed and copied at a time; where the interpreter is busy each turn costs some 5 ms."""
LONGEST_HEAD = 100_000_000
"""As the format says."""
_TIMESTAMP_GRANULARITY_NANOSECONDS = 2_000_000_000
"""A file that changed later than this ago may change again within one tick of its clock."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where weights go, and in which arithmetic."""

    device: torch.device
    dtype: torch.dtype
    quantiser: Quantiser | None = None
    """Of the layers' linear maps, where they are wanted in another format."""

    def kept(self, name: str, tensor: Tensor) -> FrozenWeight:
        """Return a tensor on the device as it is wanted there."""
        wanted = tensor.to(self.dtype)
        # So a Llama's layers call theirs; what is missed is quantised when the model is there.
        if self.quantiser and name.endswith("_proj.weight"):
            return self.quantiser.of(wanted)
        return wanted


@dataclass(frozen=True, kw_only=True)
class Held:
    """Weights that lie at their destination and wait for their model."""

    destination: Destination
    tensors: dict[str, FrozenWeight]

    def take(self, destination: Destination) -> dict[str, FrozenWeight]:
        """Hand them over, once; nothing where they lie elsewhere. They are let go of anyway."""
        tensors = dict(self.tensors) if destination == self.destination else {}
        self.tensors.clear()
        return tensors


class Reading:
    """The reading of weight files: begins with its block, and is over when that is left.

    Nothing is read where the digest is remembered and no destination is named.

    Args:
        files: Sorted by name; may be none.
        cache_dir: Where digests are remembered.
        destination: Where the tensors go; None: they are only hashed.
        progress: Called with one line when it takes long.
    """

    def __init__(
        self,
        files: Sequence[Path],
        cache_dir: Path,
        *,
        destination: Destination | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._files, self._destination = files, destination
        self._progress = progress or (lambda _line: None)
        self._folder = cache_dir / "fingerprints"
        self._stop = threading.Event()
        self._parts: list[Future[tuple[bytes, dict[str, FrozenWeight]]]] = []
        self._known = ""

    def __enter__(self) -> Self:
        """Begin to read."""
        self._began = time.time_ns()
        self._stamp, self._newest = _stamp(self._files)
        self._remembered = self._folder / hashlib.sha256(self._stamp).hexdigest()
        if self._remembered.is_file():
            self._known = self._remembered.read_text(encoding="ascii").strip()
        size = sum(file.stat().st_size for file in self._files)
        if size > 2**31 and not self._known:
            self._progress(f"hashing the backbone's weights ({size / 2**30:.1f} GiB), once")
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(self._files)))
        if self._destination or not self._known:
            self._parts = [self._pool.submit(self._read, file) for file in self._files]
        return self

    def __exit__(self, *_raised: object) -> None:
        """Stop what is still being read, and wait for that."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def digest(self) -> str:
        """Return sha256 over names and contents of the files, when all are read.

        Remembered by path, inode, size and both times of change: the time of the inode's change
        cannot be set back, so other content with the old size and date is hashed anew.

        Raises:
            UserError: If a file changes meanwhile, or cannot be read.
        """
        parts = self._finished()
        if self._known:
            return self._known
        digest = hashlib.sha256()
        for path, (part, _) in zip(self._files, parts, strict=True):
            digest.update(path.name.encode())
            digest.update(part)
        if self._began - self._newest > _TIMESTAMP_GRANULARITY_NANOSECONDS:
            write_text(self._remembered, digest.hexdigest() + "\n")
        return digest.hexdigest()

    def held(self) -> Held | None:
        """Return the tensors, when all are read; None without a destination.

        Raises:
            UserError: If a file changes meanwhile, or cannot be read.
        """
        if self._destination is None:
            return None
        tensors = {name: tensor for _, part in self._finished() for name, tensor in part.items()}
        self._parts.clear()
        return Held(destination=self._destination, tensors=tensors)

    def _finished(self) -> list[tuple[bytes, dict[str, FrozenWeight]]]:
        try:
            parts = [part.result() for part in self._parts]
            obstacle = "" if _stamp(self._files)[0] == self._stamp else "changed while being read"
        except (OSError, _DamagedError) as error:
            obstacle = f"cannot be read ({error})"
        if obstacle:
            raise UserError(
                f"model.backbone: the weights in {self._files[0].parent} {obstacle}",
                fix="wait until they are written, then start again",
            )
        return parts

    def _read(self, path: Path) -> tuple[bytes, dict[str, FrozenWeight]]:
        """Return a file's digest (empty where that is known) and its tensors."""
        on = self._destination.device if self._destination else torch.device("cpu")
        with path.open("rb", buffering=0) as file:
            source = _Source(file, None if self._known else hashlib.sha256(), self._stop, on)
            if self._destination:
                tensors = source.tensors(self._destination)
                return source.digest(), tensors
            while source.piece(CHUNK_BYTES) is not None:
                pass
            return source.digest(), {}


class _DamagedError(Exception):
    """A file is not what its head says."""


class _Source:
    """One file, read from its first byte to its last."""

    def __init__(
        self, file: BinaryIO, hasher: Any, stop: threading.Event, device: torch.device
    ) -> None:
        self._file, self._hasher, self._stop = file, hasher, stop
        # A GPU copies from pinned memory without a detour.
        pinned = device.type == "cuda"
        self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned)
        self._view = self._buffer.numpy().data

    def digest(self) -> bytes:
        """Return sha256 of all that was read; empty without a hasher."""
        return self._hasher.digest() if self._hasher else b""

    def piece(self, most: int) -> Tensor | None:
        """Read and hash up to so many bytes; None at the end. The next call overwrites it."""
        if self._stop.is_set():
            raise _DamagedError("nobody waits for it")
        count = self._file.readinto(self._view[:most])  # type: ignore[attr-defined]
        if not count:
            return None
        if self._hasher:
            self._hasher.update(self._view[:count])
        return self._buffer[:count]

    def tensors(self, destination: Destination) -> dict[str, FrozenWeight]:
        """Return the tensors; one at a time is on the device as it stands in the file."""
        head = torch.empty(8, dtype=torch.uint8)
        self._fill(head)
        size = int.from_bytes(head.numpy().tobytes(), "little")
        if size > LONGEST_HEAD:
            raise _DamagedError("its head is too long")
        head = torch.empty(size, dtype=torch.uint8)
        self._fill(head)
        found = {}
        for name, dtype, shape in _entries(head.numpy().tobytes()):
            tensor = torch.empty(shape, dtype=dtype, device=destination.device)
            self._fill(tensor.view(-1).view(torch.uint8))
            found[name] = destination.kept(name, tensor)
            del tensor  # before the next one takes memory
        if self.piece(1) is not None:
            raise _DamagedError("there is more than its head says")
        return found

    def _fill(self, bytes_N: Tensor) -> None:
        filled = 0
        while filled < len(bytes_N):
            piece = self.piece(min(CHUNK_BYTES, len(bytes_N) - filled))
            if piece is None:
                raise _DamagedError("it ends too early")
            bytes_N[filled : filled + len(piece)].copy_(piece)
            filled += len(piece)


def _entries(head: bytes) -> Iterator[tuple[str, torch.dtype, list[int]]]:
    """Yield a head's tensors in the order of their bytes."""
    place = 0
    try:
        content = json.loads(head)
        content.pop("__metadata__", None)
        for name, entry in sorted(content.items(), key=lambda one: one[1]["data_offsets"]):
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            last = place + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [place, last]:
                raise ValueError(name)
            place = last
            yield name, dtype, shape
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _DamagedError("its head does not say what follows") from None


def _stamp(files: Sequence[Path]) -> tuple[bytes, int]:
    """Return what identifies the files' state on this disk, and the latest change (ns)."""
    facts = [(str(file.resolve()), file.stat()) for file in files]
    state = [[p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in facts]
    newest = max((s.st_ctime_ns for _, s in facts), default=0)
    return json.dumps(["weights", state]).encode(), newest
