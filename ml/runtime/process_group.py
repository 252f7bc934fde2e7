"""The processes of one machine that train together, from the view of one of them: shares of rows, and collectives.

`ml.image.learning.ddp_launch` starts and ends the processes.
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
    """The group of `size` processes, seen by number `rank`, which owns every `size`-th row from row `rank` on.

    When the group ends, the leader goes on alone: its `size` becomes 1.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether this process reports and writes files."""
        return self.rank == 0

    def device(self) -> torch.device:
        """The device of this process: its own GPU if there are enough, else the CPU."""
        return torch.device("cuda", self.rank) if torch.cuda.device_count() >= self.size else torch.device("cpu")

    def own_rows(self, rows: Rows) -> Rows:
        """The rows of this process; none if there are fewer than `rank` + 1."""
        return rows if self.size == 1 else rows[self.rank :: self.size]

    def rows_to_compute(self, rows: Rows) -> Rows:
        """What this process computes for `gather_rows`: its own rows or, if it has none, one that is discarded."""
        return self.own_rows(rows) if self.rank < len(rows) else rows[:1]

    def gather_rows(self, share: np.ndarray, count: int) -> np.ndarray:
        """All processes' shares of `count` rows in their original order: [count, …], the same in each process."""
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
        """The sum of each value over all processes."""
        if self.size == 1:
            return values
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def all_true(self, flags: np.ndarray) -> np.ndarray:
        """Where all processes have True: bool, in the shape of `flags`."""
        if self.size == 1:
            return flags
        least = torch.from_numpy(flags.astype(np.uint8))
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return least.numpy().astype(bool)

    def broadcast(self, value: Value) -> Value:
        """The leader's `value`."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


SINGLE_PROCESS = ProcessGroup()
