"""The head's first Linear, trained inside the span of its inputs: plain SGD with momentum, without its memory traffic.

VGG16's first Linear has 25088 × 4096 weights; one plain step reads and writes 411 MB of them about seven times, for a
gradient of rank 32. But the inputs are known beforehand (the backbone is frozen), and every gradient of a Linear is
dzᵀ x: the weight can only move inside the span of the inputs. So for a window of n inputs X [n, 25088],

    W  =  W₀ + s·V₀ + Aᵀ X          z(x)  =  W₀x + s·V₀x + Aᵀ(X x) + b

where V₀ is SGD's momentum at the window's start and s its scalar effect. W₀x, V₀x and the Gram matrix XXᵀ are computed
once per window by three large products; a step then touches [n, 4096] numbers. SGD with momentum on A (whose gradient
is dz at the batch's rows) and on s IS SGD with momentum on W: the same numbers but for rounding (tests/ml/test_span.py
compares the two). `settle` writes W and the momentum back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class SpanLinear:
    """One nn.Linear under SGD with momentum. Use: `enter` a window, `forward` and `step` on its rows, `settle` it."""

    def __init__(self, linear: nn.Linear, learning_rate: float, momentum: float) -> None:
        self._weight, self._bias = linear.weight.data, linear.bias.data
        self._rate, self._momentum = learning_rate, momentum
        self._velocity: torch.Tensor | None = None  # V₀ [out, in]; only once a window has been settled with momentum
        self._bias_velocity = torch.zeros_like(self._bias)
        self._inputs: torch.Tensor | None = None
        self._moved = False  # whether a window's change has been written into the weight

    @property
    def in_window(self) -> bool:
        """Whether a window was entered and not settled."""
        return self._inputs is not None

    def enter(self, inputs: torch.Tensor) -> None:
        """Begin a window of inputs, float32 [n, in]; the window before is settled first."""
        self.settle(keep_momentum=True)
        self._inputs = inputs
        self._base = inputs @ self._weight.T
        self._carried = None if self._velocity is None else inputs @ self._velocity.T
        self._gram = inputs @ inputs.T
        self._a, self._a_velocity = torch.zeros_like(self._base), torch.zeros_like(self._base)
        self._s, self._s_velocity = 0.0, 1.0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Pre-activations of the window's `rows`: [len(rows), out], without a graph behind them."""
        outputs = torch.addmm(self._base[rows], self._gram[rows], self._a)
        if self._carried is not None:
            outputs.add_(self._carried[rows], alpha=self._s)
        return outputs.add_(self._bias)

    def step(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """One step of SGD, given the loss's gradient by `forward(rows)`: [len(rows), out]."""
        self._a_velocity.mul_(self._momentum).index_add_(0, rows, gradient)
        self._a.sub_(self._a_velocity, alpha=self._rate)
        self._bias_velocity.mul_(self._momentum).add_(gradient.sum(0))
        self._bias.sub_(self._bias_velocity, alpha=self._rate)
        self._s_velocity *= self._momentum
        self._s -= self._rate * self._s_velocity

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Pre-activations of any inputs [m, in] under the weight as it stands now."""
        result = inputs @ self._weight.T
        if self._inputs is not None:
            result.addmm_(inputs @ self._inputs.T, self._a)
            if self._velocity is not None:
                result.addmm_(inputs, self._velocity.T, alpha=self._s)
        return result.add_(self._bias)

    def settle(self, keep_momentum: bool = False) -> None:
        """End the window: write the weight back, in place; without `keep_momentum` training is over."""
        if self._inputs is None:
            return
        self._moved = True
        if self._velocity is not None:
            self._weight.add_(self._velocity, alpha=self._s)
        self._weight.addmm_(self._a.T, self._inputs)
        if keep_momentum and self._momentum > 0:
            self._velocity = torch.zeros_like(self._weight) if self._velocity is None else self._velocity
            self._velocity.mul_(self._s_velocity).addmm_(self._a_velocity.T, self._inputs)
        else:
            self._velocity = None
        self._inputs = None
        del self._base, self._carried, self._gram, self._a, self._a_velocity

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on from here, by name: the living tensors, not copies.

        Between windows that is the weight and its momentum, twice [out, in]. Inside the first window the weight has
        not moved yet, so that whoever resumes has it already, and [n, out] numbers are enough; in a later window both
        would be needed: settle it first.
        """
        bias = {"bias": self._bias, "bias_velocity": self._bias_velocity}
        if self._inputs is not None:
            assert not self._moved, "a later window must be settled before its state is asked for"
            return {**bias, "a": self._a, "a_velocity": self._a_velocity}
        velocity = {} if self._velocity is None else {"velocity": self._velocity}
        return {**bias, "weight": self._weight, **velocity}

    def restore(self, state: Mapping[str, torch.Tensor], inputs: torch.Tensor | None) -> None:
        """Go on from a `state`. `inputs`: those of the window that it was taken in, None between windows."""
        self._bias.copy_(state["bias"])
        self._bias_velocity.copy_(state["bias_velocity"])
        if inputs is not None:
            self.enter(inputs)
            self._a.copy_(state["a"])
            self._a_velocity.copy_(state["a_velocity"])
            return
        self._weight.copy_(state["weight"])
        self._velocity = state["velocity"].clone() if "velocity" in state else None
        self._moved = True
