"""Training in the span of the inputs against plain SGD with momentum on the whole Linear.

In float64, so that what differs would be the algebra and not the rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ml.image.learning.span_sgd import SpanSgdLinear

RATE = 0.05
PLAIN = {"momentum": 0.9}
DECAYING = {"momentum": 0.9, "weight_decay": 0.1}
WINDOWS = [[0], [0, 1], [0, 1, 2, 3, 0]]


def make_linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(300, 20).double()


def inputs_of(window: int) -> torch.Tensor:
    return torch.randn(24, 300, generator=torch.Generator().manual_seed(window)).double()


def gradient_of(outputs: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss mean(tanh(z)²): it depends on the outputs, so errors would accumulate."""
    z = outputs.detach().requires_grad_()
    z.tanh().square().mean().backward()
    assert z.grad is not None
    return z.grad * 50


def batches(window: int) -> list[torch.Tensor]:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(100 + window))
    return list(order.split(5))


def rate_of(number: int) -> float:
    return RATE / (1 + number)


def train_plainly(linear: nn.Linear, windows: list[int], **options: float) -> list[float]:
    """torch's SGD with a learning rate for each batch; returns the norms of its gradients."""
    optimizer, norms = torch.optim.SGD(linear.parameters(), RATE, **options), []
    for window in windows:
        for number, rows in enumerate(batches(window)):
            optimizer.zero_grad()
            outputs = linear(inputs_of(window)[rows])
            outputs.backward(gradient_of(outputs))
            norms.append(float(nn.utils.clip_grad_norm_(linear.parameters(), 1e9)))
            optimizer.param_groups[0]["lr"] = rate_of(number)
            optimizer.step()
    return norms


def learn(span: SpanSgdLinear, window: int) -> list[float]:
    norms = []
    for number, rows in enumerate(batches(window)):
        span.accumulate(rows, gradient_of(span.forward(rows)))
        norms.append(float(span.squared_norm().sqrt()))
        span.step(rate_of(number))
    return norms


def train_in_span(linear: nn.Linear, windows: list[int], **options: float) -> tuple[SpanSgdLinear, list[float]]:
    span, norms = SpanSgdLinear(linear, **options), []
    for window in windows:
        span.enter_window(inputs_of(window))
        norms += learn(span, window)
    return span, norms


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("options", [PLAIN, DECAYING, {"momentum": 0.0}, {"momentum": 0.0, "weight_decay": 0.1}])
def test_the_weights_are_those_of_plain_sgd(windows, options):
    plain, spanned = make_linear(), make_linear()
    norms = train_plainly(plain, windows, **options)
    span, ours = train_in_span(spanned, windows, **options)
    span.close_window()
    assert (plain.weight - make_linear().weight).abs().max() > 0.01
    assert torch.allclose(spanned.weight, plain.weight, rtol=0, atol=1e-10)
    assert torch.allclose(spanned.bias, plain.bias, rtol=0, atol=1e-10)
    assert ours == pytest.approx(norms, rel=1e-9)


def test_a_step_of_several_batches_is_one_of_their_sum():
    both, parts = make_linear(), make_linear()
    first, second = batches(0)[:2]
    spans = [SpanSgdLinear(linear, **DECAYING) for linear in (both, parts)]
    for span in spans:
        span.enter_window(inputs_of(0))
    whole = torch.cat([first, second])
    gradient = gradient_of(spans[0].forward(whole))
    spans[0].accumulate(whole, gradient)
    spans[1].accumulate(first, gradient[: len(first)])
    spans[1].accumulate(second, gradient[len(first) :])
    for span in spans:
        span.step(RATE, 0.5)
        span.close_window()
    assert torch.allclose(both.weight, parts.weight, rtol=0, atol=1e-12)
    assert torch.allclose(both.bias, parts.bias, rtol=0, atol=1e-12)


def test_a_scan_that_a_batch_has_twice_counts_twice():
    plain, spanned = make_linear(), make_linear()
    rows = torch.tensor([3, 3, 7, 3])
    outputs = plain(inputs_of(0)[rows])
    outputs.backward(gradient := gradient_of(outputs))
    expected = nn.utils.get_total_norm([plain.weight.grad, plain.bias.grad])
    torch.optim.SGD(plain.parameters(), RATE).step()
    span = SpanSgdLinear(spanned, 0.0)
    span.enter_window(inputs_of(0))
    span.accumulate(rows, gradient)
    assert float(span.squared_norm().sqrt()) == pytest.approx(float(expected), rel=1e-9)
    span.step(RATE)
    span.close_window()
    assert torch.allclose(spanned.weight, plain.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [PLAIN, DECAYING])
def test_outputs_of_other_inputs_do_not_need_a_closed_window(options):
    linear, other = make_linear(), torch.randn(7, 300).double()
    span, _ = train_in_span(linear, [0, 1], **options)
    before = span.outputs(other)
    span.close_window()
    assert torch.allclose(before, linear(other), atol=1e-10)


def test_closing_a_window_twice_changes_nothing():
    linear = make_linear()
    span, _ = train_in_span(linear, [0], **PLAIN)
    span.close_window()
    closed = linear.weight.detach().clone()
    span.close_window()
    assert torch.equal(closed, linear.weight)


# --- places and states -----------------------------------------------------------------------------------------------


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("windows", [[0], [0, 1]])
@pytest.mark.parametrize("options", [PLAIN, DECAYING])
def test_earlier_weights_can_be_restored(windows, options):
    linear, other = make_linear(), torch.randn(7, 300).double()
    span, _ = train_in_span(linear, windows, **options)
    if len(windows) > 1:
        span.close_window(keep_momentum=True)
    weights, expected = copies(span.weights()), span.outputs(other)
    span.enter_window(inputs_of(windows[-1])) if len(windows) > 1 else None
    learn(span, windows[-1])
    assert not torch.allclose(span.outputs(other), expected, atol=1e-3)
    span.close_window(keep_momentum=True) if len(windows) > 1 else None
    span.set_weights(weights)
    assert torch.equal(span.outputs(other), expected)
    span.close_window()
    assert torch.allclose(linear(other), expected, atol=1e-10)


def trained_on_from(state: dict[str, torch.Tensor], window: int | None, last: int, **options: float) -> torch.Tensor:
    """The weight after `last`, continued from a state that was read in `window` or between windows."""
    linear = make_linear()
    span = SpanSgdLinear(linear, **options)
    span.restore(state, None if window is None else inputs_of(window))
    if window is None:
        span.enter_window(inputs_of(last))
    learn(span, last)
    span.close_window()
    return linear.weight


@pytest.mark.parametrize("options", [PLAIN, DECAYING, {"momentum": 0.0, "weight_decay": 0.1}])
def test_training_continues_exactly_from_a_state_between_windows(options):
    linear = make_linear()
    span, _ = train_in_span(linear, [0, 1], **options)
    span.close_window(keep_momentum=True)
    state = copies(span.state())
    span.enter_window(inputs_of(2))
    learn(span, 2)
    span.close_window()
    assert torch.equal(trained_on_from(state, None, last=2, **options), linear.weight)


@pytest.mark.parametrize("options", [PLAIN, DECAYING])
def test_a_state_in_the_first_window_has_no_weight(options):
    linear = make_linear()
    span, _ = train_in_span(linear, [0], **options)
    state = copies(span.state())
    learn(span, 0)
    span.close_window()
    assert max(value.numel() for value in state.values()) == 24 * 20
    assert torch.equal(trained_on_from(state, 0, last=0, **options), linear.weight)


def test_state_of_an_open_later_window_is_refused():
    span, _ = train_in_span(make_linear(), [0, 1], **PLAIN)
    with pytest.raises(AssertionError, match="close a later window"):
        span.state()
