"""What a plan will cost and how much noise it brings, before anything runs, and what to change.

Everything here follows from public constants: no data is read.
"""

from dataclasses import replace

from common.config import Config
from common.privacy.accounting import calibrate, epsilon
from common.privacy.budget.receipts import terms
from common.privacy.plan import PrivacyPlan
from common.privacy.settings import (
    delta_warning,
    hospital_warning,
    is_private,
    plan_of,
    protects,
)
from common.records.privacy import Advice, Forecast

COMFORTABLE = 1.0
"""Noise over the largest possible signal, per step: above it, one step is mostly noise."""
HOPELESS = 10.0


def forecast(plan: PrivacyPlan, parameters: int, *, target_epsilon: float = 0.0) -> Forecast:
    """Return epsilon, noise over signal and advice for a plan."""
    cost = epsilon(plan)
    ratio = plan.noise_to_signal(parameters)
    advice: list[Advice] = []
    if ratio > COMFORTABLE and not plan.deterministic_noise:
        advice = alternatives(plan, parameters, target_epsilon or cost.value)
    return Forecast(
        **terms(plan),
        relation=plan.relation,
        epsilon=cost.value,
        steps=plan.steps,
        expected_batch=plan.expected_batch,
        noise_to_signal=ratio,
        verdict=verdict(ratio),
        advice=tuple(advice),
    )


def verdict(noise_to_signal: float) -> str:
    """Say what a ratio of noise to the largest possible signal means for training.

    >>> verdict(0.4), verdict(3.0)[:5], verdict(40.0)[:5]
    ('the signal stands above the noise', 'noisy', 'the n')
    """
    if noise_to_signal <= COMFORTABLE:
        return "the signal stands above the noise"
    if noise_to_signal <= HOPELESS:
        return "noisy: expect slow learning; a lower learning rate and `fedrx plan`'s advice help"
    return "the noise drowns the signal: change the plan before spending epsilon"


def noise_line(noise_to_signal: float) -> str:
    """Say how a step's noise compares with its largest possible signal."""
    return f"noise over signal, per step: {noise_to_signal:.3g}: {verdict(noise_to_signal)}"


def warnings(config: Config, parameters: int) -> list[str]:
    """Return what a person must know before a run spends epsilon; nothing of a sound plan.

    Args:
        config: Complete configuration; without protection there is nothing to warn of.
        parameters: Trained values, all of which are noised.
    """
    if not protects(config):
        return []
    plan = plan_of(config)
    ratio = plan.noise_to_signal(parameters)
    noise = "" if is_private(config) else hospital_warning(plan, parameters)
    if ratio > COMFORTABLE:
        noise = noise or noise_line(ratio)
    return [line for line in (noise, delta_warning(config)) if line]


def alternatives(plan: PrivacyPlan, parameters: int, target_epsilon: float) -> list[Advice]:
    """Return what each change of the plan would bring at the same epsilon, best lever first.

    A larger expected batch means a larger sampling rate, or hospitals with more patients: with
    the same patients, D and q grow together, up to q = 1.
    """
    changes = []
    factor = min(4.0, 1 / plan.sampling_rate)
    if factor > 1:
        larger = replace(
            plan,
            noise_multiplier=None,
            sampling_rate=plan.sampling_rate * factor,
            expected_batch=plan.expected_batch * factor,
        )
        changes.append(_change(f"{factor:g} times D and q", larger, parameters, target_epsilon))
    patients = replace(plan, expected_batch=plan.expected_batch * 4)
    members = "hospitals a round" if plan.unit == "hospital" else "patients"
    changes.append(_change(f"4 times the {members} (D)", patients, parameters, target_epsilon))
    if plan.steps > 1:
        fewer = replace(plan, noise_multiplier=None, steps=max(1, plan.steps // 4))
        changes.append(_change("a quarter of the steps", fewer, parameters, target_epsilon))
    changes.append(_change("half the rank", plan, parameters // 2, target_epsilon))
    return changes


def _change(what: str, plan: PrivacyPlan, parameters: int, target_epsilon: float) -> Advice:
    if plan.noise_multiplier is None:
        plan = calibrate(plan, target_epsilon, verify=False)
    ratio = plan.noise_to_signal(parameters)
    return Advice(what=what, noise_multiplier=plan.sigma, noise_to_signal=ratio)


def lines(outlook: Forecast) -> list[str]:
    """Render a forecast for people."""
    rows = [
        (
            f"privacy of each {outlook.unit}: epsilon {float(outlook.epsilon):.3f} at delta "
            f"{outlook.delta:g} after {outlook.steps} steps ({outlook.accountant})"
        ),
        (
            f"noise multiplier {outlook.noise_multiplier:g}, sampling rate "
            f"{outlook.sampling_rate:g}, clip norm {outlook.clip_norm:g}, expected batch "
            f"{outlook.expected_batch:g}"
        ),
        noise_line(outlook.noise_to_signal),
    ]
    for change in outlook.advice:
        rows.append(
            f"  {change.what}: noise over signal {change.noise_to_signal:.3g} "
            f"(noise multiplier {change.noise_multiplier:g})"
        )
    return rows
