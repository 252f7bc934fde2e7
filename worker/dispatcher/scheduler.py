"""Whose turn it is: deficit round robin between tenants, and who is asked to make room. No database in here.

Each lane rings no more than its workers can take now. What is rung stands in a Redis list that nobody reorders, so the
order is decided as late as it can be, and a tenant that comes now waits for nobody's thousandth chunk.
"""

import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.queue.dispatch import QueueSnapshot, RunningUnit, WaitingUnit
from jobs.states import Lane

AHEAD_AT_MOST = 64
"""Most units of a lane that are promised to busy workers."""


@dataclass(frozen=True)
class Plan:
    """Which doorbells to ring, in this order; which units to promise to busy workers; whom to ask for his place."""

    rings: Sequence[WaitingUnit]
    promises: Sequence[WaitingUnit]
    yields: Sequence[RunningUnit]


class RoundRobin:
    """Deficit round robin (Shreedhar and Varghese, 1995): each tenant in turn may spend `quantum` scans, and what it
    could not spend because its next unit is larger is kept for its next turn."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._deficits: OrderedDict[str, int] = OrderedDict()  # in the order of the turns

    def choose(self, waiting: Sequence[WaitingUnit], room: int) -> list[WaitingUnit]:
        """At most `room` of the waiting units; each tenant's in the order given."""
        queues: defaultdict[str, deque[WaitingUnit]] = defaultdict(deque)
        for unit in waiting:
            queues[unit.tenant_id].append(unit)
        self._remember(queues)
        chosen: list[WaitingUnit] = []
        while len(chosen) < room and any(queues.values()):
            tenant = next(iter(self._deficits))
            if queues[tenant] and queues[tenant][0].scans <= self._deficits[tenant]:
                chosen.append(queues[tenant].popleft())
                self._deficits[tenant] -= chosen[-1].scans
            else:
                self._deficits.move_to_end(tenant)
                self._deficits[tenant] += self._quantum if queues[tenant] else 0
        return chosen

    def _remember(self, tenants: Mapping[str, object]) -> None:
        """A tenant with nothing waiting loses its credit; a new one may spend a quantum at once, before all others."""
        for gone in self._deficits.keys() - tenants.keys():
            del self._deficits[gone]
        for new in tenants.keys() - self._deficits.keys():
            self._deficits[new] = self._quantum
            self._deficits.move_to_end(new, last=False)


class Turns:
    """The policy of one dispatcher.

    Args:
        quantum: scans that a tenant may have in its turn.
        ahead: seconds of work that are promised to busy workers, so that short units follow without a gap.
        newcomer: a tenant without a ring for so many seconds need not wait for the end of another's chunk.
    """

    def __init__(
        self, quantum: int, ahead: float, newcomer: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lanes = {lane: RoundRobin(quantum) for lane in Lane}
        self._ahead, self._newcomer, self._clock = ahead, newcomer, clock
        self._last_ring: dict[tuple[Lane, str], float] = {}
        self._workers = 1
        self.is_busy = False
        """Whether all workers were, when last seen: what comes now finds none to ring for."""

    def look_ahead(self, pace: Mapping[Lane, float]) -> int:
        """How many waiting units of each tenant are worth a look: those that there may be room for, and a few."""
        return 8 + self._workers + max((self._promises(self._workers, pace.get(lane)) for lane in Lane), default=0)

    def plan(self, view: QueueSnapshot, pace: Mapping[Lane, float]) -> Plan:
        """What to do now. `pace`: seconds that a unit of a lane takes."""
        self._workers = max(1, len(view.workers))
        self.is_busy = bool(view.workers) and {w.name for w in view.workers} <= {unit.worker for unit in view.running}
        rings = [unit for unit in view.waiting if unit.overdue]  # they have their place already
        promises: list[WaitingUnit] = []
        yields: list[RunningUnit] = []
        for lane in Lane:
            mine = [unit for unit in view.waiting if unit.lane == lane and not unit.overdue]
            mine.sort(key=lambda unit: unit.explains)  # of each tenant, explanations come behind predictions
            promised, new = [u for u in mine if u.reserved], [u for u in mine if not u.reserved]
            idle, ahead = self._room(view, lane, pace.get(lane))
            woken = promised[:idle]  # whom they were promised to is idle now: nobody would come for them
            free = max(0, ahead - len(promised) + len(woken))
            chosen = self._lanes[lane].choose(new, idle - len(woken) + free)
            rings += woken + chosen[: idle - len(woken)]
            promises += chosen[idle - len(woken) :]
            left = [unit for unit in new if unit not in chosen]
            wanted = self._urgent(view, left) if lane == Lane.URGENT else self._newcomers(view, lane, left)
            yields += self._asked(view, lane, wanted, yields)
        self._remember([*rings, *promises])
        return Plan(rings, promises, yields)

    def _room(self, view: QueueSnapshot, lane: Lane, pace: float | None) -> tuple[int, int]:
        """How many units of the lane may be rung, for idle workers; and how many promised, to those that work in it."""
        workers = [worker for worker in view.workers if lane in worker.lanes]
        busy = {unit.worker: unit.lane for unit in view.running}
        idle = sum(worker.name not in busy for worker in workers) - view.dispatched.get(lane, 0)
        if not workers:  # one is rung all the same: a sign of life may only be late
            return max(0, 1 - view.dispatched.get(lane, 0)), 0
        # A worker goes on in its lane. One that is idle now is rung for in this plan, or was: were nothing promised
        # to it, a look that always comes between two short units would ring for each of them.
        of_lane = sum(busy.get(worker.name, lane) == lane for worker in workers)
        return max(0, idle), self._promises(of_lane, pace)

    def _promises(self, workers: int, pace: float | None) -> int:
        return 0 if pace is None else min(AHEAD_AT_MOST, int(self._ahead * workers / max(pace, 1e-6)))

    def _asked(
        self, view: QueueSnapshot, lane: Lane, by: Sequence[str], already: Sequence[RunningUnit]
    ) -> list[RunningUnit]:
        """Running batch units that are asked for their place by these tenants, one for one."""
        if lane == Lane.TRAIN or not by:
            return []
        serving = {worker.name for worker in view.workers if lane in worker.lanes}
        held = [unit for unit in view.running if unit.lane == Lane.BATCH and unit.worker in serving]
        # A newcomer does not ask itself; an urgent scan does ask its own tenant's batch.
        able = [u for u in held if u.can_yield and u not in already and (lane == Lane.URGENT or u.tenant_id not in by)]
        return able[: max(0, len(by) - sum(unit.yield_requested for unit in held))]

    def _urgent(self, view: QueueSnapshot, left: Sequence[WaitingUnit]) -> list[str]:
        """The tenants of urgent units for which no worker is free: those that found no room, and those that were rung
        for a worker which then heard a batch's bell first."""
        busy = {unit.worker for unit in view.running}
        idle = any(worker.name not in busy for worker in view.workers if Lane.URGENT in worker.lanes)
        unheard = 0 if idle else view.dispatched.get(Lane.URGENT, 0)
        return [unit.tenant_id for unit in left] + [""] * unheard

    def _newcomers(self, view: QueueSnapshot, lane: Lane, left: Sequence[WaitingUnit]) -> list[str]:
        """Tenants that have had nothing for a while: neither a ring nor a worker. Each asks once in that time, so that
        two large batches take turns by chunks, not by interrupting each other."""
        since = self._clock() - self._newcomer
        served = {unit.tenant_id for unit in view.running if unit.lane == lane}
        recent = {tenant for (of, tenant), at in self._last_ring.items() if of == lane and at >= since}
        return sorted({unit.tenant_id for unit in left} - served - recent)

    def _remember(self, rings: Sequence[WaitingUnit]) -> None:
        now = self._clock()
        self._last_ring |= {(unit.lane, unit.tenant_id): now for unit in rings}
        old = [key for key, at in self._last_ring.items() if at < now - self._newcomer]
        for key in old:
            del self._last_ring[key]
