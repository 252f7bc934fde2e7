"""Training in the span of the inputs against plain SGD with momentum on the whole Linear.

In float64, so that what differs would be the algebra and not the rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ml.span import SpanLinear

RATE, MOMENTUM = 0.05, 0.9


def make_linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(300, 20).double()


def inputs_of(window: int) -> torch.Tensor:
    return torch.randn(24, 300, generator=torch.Generator().manual_seed(window)).double()


def gradient_of(outputs: torch.Tensor) -> torch.Tensor:
    """Of the loss mean(tanh(z)²): it depends on the outputs, so that a drift would feed on itself."""
    z = outputs.detach().requires_grad_()
    z.tanh().square().mean().backward()
    assert z.grad is not None
    return z.grad * 50


def batches(window: int) -> list[torch.Tensor]:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(100 + window))
    return list(order.split(5))


def train_plainly(linear: nn.Linear, windows: list[int]) -> None:
    optimizer = torch.optim.SGD(linear.parameters(), RATE, MOMENTUM)
    for window in windows:
        for rows in batches(window):
            optimizer.zero_grad()
            outputs = linear(inputs_of(window)[rows])
            outputs.backward(gradient_of(outputs))
            optimizer.step()


def train_in_span(linear: nn.Linear, windows: list[int]) -> SpanLinear:
    span = SpanLinear(linear, RATE, MOMENTUM)
    for window in windows:
        span.enter(inputs_of(window))
        for rows in batches(window):
            span.step(rows, gradient_of(span.forward(rows)))
    return span


@pytest.mark.parametrize("windows", [[0], [0, 1], [0, 1, 2, 3, 0]])
def test_the_weights_are_those_of_plain_sgd_with_momentum(windows):
    plain, spanned = make_linear(), make_linear()
    train_plainly(plain, windows)
    train_in_span(spanned, windows).settle()
    moved = (plain.weight - make_linear().weight).abs().max()
    assert moved > 0.01
    assert torch.allclose(spanned.weight, plain.weight, atol=1e-10)
    assert torch.allclose(spanned.bias, plain.bias, atol=1e-10)


def test_outputs_of_other_inputs_need_no_settling():
    linear, other = make_linear(), torch.randn(7, 300).double()
    span = train_in_span(linear, [0, 1])
    before = span.outputs(other)
    span.settle()
    assert torch.allclose(before, linear(other), atol=1e-10)


def test_settling_twice_changes_nothing():
    linear = make_linear()
    span = train_in_span(linear, [0])
    span.settle()
    settled = linear.weight.detach().clone()
    span.settle()
    assert torch.equal(settled, linear.weight)


def trained_on_from(state: dict[str, torch.Tensor], window: int | None, last: int) -> torch.Tensor:
    """The weight after `last`, gone on from a state that was taken in `window` or between windows."""
    linear = make_linear()
    span = SpanLinear(linear, RATE, MOMENTUM)
    span.restore(state, None if window is None else inputs_of(window))
    if window is None:
        span.enter(inputs_of(last))
    for rows in batches(last):
        span.step(rows, gradient_of(span.forward(rows)))
    span.settle()
    return linear.weight


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_a_state_between_windows_is_gone_on_from_exactly():
    linear = make_linear()
    span = train_in_span(linear, [0, 1])
    span.settle(keep_momentum=True)
    state = copies(span.state())
    span.enter(inputs_of(2))
    for rows in batches(2):
        span.step(rows, gradient_of(span.forward(rows)))
    span.settle()
    assert torch.equal(trained_on_from(state, None, last=2), linear.weight)


def test_a_state_in_the_first_window_needs_no_weight():
    linear = make_linear()
    span = train_in_span(linear, [0])
    state = copies(span.state())
    for rows in batches(1):
        span.step(rows, gradient_of(span.forward(rows)))
    span.settle()
    assert set(state) == {"bias", "bias_velocity", "a", "a_velocity"}
    assert torch.equal(trained_on_from(state, 0, last=1), linear.weight)


def test_a_later_window_must_be_settled_before_its_state_is_told():
    span = train_in_span(make_linear(), [0, 1])
    with pytest.raises(AssertionError, match="settled"):
        span.state()
