"""SGD with momentum for VGG16's first Linear, in the span of its inputs: the same result with little memory traffic.

The layer has 25088 × 4096 weights. A plain step reads and writes these 411 MB about seven times, for a gradient of rank
32 (the batch size). But the inputs are known in advance, since the backbone is frozen, and every gradient of a Linear
is dzᵀ x: the weight only moves in the span of the inputs. So for a window of n inputs X [n, 25088],

    W  =  c·W₀ + s·V₀ + Aᵀ X          z(x)  =  c·W₀x + s·V₀x + Aᵀ(X x) + b

where V₀ is the momentum at the start of the window, and c and s are scalars; c differs from 1 only with weight decay.
W₀x, V₀x and the Gram matrix XXᵀ are computed once per window by three large products; a step then only touches
[n, 4096] numbers. The norm of the gradient, for clipping, follows from the Gram matrix too:
|Gᵀ X|² = Σ (G Gᵀ) ∘ (X Xᵀ). SGD with momentum and weight decay on (c, s, A) is equal to SGD on W up to rounding
(tests/ml/test_span_sgd.py compares the two). `close_window` writes W and the momentum back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class _SpanVector:
    """A vector in the span: c·W₀ + s·V₀ + Aᵀ X."""

    c: float
    s: float
    a: torch.Tensor

    def decay(self, factor: float) -> None:
        self.c, self.s = self.c * factor, self.s * factor
        self.a.mul_(factor)

    def add(self, other: _SpanVector, factor: float) -> None:
        self.c, self.s = self.c + factor * other.c, self.s + factor * other.s
        self.a.add_(other.a, alpha=factor)


class SpanSgdLinear:
    """One nn.Linear under SGD: `enter_window`; `forward`, `accumulate` and `step` on its rows; `close_window`."""

    def __init__(self, linear: nn.Linear, momentum: float, weight_decay: float = 0.0) -> None:
        self._weight, self._bias = linear.weight.data, linear.bias.data
        self._momentum, self._decay = momentum, weight_decay
        self._velocity: torch.Tensor | None = None  # V₀ [out, in]; None before the first window is closed
        self._bias_velocity = torch.zeros_like(self._bias)
        self._inputs: torch.Tensor | None = None
        self._moved = False  # whether a window has been written back into the weight
        self._accumulated: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def in_window(self) -> bool:
        """Whether a window is open."""
        return self._inputs is not None

    def enter_window(self, inputs: torch.Tensor) -> None:
        """Open a window of inputs, float32 [n, in]; the previous window is closed first."""
        self.close_window(keep_momentum=True)
        self._inputs = inputs
        self._base = inputs @ self._weight.T
        self._carried = None if self._velocity is None else inputs @ self._velocity.T
        self._gram = inputs @ inputs.T
        self._current = _SpanVector(1.0, 0.0, torch.zeros_like(self._base))
        self._step_vector = _SpanVector(0.0, 1.0, torch.zeros_like(self._base))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Pre-activations of the window's `rows`: [len(rows), out], detached from autograd."""
        outputs = torch.addmm(self._base[rows], self._gram[rows], self._current.a, beta=self._current.c)
        if self._carried is not None:
            outputs.add_(self._carried[rows], alpha=self._current.s)
        return outputs.add_(self._bias)

    def accumulate(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the gradient of the loss with respect to `forward(rows)`, [len(rows), out], to the next step."""
        self._accumulated.append((rows, gradient))

    def squared_norm(self) -> torch.Tensor:
        """Squared norm of the accumulated gradient of weight and bias together."""
        rows, gradient = self._gradient()
        return ((gradient @ gradient.T) * self._gram[rows][:, rows]).sum() + gradient.sum(0).square().sum()

    def step(self, rate: float, factor: float = 1.0) -> None:
        """One SGD step with the accumulated gradient, scaled by `factor` (from clipping)."""
        rows, gradient = self._gradient()
        self._accumulated.clear()
        gradient = gradient if factor == 1.0 else gradient * factor
        self._step_vector.decay(self._momentum)
        self._step_vector.add(self._current, self._decay) if self._decay else None
        self._step_vector.a.index_add_(0, rows, gradient)
        self._current.add(self._step_vector, -rate)
        self._bias_velocity.mul_(self._momentum).add_(gradient.sum(0)).add_(self._bias, alpha=self._decay)
        self._bias.sub_(self._bias_velocity, alpha=rate)

    def _gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, gradients = zip(*self._accumulated, strict=True)
        return (rows[0], gradients[0]) if len(rows) == 1 else (torch.cat(rows), torch.cat(gradients))

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Pre-activations of any inputs [m, in] under the current weight: [m, out]."""
        result = inputs @ self._weight.T
        if self._inputs is not None:
            result.mul_(self._current.c).addmm_(inputs @ self._inputs.T, self._current.a)
            if self._velocity is not None:
                result.addmm_(inputs, self._velocity.T, alpha=self._current.s)
        return result.add_(self._bias)

    def close_window(self, keep_momentum: bool = False) -> None:
        """Close the window: write the weight back, in place. Without `keep_momentum` the training cannot go on."""
        if self._inputs is None:
            return
        self._moved = True
        velocity = self._materialized_velocity() if keep_momentum and self._momentum > 0 else None
        if self._current.c != 1.0:
            self._weight.mul_(self._current.c)
        if self._velocity is not None:
            self._weight.add_(self._velocity, alpha=self._current.s)
        self._weight.addmm_(self._current.a.T, self._inputs)
        self._velocity, self._inputs = velocity, None
        del self._base, self._carried, self._gram, self._current, self._step_vector

    def _materialized_velocity(self) -> torch.Tensor:
        assert self._inputs is not None
        old = self._velocity
        velocity = torch.zeros_like(self._weight) if old is None else old * self._step_vector.s
        if self._step_vector.c:
            velocity.add_(self._weight, alpha=self._step_vector.c)
        return velocity.addmm_(self._step_vector.a.T, self._inputs)

    # --- state ---

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors that outputs depend on, by name, not copied: [n, out] in the first window, else the weight."""
        if self._inputs is None or self._moved:
            assert self._inputs is None, "close a later window before reading its weights"
            return {"weight": self._weight, "bias": self._bias}
        return {"bias": self._bias, "a": self._current.a, "c": torch.tensor(self._current.c, dtype=torch.float64)}

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set weights that were read in this window, or between windows."""
        self._bias.copy_(weights["bias"])
        if "weight" in weights:
            self._weight.copy_(weights["weight"])
        else:
            self._current.a.copy_(weights["a"])
            self._current.c = float(weights["c"])

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that `restore` needs, by name, not copied.

        Between windows these are the weight and its momentum, [out, in] each. In the first window [n, out] numbers are
        enough, since the initial weight is known to a resumed training. In a later window both would be needed: close
        it first.
        """
        own = {**self.weights(), "bias_velocity": self._bias_velocity}
        if self._inputs is not None:
            return {
                **own,
                "a_velocity": self._step_vector.a,
                "c_velocity": torch.tensor(self._step_vector.c, dtype=torch.float64),
            }
        return own if self._velocity is None else {**own, "velocity": self._velocity}

    def restore(self, state: Mapping[str, torch.Tensor], inputs: torch.Tensor | None) -> None:
        """Restore a `state`. `inputs`: those of the window in which it was read; None between windows."""
        self._bias_velocity.copy_(state["bias_velocity"])
        if inputs is not None:
            self.enter_window(inputs)
            self._step_vector.a.copy_(state["a_velocity"])
            self._step_vector.c = float(state["c_velocity"])
        else:
            self._velocity = state["velocity"].clone() if "velocity" in state else None
            self._moved = True
        self.set_weights(state)
