"""The head's first Linear, trained inside the span of its inputs: plain SGD with momentum, without its memory traffic.

VGG16's first Linear has 25088 × 4096 weights; one plain step reads and writes 411 MB of them about seven times, for a
gradient of rank 32. But the inputs are known beforehand (the backbone is frozen), and every gradient of a Linear is
dzᵀ x: the weight can only move inside the span of the inputs. So for a window of n inputs X [n, 25088],

    W  =  c·W₀ + s·V₀ + Aᵀ X          z(x)  =  c·W₀x + s·V₀x + Aᵀ(X x) + b

where V₀ is SGD's momentum at the window's start; c and s are numbers, and c leaves 1 only by weight decay. W₀x, V₀x and
the Gram matrix XXᵀ are computed once per window by three large products; a step then touches [n, 4096] numbers. The
norm of the gradient, for clipping, is in the Gram matrix too: |Gᵀ X|² = Σ (G Gᵀ) ∘ (X Xᵀ). SGD with momentum and weight
decay on (c, s, A) IS SGD on W: the same numbers but for rounding (tests/ml/test_span.py compares the two). `settle`
writes W and the momentum back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class _Pair:
    """A place in the span: c·W₀ + s·V₀ + Aᵀ X."""

    c: float
    s: float
    a: torch.Tensor

    def decay(self, factor: float) -> None:
        self.c, self.s = self.c * factor, self.s * factor
        self.a.mul_(factor)

    def add(self, other: _Pair, factor: float) -> None:
        self.c, self.s = self.c + factor * other.c, self.s + factor * other.s
        self.a.add_(other.a, alpha=factor)


class SpanSgdLinear:
    """One nn.Linear under SGD. Use: `enter` a window, `forward`, `gather` and `step` on its rows, `settle` it."""

    def __init__(self, linear: nn.Linear, momentum: float, weight_decay: float = 0.0) -> None:
        self._weight, self._bias = linear.weight.data, linear.bias.data
        self._momentum, self._decay = momentum, weight_decay
        self._velocity: torch.Tensor | None = None  # V₀ [out, in]; only once a window has been settled with momentum
        self._bias_velocity = torch.zeros_like(self._bias)
        self._inputs: torch.Tensor | None = None
        self._moved = False  # whether a window's change has been written into the weight
        self._gathered: list[tuple[torch.Tensor, torch.Tensor]] = []

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
        self._at = _Pair(1.0, 0.0, torch.zeros_like(self._base))
        self._going = _Pair(0.0, 1.0, torch.zeros_like(self._base))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Pre-activations of the window's `rows`: [len(rows), out], without a graph behind them."""
        outputs = torch.addmm(self._base[rows], self._gram[rows], self._at.a, beta=self._at.c)
        if self._carried is not None:
            outputs.add_(self._carried[rows], alpha=self._at.s)
        return outputs.add_(self._bias)

    def gather(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Remember the loss's gradient by `forward(rows)`, [len(rows), out], for the next step."""
        self._gathered.append((rows, gradient))

    def squared_norm(self) -> torch.Tensor:
        """Of the gathered gradient of weight and bias together."""
        rows, gradient = self._gradient()
        return ((gradient @ gradient.T) * self._gram[rows][:, rows]).sum() + gradient.sum(0).square().sum()

    def step(self, rate: float, factor: float = 1.0) -> None:
        """One step of SGD with the gathered gradient, times `factor` (of clipping)."""
        rows, gradient = self._gradient()
        self._gathered.clear()
        gradient = gradient if factor == 1.0 else gradient * factor
        self._going.decay(self._momentum)
        self._going.add(self._at, self._decay) if self._decay else None
        self._going.a.index_add_(0, rows, gradient)
        self._at.add(self._going, -rate)
        self._bias_velocity.mul_(self._momentum).add_(gradient.sum(0)).add_(self._bias, alpha=self._decay)
        self._bias.sub_(self._bias_velocity, alpha=rate)

    def _gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, gradients = zip(*self._gathered, strict=True)
        return (rows[0], gradients[0]) if len(rows) == 1 else (torch.cat(rows), torch.cat(gradients))

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Pre-activations of any inputs [m, in] under the weight as it stands now."""
        result = inputs @ self._weight.T
        if self._inputs is not None:
            result.mul_(self._at.c).addmm_(inputs @ self._inputs.T, self._at.a)
            if self._velocity is not None:
                result.addmm_(inputs, self._velocity.T, alpha=self._at.s)
        return result.add_(self._bias)

    def settle(self, keep_momentum: bool = False) -> None:
        """End the window: write the weight back, in place; without `keep_momentum` training is over."""
        if self._inputs is None:
            return
        self._moved = True
        velocity = self._settled_velocity() if keep_momentum and self._momentum > 0 else None
        if self._at.c != 1.0:
            self._weight.mul_(self._at.c)
        if self._velocity is not None:
            self._weight.add_(self._velocity, alpha=self._at.s)
        self._weight.addmm_(self._at.a.T, self._inputs)
        self._velocity, self._inputs = velocity, None
        del self._base, self._carried, self._gram, self._at, self._going

    def _settled_velocity(self) -> torch.Tensor:
        assert self._inputs is not None
        old = self._velocity
        velocity = torch.zeros_like(self._weight) if old is None else old * self._going.s
        if self._going.c:
            velocity.add_(self._weight, alpha=self._going.c)
        return velocity.addmm_(self._going.a.T, self._inputs)

    # --- where it stands ---

    def place(self) -> dict[str, torch.Tensor]:
        """What the outputs depend on, by name: inside the first window [n, out] numbers, else the weight. Living
        tensors, not copies."""
        if self._inputs is None or self._moved:
            assert self._inputs is None, "a later window must be settled before its place is asked for"
            return {"weight": self._weight, "bias": self._bias}
        return {"bias": self._bias, "a": self._at.a, "c": torch.tensor(self._at.c, dtype=torch.float64)}

    def put(self, place: Mapping[str, torch.Tensor]) -> None:
        """Go to a `place` of this same window, or between windows."""
        self._bias.copy_(place["bias"])
        if "weight" in place:
            self._weight.copy_(place["weight"])
        else:
            self._at.a.copy_(place["a"])
            self._at.c = float(place["c"])

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on from here, by name: the living tensors, not copies.

        Between windows that is the weight and its momentum, twice [out, in]. Inside the first window the weight has
        not moved yet, so that whoever resumes has it already, and [n, out] numbers are enough; in a later window both
        would be needed: settle it first.
        """
        own = {**self.place(), "bias_velocity": self._bias_velocity}
        if self._inputs is not None:
            return {**own, "a_velocity": self._going.a, "c_velocity": torch.tensor(self._going.c, dtype=torch.float64)}
        return own if self._velocity is None else {**own, "velocity": self._velocity}

    def restore(self, state: Mapping[str, torch.Tensor], inputs: torch.Tensor | None) -> None:
        """Go on from a `state`. `inputs`: those of the window that it was taken in, None between windows."""
        self._bias_velocity.copy_(state["bias_velocity"])
        if inputs is not None:
            self.enter(inputs)
            self._going.a.copy_(state["a_velocity"])
            self._going.c = float(state["c_velocity"])
        else:
            self._velocity = state["velocity"].clone() if "velocity" in state else None
            self._moved = True
        self.put(state)
