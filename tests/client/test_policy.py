"""A hospital's policy file is typed: what it does not mean is refused, with the key's name."""

import pytest

from client.policy import POLICY, Policy, describe, read_policy
from common.errors import UserError

WHOLE = f"""
max-epsilon = 3
max-delta = 1e-6
min-noise-multiplier = 0.8
min-expected-batch = 16
max-steps = 500
max-rounds = 20
max-learning-rate = 0.5
max-scale = 4
max-parameter = 100
allowed-configurations = ["{"a" * 64}"]
allowed-digests = ["{"b" * 64}"]
"""


def read(folder, text):
    (folder / POLICY).write_text(text)
    return read_policy(folder)


def test_a_whole_policy_is_read(tmp_path):
    policy = read(tmp_path, WHOLE)
    assert (policy.max_epsilon, policy.max_delta, policy.min_noise_multiplier) == (3.0, 1e-6, 0.8)
    assert (policy.max_steps, policy.max_rounds) == (500, 20)
    assert policy.allowed_configurations == ("a" * 64,)
    assert policy.allowed_digests == ("b" * 64,)
    assert "epsilon 3 and delta 1e-06" in describe(policy)
    assert read(tmp_path, "") == Policy()
    assert "the server alone decides" in describe(Policy())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-epsilom = 1", "max-epsilom: unknown key"),
        ("max_epsilon = 1", "max_epsilon: unknown key"),
        ("max-epsilon = 0", "max-epsilon: .*greater than 0"),
        ("max-epsilon = -1", "max-epsilon"),
        ("max-epsilon = inf", "max-epsilon: .*finite"),
        ("max-epsilon = nan", "max-epsilon"),
        ('max-epsilon = "3"', "max-epsilon: .*valid number"),
        ("max-epsilon = true", "max-epsilon: .*valid number"),
        ("max-epsilon = 1\nmax-delta = 1.0", "max-delta"),
        ("max-epsilon = 1\nmin-noise-multiplier = 0.0", "min-noise-multiplier"),
        ("max-delta = 1e-6", "max-delta limits nothing without max-epsilon"),
        ("min-noise-multiplier = 1.0", "min-noise-multiplier limits nothing"),
        ("max-steps = 1.5", "max-steps: .*integer"),
        ('allowed-digests = ["abc"]', "allowed-digests.0"),
        ("[max-epsilon]\nvalue = 1", "max-epsilon"),
        ("max-epsilon = ", "policy.toml: "),
    ],
)
def test_what_a_policy_cannot_mean_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_no_policy_is_no_consent(tmp_path):
    with pytest.raises(UserError, match="policy.toml is missing"):
        read_policy(tmp_path)
