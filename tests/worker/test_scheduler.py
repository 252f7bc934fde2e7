"""The fair scheduler: which units are dispatched next, without a database."""

from dataclasses import replace

from jobs.queue.dispatch import QueueSnapshot, RunningUnit, WaitingUnit, Worker
from jobs.states import JobKind, Lane
from jobs.tables import new_id
from worker.dispatcher.scheduler import FairScheduler

PREDICTOR = Worker("predict@a", frozenset({Lane.URGENT, Lane.BATCH}))


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def scheduler(clock: Clock | None = None) -> FairScheduler:
    return FairScheduler(quantum=128, reserve_seconds=0.25, starvation_seconds=5, clock=clock or Clock())


def waiting(
    tenant: str, count: int, scans: int = 128, lane: Lane = Lane.BATCH, overdue: bool = False
) -> list[WaitingUnit]:
    return [WaitingUnit(new_id(), lane, tenant, JobKind.PREDICT_BATCH, scans, overdue) for _ in range(count)]


def running(
    tenant: str, worker: str = "predict@a", can_yield: bool = True, yield_requested: bool = False
) -> RunningUnit:
    return RunningUnit(new_id(), Lane.BATCH, tenant, worker, can_yield, yield_requested)


def view(
    units: list[WaitingUnit],
    running_units: tuple[RunningUnit, ...] = (),
    dispatched: dict[Lane, int] | None = None,
    workers: tuple[Worker, ...] = (PREDICTOR,),
) -> QueueSnapshot:
    return QueueSnapshot(units, dispatched or {}, running_units, workers)


def test_an_idle_worker_is_given_one_unit_and_no_more() -> None:
    plan = scheduler().plan(view(waiting("a", 4)), unit_seconds={Lane.BATCH: 2.0})
    assert len(plan.dispatch) == 1


def test_lanes_are_idle_whose_workers_a_plan_left_without_a_unit() -> None:
    trainer, fair = Worker("train@a", frozenset({Lane.TRAIN})), scheduler()
    assert fair.idle_lanes == set(), "nothing is known before the first plan"
    fair.plan(view([], (running("a"),), workers=(PREDICTOR, trainer)), {})
    assert fair.idle_lanes == {Lane.TRAIN}
    fair.plan(view([], dispatched={Lane.URGENT: 1}), {})
    assert fair.idle_lanes == set(), "a message is under way to it"
    fair.plan(view(waiting("a", 1)), {})
    assert fair.idle_lanes == set(), "this plan sends it one"
    fair.plan(view([]), {})
    assert fair.idle_lanes == {Lane.URGENT, Lane.BATCH}
    fair.dispatched(waiting("a", 1)[0])
    assert fair.idle_lanes == set(), "it was given a unit since"
    fair.plan(replace(view(waiting("a", 1)), workers=(PREDICTOR,) * 9, cut_off={(Lane.BATCH, "a")}), {})
    assert fair.idle_lanes == set(), "more waits than was read"


def test_short_units_are_reserved_for_a_worker_that_is_busy_in_their_lane() -> None:
    plan = scheduler().plan(view(waiting("a", 64), (running("a"),)), unit_seconds={Lane.BATCH: 0.01})
    assert (len(plan.dispatch), len(plan.reserve)) == (0, 25), "work of a quarter of a second"


def test_short_units_are_reserved_together_with_the_dispatch_to_an_idle_worker() -> None:
    plan = scheduler().plan(view(waiting("a", 64)), unit_seconds={Lane.BATCH: 0.01})
    assert (len(plan.dispatch), len(plan.reserve)) == (1, 25)
    plan = scheduler().plan(view(waiting("a", 64), dispatched={Lane.BATCH: 1}), unit_seconds={Lane.BATCH: 0.01})
    assert (len(plan.dispatch), len(plan.reserve)) == (0, 25)


def test_nothing_is_reserved_for_a_worker_that_is_busy_in_another_lane() -> None:
    urgent = waiting("a", 3, scans=1, lane=Lane.URGENT)
    plan = scheduler().plan(view(urgent, (running("a"),)), unit_seconds={Lane.URGENT: 0.01})
    assert plan.reserve == []
    assert len(plan.request_yield) == 1, "it asks the batch to yield instead"


def test_a_reserved_unit_is_dispatched_when_its_worker_is_idle() -> None:
    promised = [replace(unit, reserved=True) for unit in waiting("a", 3)]
    plan = scheduler().plan(view(promised), unit_seconds={Lane.BATCH: 0.1})
    assert (plan.dispatch, plan.reserve) == (promised[:1], [])


def test_reserved_units_count_towards_the_limit_of_reservations() -> None:
    promised = [replace(unit, reserved=True) for unit in waiting("a", 20)]
    plan = scheduler().plan(view(promised + waiting("a", 20), (running("a"),)), unit_seconds={Lane.BATCH: 0.01})
    assert (len(plan.dispatch), len(plan.reserve)) == (0, 5)


def test_a_dispatched_unit_takes_the_room_of_an_idle_worker() -> None:
    plan = scheduler().plan(view(waiting("a", 4), dispatched={Lane.BATCH: 1}), unit_seconds={})
    assert plan.dispatch == []


def test_an_overdue_unit_is_dispatched_again_even_without_room() -> None:
    (unit,) = waiting("a", 1, overdue=True)
    assert scheduler().plan(view([unit], (running("b"),), {Lane.BATCH: 1}), unit_seconds={}).dispatch == [unit]


def test_one_unit_is_dispatched_when_no_worker_is_known() -> None:
    assert len(scheduler().plan(view(waiting("a", 4), workers=()), unit_seconds={}).dispatch) == 1


def test_tenants_alternate_by_scans_not_by_units() -> None:
    policy, served = scheduler(), {"large": 0, "small": 0}
    for _ in range(200):
        units = waiting("large", 8, scans=128) + waiting("small", 8, scans=16)
        for unit in policy.plan(view(units), unit_seconds={}).dispatch:
            served[unit.tenant_id] += unit.scans
    assert 0.8 < served["large"] / served["small"] < 1.25


def test_units_of_one_tenant_keep_their_order() -> None:
    units = waiting("a", 30)
    assert scheduler().plan(view(units, (running("a"),)), unit_seconds={Lane.BATCH: 0.01}).reserve == units[:25]


def test_a_new_tenant_asks_a_running_batch_to_yield() -> None:
    running_unit = running("a")
    plan = scheduler().plan(
        view(waiting("b", 2, scans=10) + waiting("a", 2), (running_unit,)), unit_seconds={Lane.BATCH: 2.0}
    )
    assert (plan.dispatch, plan.request_yield) == ([], [running_unit])


def test_a_new_tenant_asks_only_once() -> None:
    running_unit = running("a", can_yield=False, yield_requested=True), running("a", "predict@c")
    workers = (PREDICTOR, Worker("predict@c", frozenset({Lane.BATCH})))
    assert scheduler().plan(view(waiting("b", 2), running_unit, workers=workers), unit_seconds={}).request_yield == []


def test_a_new_tenant_is_served_before_the_tenant_that_yielded() -> None:
    policy = scheduler()
    policy.plan(view(waiting("a", 4)), unit_seconds={})
    (first,) = policy.plan(view(waiting("a", 4) + waiting("b", 1, scans=10)), unit_seconds={}).dispatch
    assert first.tenant_id == "b"


def test_two_large_batches_do_not_interrupt_each_other() -> None:
    clock = Clock()
    policy = scheduler(clock)
    policy.plan(view(waiting("b", 1)), unit_seconds={})
    clock.now += 4
    assert policy.plan(view(waiting("b", 3), (running("a"),)), unit_seconds={}).request_yield == []
    clock.now += 2
    assert len(policy.plan(view(waiting("b", 3), (running("a"),)), unit_seconds={}).request_yield) == 1


def test_a_tenant_does_not_interrupt_its_own_batch() -> None:
    assert scheduler().plan(view(waiting("a", 3), (running("a"),)), unit_seconds={}).request_yield == []


def test_an_urgent_scan_asks_any_batch_to_yield_even_its_own_tenants() -> None:
    running_unit = running("a")
    urgent = waiting("a", 1, scans=1, lane=Lane.URGENT)
    assert scheduler().plan(view(urgent, (running_unit,)), unit_seconds={Lane.URGENT: 1.0}).request_yield == [
        running_unit
    ]


def test_a_dispatched_urgent_scan_asks_to_yield_when_its_worker_took_a_batch_first() -> None:
    running_unit = running("a")
    assert scheduler().plan(view([], (running_unit,), {Lane.URGENT: 1}), unit_seconds={}).request_yield == [
        running_unit
    ]
    assert scheduler().plan(view([], (), {Lane.URGENT: 1}), unit_seconds={}).request_yield == [], (
        "an idle worker is on its way"
    )


def test_a_late_urgent_scan_asks_to_yield_though_a_worker_seems_idle() -> None:
    """The worker that seems idle has died a moment ago."""
    running_unit, workers = running("a"), (PREDICTOR, Worker("predict@b", PREDICTOR.lanes))
    queue = view([], (running_unit,), {Lane.URGENT: 1}, workers)
    assert scheduler().plan(queue, unit_seconds={}).request_yield == []
    assert scheduler().plan(replace(queue, late={Lane.URGENT: 1}), unit_seconds={}).request_yield == [running_unit]


def test_all_idle_workers_are_given_a_unit_of_one_batch_in_one_look() -> None:
    workers = tuple(Worker(f"predict@{number}", frozenset({Lane.BATCH})) for number in range(100))
    assert len(scheduler().plan(view(waiting("a", 250), workers=workers), unit_seconds={}).dispatch) == 100


def test_a_worker_of_two_lanes_is_given_one_message() -> None:
    urgent = waiting("a", 1, scans=1, lane=Lane.URGENT)
    policy = scheduler()
    assert policy.plan(view(waiting("a", 2) + urgent), unit_seconds={}).dispatch == urgent
    assert policy.plan(view(waiting("a", 2), dispatched={Lane.URGENT: 1}), unit_seconds={}).dispatch == []
    two = (PREDICTOR, Worker("batch@b", frozenset({Lane.BATCH})))
    both = policy.plan(view(waiting("a", 2) + urgent, workers=two), unit_seconds={}).dispatch
    assert [unit.lane for unit in both] == [Lane.URGENT, Lane.BATCH]
    assert policy.plan(view(urgent, dispatched={Lane.BATCH: 1}, workers=two), unit_seconds={}).dispatch == urgent


def test_a_training_and_an_ingest_are_never_asked_to_yield() -> None:
    running_unit = RunningUnit(new_id(), Lane.BATCH, "a", "predict@a", can_yield=False, yield_requested=False)
    urgent = waiting("b", 1, scans=1, lane=Lane.URGENT)
    training = waiting("b", 1, scans=1, lane=Lane.TRAIN)
    assert scheduler().plan(view(urgent + training, (running_unit,)), unit_seconds={}).request_yield == []
