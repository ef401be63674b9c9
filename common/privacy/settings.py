"""From the configuration to the plan: one calibration, the same for everyone."""

import math
from dataclasses import replace
from functools import lru_cache

from common.choice import Choice
from common.config import Config, PrivacyConfig
from common.data.protocols import ADMISSION
from common.errors import UserError
from common.privacy.accounting import calibrate, epsilon
from common.privacy.plan import PrivacyPlan
from common.training.budget import steps_in_all

HOSPITAL, SYNTHETIC = "hospital", "synthetic"
INDEPENDENT = "iid"
"""The partition scheme that decides a patient's hospital from that patient alone."""
CLAIM_SLACK = 1e-9
WORST_RATIO = 10.0
"""Noise over signal above which hospital-level privacy comes with a warning."""


def is_private(config: Config) -> bool:
    """Return whether units inside a hospital are protected (DP-SGD).

    >>> is_private(Config()), is_private(Config(privacy=PrivacyConfig(target_epsilon=3.0)))
    (False, True)
    """
    return protects(config) and config.privacy.unit != HOSPITAL


def protects(config: Config) -> bool:
    """Return whether any differential privacy is on: no loss, metric or count leaves a hospital."""
    return config.privacy.is_on


def plan_of(config: Config) -> PrivacyPlan:
    """Return the calibrated plan of a run, federated or single.

    It pays for every step that one hospital takes if it is asked in every round: the server's own
    sampling of hospitals amplifies nothing, because the server knows whom it asked.

    Raises:
        UserError: if delta would let a whole unit be disclosed, if the server needs or keeps what
            is protected, if the number of steps, one unit's gradient, or whether one hospital
            takes part would depend on other units, if a given noise multiplier misses the target,
            or if no noise reaches it.
    """
    _refuse_large_delta(config)
    _refuse_what_stays(config)
    if config.privacy.unit == HOSPITAL:
        federation = config.federation
        if federation.fraction < 1:
            raise UserError(
                f"federation.fraction={federation.fraction:g} with privacy.unit=hospital: a fixed "
                "number of hospitals is drawn from all names, so one hospital that leaves changes "
                "which others take part",
                allowed="1",
                fix="set federation.fraction = 1: every hospital is asked in every round",
            )
        return _plan(config.privacy, federation.rounds, float(federation.hospitals), 1.0)
    _refuse_dependence(config)
    privacy = config.privacy
    steps = steps_in_all(config, train_samples=0).value
    return _plan(privacy, steps, privacy.expected_batch, privacy.sampling_rate)


def public_bound(config: Config) -> Choice[int]:
    """Return a number that the units of one hospital do not exceed, with its name and its key.

    How many patients a hospital has is private, so nothing visible may follow from it. Public is
    what the configuration states: a bound, the size of made-up data, the number of hospitals. 0:
    nothing is.

    >>> public_bound(Config())
    Choice(value=240, reason='patients (data.synthetic-patients)')
    """
    if config.privacy.unit == HOSPITAL:
        return Choice(config.federation.hospitals, "hospitals (federation.hospitals)")
    if config.privacy.most_patients:
        return Choice(config.privacy.most_patients, "patients (privacy.most-patients)")
    if config.data.path == SYNTHETIC and not config.run.hospital_keys:  # no deployment
        return Choice(config.data.synthetic_patients, "patients (data.synthetic-patients)")
    return Choice(0, "no bound is stated")


def _refuse_large_delta(config: Config) -> None:
    """Refuse a delta at which publishing one unit in full would count as private."""
    bound, delta = public_bound(config), config.privacy.delta
    if bound.value and delta >= 1 / bound.value:
        raise UserError(
            f"privacy.delta={delta:g} protects nobody among up to {bound.value} {bound.reason}: to "
            "publish one of them in full would count as private",
            allowed=f"less than 1 / {bound.value}",
            fix=f"set privacy.delta to at most 1 / (10 x {bound.value}) = {_usual(bound):.2g}",
        )


def _refuse_what_stays(config: Config) -> None:
    """Refuse a server that needs or keeps what the protection takes away."""
    federation = config.federation
    if federation.strategy == "q-fedavg":
        raise UserError(
            "federation.strategy=q-fedavg weighs hospitals by their losses, and with privacy no "
            "loss leaves a hospital",
            fix="set another federation.strategy",
        )
    if federation.keep_updates and config.privacy.unit == HOSPITAL:
        raise UserError(
            "federation.keep-updates with privacy.unit=hospital keeps what hospitals send before "
            "it is clipped and noised",
            fix="set federation.keep-updates = false",
        )


def delta_warning(config: Config) -> str:
    """Return why delta is large for so many units, or is compared with none; empty if it is not."""
    bound, delta = public_bound(config), config.privacy.delta
    if not protects(config):
        return ""
    if not bound.value:
        return (
            "delta is compared with no number of patients: that of a hospital is private; state a "
            "public bound in privacy.most-patients"
        )
    if delta <= _usual(bound):
        return ""
    return (
        f"privacy.delta={delta:g} is above 1 / (10 x {bound.value} {bound.reason}): the usual "
        f"delta is at most {_usual(bound):.2g}"
    )


def delta_note(config: Config) -> str:
    """Say what delta means beside the public bound on a hospital's units."""
    bound = public_bound(config)
    within = f"delta is at most 1 / (10 x {bound.value} {bound.reason})"
    return delta_warning(config) or within


def _usual(bound: Choice[int]) -> float:
    return 1 / (10 * bound.value)


def _refuse_dependence(config: Config) -> None:
    """Refuse settings under which removing one unit changes more than that unit's gradients."""
    data = config.data
    if config.privacy.unit == "admission" and data.protocol != ADMISSION:
        raise UserError(
            f"privacy.unit=admission with data.protocol={data.protocol}: an admission is also in "
            "the prompts of the patient's later ones",
            allowed="patient, hospital",
            fix="set privacy.unit = patient",
        )
    if config.train.epochs and not config.train.steps:
        raise UserError(
            f"train.epochs={config.train.epochs:g} with privacy makes the number of steps depend "
            "on the number of samples",
            allowed="public numbers",
            fix="set train.steps, or federation.local-steps, and train.epochs = 0",
        )
    for name in ("height", "weight", "bmi"):
        if getattr(data, f"missing_{name}") == "median":
            raise UserError(
                f"data.missing-{name}=median with privacy fills a patient's gap with a figure of "
                "all the others",
                allowed="unknown, drop",
                fix=f"set data.missing-{name}",
            )
    if data.train_samples:
        raise UserError(
            f"data.train-samples={data.train_samples} with privacy lets one patient decide which "
            "others are trained on",
            allowed="0",
            fix="set data.train-samples = 0; privacy.sampling-rate and the steps set the cost",
        )


def partition_note(config: Config) -> str:
    """Return what the guarantee of a simulated partition leaves out; empty if it is nothing.

    A partition stands for where patients live: it is no part of the mechanism, and a deployment
    has none.
    """
    scheme = config.partition.scheme
    if not is_private(config) or scheme == INDEPENDENT or config.federation.hospitals == 1:
        return ""
    return (
        f"partition.scheme={scheme} deals patients by the sizes of groups, so one patient could "
        "move others between hospitals: the guarantee is for each hospital's patients as dealt, "
        f"the dealing itself is outside it (partition.scheme={INDEPENDENT} has no such dependence)"
    )


def hospital_warning(plan: PrivacyPlan, parameters: int) -> str:
    """Return why hospital-level privacy is hopeless with few hospitals; empty if it is not.

    >>> few = PrivacyPlan(unit="hospital", clip_norm=1.0, noise_multiplier=2.7, sampling_rate=1.0,
    ...     steps=20, expected_batch=5, max_admissions_per_patient=0, delta=1e-5)
    >>> hospital_warning(few, 2_621_440)[:41]
    'hospital-level privacy: the noise is 874 '
    """
    ratio = plan.noise_to_signal(parameters)
    if ratio <= WORST_RATIO:
        return ""
    needed = math.ceil(plan.sigma * math.sqrt(parameters))
    return (
        f"hospital-level privacy: the noise is {ratio:.3g} times the largest signal with "
        f"{plan.expected_batch:g} hospitals a round; nothing will be learnt. About {needed} "
        "hospitals a round make them equal; with fewer, protect patients instead: "
        "privacy.unit=patient"
    )


@lru_cache(maxsize=8)
def _plan(privacy: PrivacyConfig, steps: int, batch: float, rate: float) -> PrivacyPlan:
    plan = PrivacyPlan(
        unit=privacy.unit,
        clip_norm=privacy.clip_norm,
        noise_multiplier=privacy.noise_multiplier or None,
        sampling_rate=rate,
        steps=steps,
        expected_batch=batch,
        max_admissions_per_patient=privacy.max_admissions_per_patient,
        delta=privacy.delta,
        accountant=privacy.accountant,
        deterministic_noise=privacy.deterministic_noise,
    )
    if plan.noise_multiplier is None:
        return calibrate(plan, privacy.target_epsilon)
    if privacy.target_epsilon and not plan.deterministic_noise:
        cost = epsilon(plan).value
        if cost > privacy.target_epsilon + CLAIM_SLACK:
            raise UserError(
                f"privacy.noise-multiplier={privacy.noise_multiplier} gives epsilon {cost:.4g}",
                allowed=f"at most privacy.target-epsilon={privacy.target_epsilon}",
                fix="leave privacy.noise-multiplier at 0 to have it calibrated",
            )
    return plan


def with_calibrated_noise(config: Config) -> Config:
    """Return the configuration with the calibrated noise multiplier written into it.

    Everyone who reads the resolved configuration then has the same plan, and hospitals check it
    against the target themselves.
    """
    if not protects(config):
        return config
    sigma = plan_of(config).sigma
    return replace(config, privacy=replace(config.privacy, noise_multiplier=sigma))
