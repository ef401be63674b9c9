"""The whole loop against a plain one: PEFT's model, padded batches, torch's optimizers.

Order of data aside, nothing of ours is in the reference: neither packing, nor the loss, nor the
frozen-A function, nor clipping, nor the schedule.
"""

import copy
import math

import numpy as np
import peft
import pytest
import torch

from common.model.backbone.load import load_model, resolve_backbone
from common.training.schedule import batch_order
from common.training.worker import Worker

STEPS = 6


def reference_model(config, session):
    """Return PEFT's model with our A, B = 0, only B trainable."""
    plain = load_model(resolve_backbone("tiny"), device="cpu", dtype=torch.float32)
    model = peft.get_peft_model(
        copy.deepcopy(plain),
        peft.LoraConfig(
            r=config.adapter.rank,
            lora_alpha=config.adapter.alpha,
            target_modules=config.adapter.targets.split(","),
            lora_dropout=0.0,
        ),
    )
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    trained = {}
    for module in session.adapter.modules:
        prefix = f"base_model.model.{module.key}."
        parameters[prefix + "lora_A.default.weight"].copy_(module.lora_A)
        trained[module.key + ".lora_B"] = parameters[prefix + "lora_B.default.weight"]
        trained[module.key + ".lora_B"].requires_grad_(True)
    return model, trained


def padded(samples):
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full((len(samples), longest), -100)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length] = torch.tensor(sample.input_ids)
        labels[row, sample.answer_start : length] = ids[row, sample.answer_start : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}, labels


def rate(config, step):
    """Warm up over 2 steps, then the half cosine, written out for 6 steps."""
    shape = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]
    return config.train.learning_rate * shape[step]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_six_steps_equal_a_plain_loop(optimizer, configure, hospital, begin):
    config = configure(
        {
            "train.optimizer": optimizer,
            "train.learning-rate": 1.0 if optimizer == "sgd" else 0.05,
            "train.weight-decay": 0.05,
            "train.steps": STEPS,
            "train.accumulation": 2,
            "train.schedule": "cosine",
            "train.warmup-steps": 2,
            "train.max-grad-norm": 0.3,
        }
    )
    model, trained = reference_model(config, Worker().session(config))
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    reference = kind(trained.values(), lr=1.0, weight_decay=0.05)
    clipped = 0
    losses = []
    for step in range(STEPS):
        order = batch_order(config.train.seed, hospital.name, len(hospital.train), step * 4, 4)
        batch, labels = padded([hospital.train[place] for place in order])
        reference.zero_grad()
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        losses.append(loss.item())
        clipped += bool(torch.nn.utils.clip_grad_norm_(trained.values(), 0.3) > 0.3)
        for group in reference.param_groups:
            group["lr"] = rate(config, step)
        reference.step()
    training = begin(config)
    training.finish()
    ours = training.session.adapter.state()
    difference = max(np.abs(ours[k] - trained[k].detach().numpy()).max() for k in ours)
    size = max(np.abs(value).max() for value in ours.values())
    assert clipped >= 3
    assert size > 0.01
    # AdamW divides by gradients near zero, so rounding grows where SGD's does not.
    assert difference < (1e-6 if optimizer == "sgd" else 1e-3 * size)
    told = [event.value for event in training.run.metrics("train-loss")]
    assert told == pytest.approx(losses, abs=1e-4)


def test_validation_loss_is_the_mean_over_label_tokens(configure, hospital, begin):
    config = configure({"train.steps": 1})
    model, _ = reference_model(config, Worker().session(config))
    batch, labels = padded(hospital.validation)
    with torch.no_grad():
        logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    training = begin(config)
    training.finish()
    untrained, trained = training.run.metrics("validation-loss")
    assert (untrained.step, trained.step) == (0, 1)
    assert untrained.value == pytest.approx(float(expected), abs=1e-4)
    assert trained.value != untrained.value
