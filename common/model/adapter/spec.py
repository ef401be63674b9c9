"""What the adapter is, and its frozen A: drawn from a named seed, fingerprinted by sha256.

Shapes: D input width of a projection, R rank.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import SettingError
from common.model.adapter.rolora import RoLoRA
from common.model.adapter.scheme import A, B, Scheme
from common.seeds import stream

INITIALISERS = ("kaiming-uniform", "orthonormal")
SCHEMES = {"fa-lora": Scheme((B,)), "lora": Scheme((A, B)), "rolora": RoLoRA((A, B))}
_ORTHONORMAL_GRID = 2.0**-20


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What the adapter is; every party of a federation holds the same one."""

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the adapted linear modules, in every layer."""
    rank: int = 16
    alpha: float = 16.0
    """Numerator of the scale: the update is alpha / rank * B A."""
    seed: int = 0
    """Seed of A, which is drawn per module name."""
    initialiser: str = "kaiming-uniform"
    mode: str = "fa-lora"
    """Names the scheme: ``fa-lora`` trains B alone, ``lora`` trains A and B, ``rolora``
    one of them after the other."""

    def __post_init__(self) -> None:
        """Check the values that configuration files set."""
        if self.rank < 1:
            raise SettingError(f"adapter.rank={self.rank}", allowed="1 or more")
        if self.mode not in SCHEMES:
            raise SettingError(f"adapter.mode={self.mode!r}", allowed=", ".join(SCHEMES))
        if self.initialiser not in INITIALISERS:
            raise SettingError(
                f"adapter.initialiser={self.initialiser!r}", allowed=", ".join(INITIALISERS)
            )
        if not self.targets:
            raise SettingError("adapter.targets is empty", fix="name at least one projection")

    @property
    def scheme(self) -> Scheme:
        """What each round trains and sends."""
        return SCHEMES[self.mode]

    @property
    def scale(self) -> float:
        """Factor of the low-rank product.

        >>> AdapterSpec(rank=32, alpha=16.0).scale
        0.5
        """
        return self.alpha / self.rank


def check_rank(spec: AdapterSpec, module: str, width: int) -> None:
    """Check that A can be drawn for a module of a width.

    Raises:
        UserError: If more orthonormal rows are asked for than the width allows.
    """
    if spec.initialiser == "orthonormal" and spec.rank > width:
        raise SettingError(
            f"adapter.rank={spec.rank} with an orthonormal A on {module}",
            allowed=f"up to {width}",
            fix="set adapter.rank, or adapter.initialiser to another drawing of A",
        )


def draw_a(spec: AdapterSpec, module: str, width: int) -> NDArray[np.float32]:
    """Draw one module's frozen A, [R, D], from its named stream.

    ``kaiming-uniform`` is PEFT's: U(-b, b) with b = 1 / sqrt(D) (He et al., 2015, a = sqrt(5)).
    ``orthonormal`` has orthonormal rows, rounded to multiples of 2^-20 so that machines whose
    linear algebra differs in the last bit still draw the same A.

    Raises:
        UserError: If more orthonormal rows are asked for than the width allows.
    """
    generator = stream(spec.seed, "adapter-a", module)
    if spec.initialiser == "kaiming-uniform":
        bound = 1.0 / math.sqrt(width)
        return generator.uniform(-bound, bound, size=(spec.rank, width)).astype(np.float32)
    check_rank(spec, module, width)
    q_DR, r_RR = np.linalg.qr(generator.standard_normal((width, spec.rank)))
    a_RD = (q_DR * np.sign(np.diag(r_RR))).T
    return (np.round(a_RD / _ORTHONORMAL_GRID) * _ORTHONORMAL_GRID).astype(np.float32)


def digest_of_all(spec: AdapterSpec, digests: Mapping[str, str]) -> str:
    """Return sha256 over the modules' drawn A's, and the values that scale them.

    Args:
        spec: What drew them.
        digests: sha256 of each A as fp32, little-endian, by the module's name.
    """
    head = f"{spec.rank}|{spec.alpha}|{spec.initialiser}"
    lines = [head, *(f"{key} {digest}" for key, digest in sorted(digests.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
