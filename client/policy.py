"""What a hospital agrees to: its own file ``policy.toml``, which no server can change."""

import tomllib
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import UserError

POLICY = "policy.toml"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Typed(BaseModel):
    """A TOML file whose keys are known, hyphenated and typed."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
    )


Model = TypeVar("Model", bound=Typed)


class Policy(Typed):
    """The limits and agreements of one hospital.

    Without ``max-epsilon`` the server alone decides how patients are protected. The bounds below
    it hold either way: they keep a server from wasting the hospital's machine.
    """

    max_epsilon: float | None = Field(None, gt=0)
    """What all runs together may spend on each patient; with it only private runs are joined."""
    max_delta: float | None = Field(None, gt=0, lt=1)
    """What the deltas of all runs may add up to; see ``epsilon_limit.default_delta`` without it."""
    min_noise_multiplier: float = Field(0.5, ge=0.3)
    """Least noise over the clip norm that a private run may have; below the default one step of
    every patient spends epsilon 9 at delta 1e-5."""
    min_expected_batch: float = Field(2.0, ge=1)
    """Least public divisor of a private step: no step on one patient alone."""
    max_steps: int = Field(10_000, ge=1)
    """Most optimizer steps of a run."""
    max_rounds: int = Field(1_000, ge=1)
    """Most rounds of a run."""
    max_learning_rate: float = Field(10.0, gt=0)
    """Largest learning rate of a run."""
    max_scale: float = Field(64.0, gt=0)
    """Largest scale alpha / rank of the adapter."""
    max_parameter: float = Field(1e4, gt=0)
    """Largest absolute entry of a B that the server sends."""
    allowed_configurations: tuple[Sha256, ...] = Field((), strict=False)
    """Digests (``fedrx deploy`` writes them) of the configurations that may run; empty: any."""
    allowed_digests: tuple[Sha256, ...] = Field((), strict=False)
    """Source digests of FedRx (``fedrx doctor`` shows it) that may run; empty: the installed."""

    @model_validator(mode="after")
    def _privacy_needs_a_limit(self) -> "Policy":
        if self.max_epsilon is None:
            for name in ("max_delta", "min_noise_multiplier"):
                if name in self.model_fields_set:
                    key = name.replace("_", "-")
                    raise ValueError(f"{key} limits nothing without max-epsilon")
        return self


def read_policy(folder: Path) -> Policy:
    """Read a hospital's ``policy.toml``.

    Raises:
        UserError: if there is none, or it says something that is not allowed.
    """
    missing = "write one: an empty file lets the server decide"
    return read_model(folder / POLICY, Policy, missing=missing)


def read_model(file: Path, model: type[Model], *, missing: str) -> Model:
    """Read a typed TOML file of a hospital; its keys are the model's, with hyphens.

    Raises:
        UserError: naming every key that is wrong.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.name} is missing", fix=missing) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file.name}: {error}", fix="mend the file") from None
    try:
        return model.model_validate(table)
    except ValidationError as error:
        known = ", ".join(name.replace("_", "-") for name in model.model_fields)
        problems = " | ".join(
            _problem(one["loc"], one["type"], one["msg"]) for one in error.errors()
        )
        raise UserError(f"{file.name}: {problems}", fix=f"mend it; the keys are {known}") from None


def _problem(place: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in place)
    said = "unknown key" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
    return f"{key}: {said}" if key else said


def describe(policy: Policy) -> str:
    """Say in one line what the policy means.

    >>> describe(Policy()).split(";")[0]
    'no max-epsilon: the server alone decides what is learnt of each patient here'
    """
    if policy.max_epsilon is None:
        limit = "no max-epsilon: the server alone decides what is learnt of each patient here"
    else:
        delta = "by size" if policy.max_delta is None else f"{policy.max_delta:g}"
        limit = (
            f"private runs alone, epsilon {policy.max_epsilon:g} and delta {delta} over all of "
            f"them, noise multiplier at least {policy.min_noise_multiplier:g}"
        )
    runs = len(policy.allowed_configurations) or "any"
    code = len(policy.allowed_digests) or "the installed"
    return f"{limit}; configurations: {runs}; code: {code}"
