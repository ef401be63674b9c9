"""The weights in a backbone's folder: which files are loaded, and whether all is there.

The checks read the safetensors headers alone, so a 15 GiB folder takes milliseconds.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from common.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|CB|weight_(scale|packed|zero_point)(_inv)?|input_scale"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))$"
)
_HARMLESS = "rotary_emb.inv_freq"
"""Old Llamas carry their rotary frequencies as tensors; the configuration says them anyway."""


def check_weights(
    folder: Path, name: str, expected: Mapping[str, Sequence[int]], *, optional: Collection[str]
) -> None:
    """Hold the headers of the weight files that loading reads against a model.

    Args:
        folder: The backbone's folder.
        name: The backbone as the configuration names it.
        expected: Shape of every tensor of the model.
        optional: Tensors that may be absent (a tied head).

    Raises:
        UserError: If a file is missing or damaged, or a tensor is missing, unknown, misshapen,
            twice there, elsewhere than the index says, or not of floating-point numbers.
    """
    places = _weight_map(folder, name)
    headers = {file: _header(file, name) for file in _files(folder, places)}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for header in headers.values():
        for tensor, facts in header.items():
            if tensor in found:
                raise _refusal(name, f"{tensor} is in two files", fix="fetch the folder again")
            found[tensor] = facts
    moved = [t for t, file in places.items() if t not in headers[folder / file]]
    _refuse_listed(name, f"the file that {INDEX} names for it lacks", moved)
    if any(_QUANTISED.search(t) for t in found):
        raise quantised(name, "")
    missing = [t for t in expected if t not in found and t not in optional]
    _refuse_listed(name, "the folder lacks", missing)
    unknown = [t for t in found if t not in expected and not t.endswith(_HARMLESS)]
    _refuse_listed(name, "a Llama of this configuration does not have", unknown)
    for tensor, (shape, kind) in found.items():
        if tensor in expected and shape != tuple(expected[tensor]):
            raise _refusal(
                name,
                f"{tensor} is {list(shape)}, and config.json asks for {list(expected[tensor])}",
                fix="bring weights and config.json of one model together",
            )
        if kind not in _FLOATS:
            raise quantised(name, kind)


def weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    """Find the weight files that loading reads, sorted by name.

    Raises:
        UserError: If one is missing, or the index is not readable.
    """
    return _files(folder, _weight_map(folder, name))


def _files(folder: Path, places: Mapping[str, str]) -> tuple[Path, ...]:
    return tuple(sorted({folder / file for file in places.values()} or {folder / SINGLE}))


def quantised(name: str, how: str) -> UserError:
    """Return the refusal of a quantised checkpoint.

    >>> print(quantised("folder", "gptq"))
    model.backbone=folder is quantised (gptq); allowed: weights in fp32, fp16 or bf16; fix: \
name the model that it was quantised from
    """
    return UserError(
        f"model.backbone={name} is quantised" + (f" ({how})" if how else ""),
        allowed="weights in fp32, fp16 or bf16",
        fix="name the model that it was quantised from",
    )


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    """Return tensor -> file of a sharded folder; empty where one file holds all."""
    if (folder / SINGLE).is_file():
        return {}
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not places or not all(isinstance(file, str) for file in places.values()):
            raise ValueError
    except FileNotFoundError:
        raise _refusal(
            name,
            f"there is neither {SINGLE} nor {INDEX}",
            fix="name a folder that holds the weights in that format",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refusal(name, f"{INDEX} is not readable", fix="fetch or copy it again") from None
    gone = sorted({file for file in places.values() if not (folder / file).is_file()})
    if gone:
        missing = [tensor for tensor, file in places.items() if file in gone]
        raise _refusal(
            name,
            f"{_some(gone)} is missing, and with it {_some(missing)}",
            fix="fetch or copy it again",
        )
    return dict(places)


def _header(file: Path, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = content.keys()
            slices = {tensor: content.get_slice(tensor) for tensor in names}
            return {t: (tuple(s.get_shape()), str(s.get_dtype())) for t, s in slices.items()}
    except (SafetensorError, OSError):
        raise _refusal(
            name, f"{file.name} is damaged or incomplete", fix="fetch or copy it again"
        ) from None


def _refuse_listed(name: str, verdict: str, tensors: Sequence[str]) -> None:
    if tensors:
        fix = "fetch the folder again, with config.json and weights of one model"
        raise _refusal(name, f"{verdict} {_some(tensors)}", fix=fix)


def _refusal(name: str, what: str, *, fix: str) -> UserError:
    return UserError(f"model.backbone={name}: {what}", fix=fix)


def _some(names: Sequence[str]) -> str:
    """Name up to three, and count the rest.

    >>> _some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
