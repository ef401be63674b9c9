"""The chunked loss against torch's own cross-entropy."""

import pytest
import torch

from common.training import loss as loss_module
from common.training.loss import weighted_cross_entropy


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 1000])
def test_loss_and_gradient_equal_torchs(rows_per_chunk, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", rows_per_chunk * 4 * 53)
    torch.manual_seed(0)
    hidden = torch.randn(17, 8, requires_grad=True)
    head = torch.randn(53, 8)
    labels = torch.randint(0, 53, (17,))
    weights = torch.rand(17)
    total, losses = weighted_cross_entropy(hidden, head, labels, weights)
    (ours,) = torch.autograd.grad(total * 3.0, hidden)
    reference = torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none")
    (theirs,) = torch.autograd.grad((reference * weights).sum() * 3.0, hidden)
    torch.testing.assert_close(losses, reference.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, (reference * weights).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_no_tensor_of_tokens_by_vocabulary_is_made(monkeypatch):
    """The largest tensor of the forward and backward pass stays within one chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", 4 * 4 * 500)
    hidden = torch.randn(64, 8, requires_grad=True)
    head, labels = torch.randn(500, 8), torch.randint(0, 500, (64,))
    with Watch():
        total, _ = weighted_cross_entropy(hidden, head, labels, torch.ones(64))
        total.backward()
    assert largest <= 500 * 8  # the head itself; a chunk has 4 x 500
