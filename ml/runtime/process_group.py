"""Processes of one machine that train together, as one of them sees it: which share of the rows is its own, and how
arrays and numbers are exchanged. Who starts and ends them is in `ml.image.learning.ddp_launch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

Rows = TypeVar("Rows", torch.Tensor, np.ndarray)
Value = TypeVar("Value")


@dataclass(eq=False)
class ProcessGroup:
    """A member's view: it is number `rank` of `size`. Every member takes each `size`-th row, from its own on.

    When the team parts, the leader is alone: `size` becomes 1.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether this one speaks, and writes files."""
        return self.rank == 0

    def device(self) -> torch.device:
        """This member's own: a GPU each, where there are as many."""
        return torch.device("cuda", self.rank) if torch.cuda.device_count() >= self.size else torch.device("cpu")

    def own_rows(self, rows: Rows) -> Rows:
        """This member's share of rows; none where there are fewer rows than members before it."""
        return rows if self.size == 1 else rows[self.rank :: self.size]

    def rows_to_compute(self, rows: Rows) -> Rows:
        """What this member computes for `together`: its rows, or where it has none, one that is thrown away."""
        return self.own_rows(rows) if self.rank < len(rows) else rows[:1]

    def gather_rows(self, share: np.ndarray, count: int) -> np.ndarray:
        """All members' shares of `count` rows in their places again: [count, …]; each member gets all."""
        if self.size == 1:
            return share
        padded = np.zeros((-(-count // self.size), *share.shape[1:]), share.dtype)
        padded[: len(share)] = share
        parts = [torch.empty_like(torch.from_numpy(padded)) for _ in range(self.size)]
        dist.all_gather(parts, torch.from_numpy(padded))
        whole = np.empty((count, *share.shape[1:]), share.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part.numpy()[: len(whole[rank :: self.size])]
        return whole

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all members."""
        if self.size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def all_true(self, flags: np.ndarray) -> np.ndarray:
        """Where all members say true: bool, of the shape of `flags`."""
        if self.size == 1:
            return flags
        least = torch.from_numpy(flags.astype(np.uint8))
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return least.numpy().astype(bool)

    def broadcast(self, value: Value) -> Value:
        """What the leader's `value` is."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


SINGLE_PROCESS = ProcessGroup()
