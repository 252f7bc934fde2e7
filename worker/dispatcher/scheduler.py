"""Which units to dispatch next: deficit round robin between tenants, and requests to running batches to yield.

No database in here. In each lane no more units are dispatched than its workers can take now: messages in a Redis list
cannot be reordered, so the order is decided as late as possible, and a new tenant does not wait behind another's
thousandth chunk.
"""

import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from jobs.queue.dispatch import QueueSnapshot, RunningUnit, WaitingUnit, Worker
from jobs.states import Lane

MAX_RESERVED = 64
"""Units of a lane that are reserved for busy workers at most."""
SPARE_UNITS = 8
"""Waiting units of each tenant that are read beyond those for which there is room."""


@dataclass(frozen=True)
class Plan:
    """The units to dispatch, in this order; those to reserve for busy workers; and those whose workers should yield.
    `read_more`: a worker is left idle although more units wait than were read."""

    dispatch: Sequence[WaitingUnit]
    reserve: Sequence[WaitingUnit]
    request_yield: Sequence[RunningUnit]
    read_more: bool = False


class DeficitRoundRobin:
    """Deficit round robin (Shreedhar and Varghese, 1995): each tenant in turn may spend `quantum` scans. What it cannot
    spend, because its next unit is larger, is kept for its next turn."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._deficits: OrderedDict[str, int] = OrderedDict()  # in the order of the turns

    def choose(self, waiting: Sequence[WaitingUnit], room: int) -> list[WaitingUnit]:
        """At most `room` of the waiting units; each tenant's in the given order."""
        queues: defaultdict[str, deque[WaitingUnit]] = defaultdict(deque)
        for unit in waiting:
            queues[unit.tenant_id].append(unit)
        self._update_tenants(queues)
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

    def _update_tenants(self, tenants: Mapping[str, object]) -> None:
        """A tenant with nothing waiting loses its deficit; a new one may spend a quantum at once, before all others."""
        for gone in self._deficits.keys() - tenants.keys():
            del self._deficits[gone]
        for new in tenants.keys() - self._deficits.keys():
            self._deficits[new] = self._quantum
            self._deficits.move_to_end(new, last=False)


class IdleWorkers:
    """The workers of a snapshot that run no unit. One that serves several lanes takes one message of one of them."""

    def __init__(self, queue: QueueSnapshot) -> None:
        busy = {unit.worker for unit in queue.running}
        idle = [worker for worker in queue.workers if worker.name not in busy]
        self._workers = sorted(idle, key=lambda worker: len(worker.lanes))

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    @property
    def none(self) -> bool:
        """Whether there is none."""
        return not self._workers

    def number(self, lane: Lane) -> int:
        """How many of them serve the lane."""
        return sum(lane in worker.lanes for worker in self._workers)

    def give(self, lane: Lane, messages: int) -> None:
        """Take out one worker for each message of the lane; those that serve few lanes first."""
        takers = [worker for worker in self._workers if lane in worker.lanes][:messages]
        self._workers = [worker for worker in self._workers if worker not in takers]


class FairScheduler:
    """The policy of one dispatcher.

    Args:
        quantum: scans that a tenant may have per turn.
        reserve_seconds: seconds of work that are reserved for busy workers, so that short units follow without a gap.
        starvation_seconds: a tenant that was given nothing for so long may ask a running batch to yield.
    """

    def __init__(
        self,
        quantum: int,
        reserve_seconds: float,
        starvation_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes = {lane: DeficitRoundRobin(quantum) for lane in Lane}
        self._reserve_seconds, self._starvation_seconds, self._clock = reserve_seconds, starvation_seconds, clock
        self._last_served: dict[tuple[Lane, str], float] = {}
        self._workers, self._left_idle = 1, 0
        self.is_busy = False
        """Whether all workers were busy in the latest snapshot: a new unit finds none to be dispatched to."""
        self.idle_lanes: AbstractSet[Lane] = frozenset()
        """The lanes for which the latest plan left a worker idle, so that nothing waits in them."""

    def units_to_read(self, unit_seconds: Mapping[Lane, float]) -> int:
        """How many waiting units of each tenant the next snapshot should hold beside its share of the idle workers."""
        reservable = max(self._reservable(self._workers, unit_seconds.get(lane)) for lane in Lane)
        return SPARE_UNITS + reservable + self._left_idle

    def plan(self, queue: QueueSnapshot, unit_seconds: Mapping[Lane, float]) -> Plan:
        """What to do now. `unit_seconds`: how long a unit of a lane takes."""
        self._workers = max(1, len(queue.workers))
        idle = IdleWorkers(queue)
        self.is_busy = bool(queue.workers) and idle.none
        for lane, messages in queue.dispatched.items():
            idle.give(lane, messages)
        dispatch = [unit for unit in queue.waiting if unit.overdue]  # their messages are counted already
        reserve: list[WaitingUnit] = []
        yields: list[RunningUnit] = []
        for lane in Lane:
            ready, later, left = self._plan_lane(queue, lane, idle, unit_seconds.get(lane))
            dispatch += ready
            reserve += later
            waiting = self._waiting_urgent(queue, left) if lane == Lane.URGENT else self._starving(queue, lane, left)
            yields += self._to_yield(queue, lane, waiting, yields)
        self._remember([*dispatch, *reserve])
        # Shares were too small, since few tenants have most of the units: the next look reads more of each.
        self._left_idle = max((idle.number(lane) for lane, _ in queue.cut_off), default=0)
        self.idle_lanes = frozenset(lane for lane in Lane if idle.number(lane) and not queue.cut_off)
        return Plan(dispatch, reserve, yields, read_more=self._left_idle > 0)

    def dispatched(self, unit: WaitingUnit) -> None:
        """This unit was dispatched without a plan to one of the workers that the latest plan left idle."""
        self.idle_lanes = frozenset()
        self._remember([unit])

    def _plan_lane(
        self, queue: QueueSnapshot, lane: Lane, idle: "IdleWorkers", unit_seconds: float | None
    ) -> tuple[list[WaitingUnit], list[WaitingUnit], list[WaitingUnit]]:
        """The lane's units to dispatch, to reserve, and to leave waiting."""
        waiting = [unit for unit in queue.waiting if unit.lane == lane and not unit.overdue]
        reserved, new = [unit for unit in waiting if unit.reserved], [unit for unit in waiting if not unit.reserved]
        room, reservable = self._room(queue, lane, idle, unit_seconds)
        woken = reserved[:room]  # the worker that they were reserved for is idle now, and would not take them
        room -= len(woken)
        free = max(0, reservable - len(reserved) + len(woken))
        chosen = self._lanes[lane].choose(new, room + free)
        ready = woken + chosen[:room]
        idle.give(lane, len(ready))
        taken = set(chosen)  # a list would be searched for each of ten thousand units
        return ready, chosen[room:], [unit for unit in new if unit not in taken]

    def _room(
        self, queue: QueueSnapshot, lane: Lane, idle: "IdleWorkers", unit_seconds: float | None
    ) -> tuple[int, int]:
        """How many units of the lane may be dispatched, to idle workers, and reserved, for those that work in it."""
        workers = [worker for worker in queue.workers if lane in worker.lanes]
        if not workers:  # one unit is dispatched anyway: a heartbeat may only be late
            return max(0, 1 - queue.dispatched.get(lane, 0)), 0
        busy = {unit.worker: unit.lane for unit in queue.running}
        # A worker stays in its lane, so units are reserved for an idle worker too: it has a message, or gets one by
        # this plan. Otherwise a snapshot between two short units would always dispatch the next one by a message.
        in_lane = sum(busy.get(worker.name, lane) == lane for worker in workers)
        return idle.number(lane), self._reservable(in_lane, unit_seconds)

    def _reservable(self, workers: int, unit_seconds: float | None) -> int:
        if unit_seconds is None:
            return 0
        return min(MAX_RESERVED, int(self._reserve_seconds * workers / max(unit_seconds, 1e-6)))

    def _to_yield(
        self, queue: QueueSnapshot, lane: Lane, tenants: Sequence[str], already: Sequence[RunningUnit]
    ) -> list[RunningUnit]:
        """Running batch units that should yield to these tenants, one for each."""
        if lane == Lane.TRAIN or not tenants:
            return []
        serving = {worker.name for worker in queue.workers if lane in worker.lanes}
        batches = [unit for unit in queue.running if unit.lane == Lane.BATCH and unit.worker in serving]
        # A tenant's batch does not interrupt its own batch; its urgent scan does.
        candidates = [
            unit
            for unit in batches
            if unit.can_yield and unit not in already and (lane == Lane.URGENT or unit.tenant_id not in tenants)
        ]
        return candidates[: max(0, len(tenants) - sum(unit.yield_requested for unit in batches))]

    def _waiting_urgent(self, queue: QueueSnapshot, left: Sequence[WaitingUnit]) -> list[str]:
        """The tenants of urgent units for which no worker is free: those without room, and those dispatched that no
        worker can have taken (tenant unknown, so empty): a batch's message was first, or the worker has died."""
        counted = queue.late if any(Lane.URGENT in worker.lanes for worker in IdleWorkers(queue)) else queue.dispatched
        return [unit.tenant_id for unit in left] + [""] * counted.get(Lane.URGENT, 0)

    def _starving(self, queue: QueueSnapshot, lane: Lane, left: Sequence[WaitingUnit]) -> list[str]:
        """Tenants that were given nothing for `starvation_seconds` and have no worker. Each asks only once in that
        time, so that two large batches alternate by chunks, and do not interrupt each other."""
        since = self._clock() - self._starvation_seconds
        running = {unit.tenant_id for unit in queue.running if unit.lane == lane}
        recent = {tenant for (of, tenant), at in self._last_served.items() if of == lane and at >= since}
        return sorted({unit.tenant_id for unit in left} - running - recent)

    def _remember(self, units: Sequence[WaitingUnit]) -> None:
        now = self._clock()
        self._last_served |= {(unit.lane, unit.tenant_id): now for unit in units}
        old = [key for key, at in self._last_served.items() if at < now - self._starvation_seconds]
        for key in old:
            del self._last_served[key]
