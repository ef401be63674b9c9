"""Epsilon of a plan, and the noise that a target epsilon needs.

Opacus supplies the accountants (RDP: Mironov, Talwar, Zhang 2019; PRV: Gopi, Lee, Wutschitz 2021),
dp-accounting's privacy loss distributions (Koskela; Meiser; Doroshenko et al. 2022) the
cross-check; the larger figure is reported. Without subsampling the Gaussian's exact curve is used
in PRV's place (Balle, Wang 2018, theorem 8), because PRV's density is undefined at q = 1.

The released noise is a discrete Gaussian. For integer orders, its Renyi divergences under Poisson
sampling equal the continuous Gaussian's (integer shifts; Canonne, Kamath, Steinke 2020), and its
step is at least 2^22 times finer than its standard deviation.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from common.errors import RunFailed, UserError
from common.privacy.plan import PrivacyPlan

EPSILON_ERROR = 1e-3
"""PRV's discretisation error, and the largest difference that the cross-check accepts."""
RESIDUE_SHARE = 2.0**-20
"""Share of delta that is kept back for the noise table's distance from the ideal Gaussian."""
_PLD_INTERVAL = 1e-4
_PLD_INTERVAL_COARSE = 1e-3
_LEAST, _LARGEST = 0.05, 1000.0
"""Noise multipliers among which calibration searches."""


class Epsilon(NamedTuple):
    """What a number of steps costs."""

    value: float
    """The larger figure: the claim."""
    accountant: float
    """The chosen accountant's own figure."""
    cross_check: float
    """dp-accounting's pessimistic PLD figure."""


def epsilon(plan: PrivacyPlan, steps: int | None = None) -> Epsilon:
    """Return epsilon at the plan's delta after ``steps`` (default: all) of its steps.

    Raises:
        UserError: if the plan is not calibrated.
        RunFailed: if two tight accountants disagree by more than 1e-3.

    >>> epsilon(PrivacyPlan(clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.1, steps=100,
    ...     expected_batch=10, max_admissions_per_patient=4, delta=1e-5), 0).value
    0.0
    """
    count = plan.steps if steps is None else steps
    sigma = plan.sigma
    if plan.deterministic_noise:
        return Epsilon(math.inf, math.inf, math.inf)
    if count == 0:
        return Epsilon(0.0, 0.0, 0.0)
    return _epsilon(sigma, plan.sampling_rate, count, plan.delta, plan.accountant)


@lru_cache(maxsize=256)
def _epsilon(sigma: float, rate: float, steps: int, delta: float, accountant: str) -> Epsilon:
    delta *= 1 - RESIDUE_SHARE
    check = pld_epsilon(sigma, rate, steps, delta)
    if accountant == "rdp":
        own = rdp_epsilon(sigma, rate, steps, delta)
    elif rate == 1:
        own = analytic_gaussian_epsilon(sigma / math.sqrt(steps), delta)
    else:
        own = prv_epsilon(sigma, rate, steps, delta)
    tolerance = EPSILON_ERROR * max(1.0, check / 10)
    if accountant == "prv" and abs(own - check) > tolerance:
        raise RunFailed(
            f"privacy accountants disagree: {own:.5f} and {check:.5f} "
            f"(q {rate}, sigma {sigma}, {steps} steps, delta {delta}): nothing is released"
        )
    return Epsilon(max(own, check), own, check)


def prv_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Return the centre of Opacus' PRV bounds (its upper bound less the error it adds)."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():
        for category in (RuntimeWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        upper = accountant.get_epsilon(delta, eps_error=EPSILON_ERROR, delta_error=delta * 1e-4)
    return max(0.0, float(upper) - EPSILON_ERROR)


def rdp_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Return Opacus' RDP epsilon (an upper bound, looser than PRV)."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta))


def pld_epsilon(
    sigma: float, rate: float, steps: int, delta: float, *, interval: float = _PLD_INTERVAL
) -> float:
    """Return dp-accounting's pessimistic PLD epsilon."""
    from dp_accounting import dp_event
    from dp_accounting.pld import pld_privacy_accountant

    accountant: Any = pld_privacy_accountant.PLDAccountant(value_discretization_interval=interval)
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    accountant.compose(event, steps)
    return float(accountant.get_epsilon(delta))


def analytic_gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return the exact epsilon of one Gaussian release (Balle, Wang 2018, theorem 8).

    >>> round(analytic_gaussian_epsilon(1.0, 1e-5), 4)
    4.3772
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(value: float) -> float:
        first = norm.cdf(0.5 / sigma - value * sigma)
        second = math.exp(value + norm.logcdf(-0.5 / sigma - value * sigma))
        return float(first - second - delta)

    if excess(0.0) <= 0:
        return 0.0
    upper = 1.0
    while excess(upper) > 0:
        upper *= 2
    return float(brentq(excess, 0.0, upper, xtol=1e-12))


def calibrate(plan: PrivacyPlan, target_epsilon: float, *, verify: bool = True) -> PrivacyPlan:
    """Return ``plan`` with the smallest noise multiplier whose epsilon is within the target.

    The result's reported epsilon is at most the target, and within 0.2% of it.

    Without ``verify`` it is good to 1e-3 and not held to both accountants: for forecasts only.

    Raises:
        UserError: if no multiplier up to 1000 reaches the target.
    """
    rate, steps, delta = plan.sampling_rate, plan.steps, plan.delta
    # RDP is an upper bound and costs next to nothing: where it finds one, the search starts there
    high = _smallest(lambda s: rdp_epsilon(s, rate, steps, delta) <= target_epsilon, _LARGEST)
    if plan.accountant == "prv":
        interval = _PLD_INTERVAL_COARSE if target_epsilon >= 1 else _PLD_INTERVAL
        tight = _smallest(
            lambda s: pld_epsilon(s, rate, steps, delta, interval=interval) <= target_epsilon,
            high or _LARGEST,
        )
        high = tight or high
    if high is None:
        other = "set privacy.accountant=prv, " if plan.accountant == "rdp" else ""
        raise UserError(
            f"privacy.target-epsilon={target_epsilon} is reached by no noise multiplier up to "
            f"{_LARGEST:g} with privacy.accountant={plan.accountant}",
            fix=f"{other}raise privacy.target-epsilon, or lower privacy.sampling-rate or the steps",
        )
    sigma = _round_up(high)
    honest = plan.with_noise(sigma)
    while verify and not plan.deterministic_noise and epsilon(honest).value > target_epsilon:
        sigma = _round_up(sigma * 1.0005)
        honest = plan.with_noise(sigma)
    return honest


def _smallest(enough: Callable[[float], bool], high: float) -> float | None:
    """Return the smallest sigma up to ``high`` that is enough (to 1e-4), None if ``high`` is not.

    The search goes down: small multipliers are dear to account for.
    """
    if not enough(high):
        return None
    low = high / 2
    while low > _LEAST and enough(low):
        low, high = low / 2, low
    while high - low > 1e-4 * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _round_up(value: float) -> float:
    """Round up to four significant digits, so that the plan reads well."""
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    return math.ceil(value * scale - 1e-9) / scale
