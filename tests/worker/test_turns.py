"""Whose doorbell is rung next: the policy alone, without a database."""

from dataclasses import replace

from jobs.queue.dispatch import QueueSnapshot, RunningUnit, WaitingUnit, Worker
from jobs.states import JobKind, Lane
from jobs.tables import new_id
from worker.dispatcher.scheduler import Turns

PREDICTOR = Worker("predict@a", frozenset({Lane.URGENT, Lane.BATCH}))


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def turns(clock: Clock | None = None) -> Turns:
    return Turns(quantum=128, ahead=0.25, newcomer=5, clock=clock or Clock())


def waiting(
    tenant: str, count: int, scans: int = 128, lane: Lane = Lane.BATCH, again: bool = False
) -> list[WaitingUnit]:
    return [WaitingUnit(new_id(), lane, tenant, JobKind.PREDICT_BATCH, scans, again) for _ in range(count)]


def running(tenant: str, worker: str = "predict@a", yields: bool = True, asked: bool = False) -> RunningUnit:
    return RunningUnit(new_id(), Lane.BATCH, tenant, worker, yields, asked)


def view(
    units: list[WaitingUnit],
    held: tuple[RunningUnit, ...] = (),
    rung: dict[Lane, int] | None = None,
    workers: tuple[Worker, ...] = (PREDICTOR,),
) -> QueueSnapshot:
    return QueueSnapshot(units, rung or {}, held, workers)


def test_an_idle_worker_gets_one_unit_and_no_more_is_rung() -> None:
    plan = turns().plan(view(waiting("a", 4)), pace={Lane.BATCH: 2.0})
    assert len(plan.rings) == 1


def test_short_units_are_promised_to_the_worker_that_is_busy_with_such() -> None:
    plan = turns().plan(view(waiting("a", 64), (running("a"),)), pace={Lane.BATCH: 0.01})
    assert (len(plan.rings), len(plan.promises)) == (0, 25), "a quarter of a second's work"


def test_short_units_are_promised_with_the_ring_since_a_look_between_two_of_them_always_finds_the_worker_idle() -> None:
    plan = turns().plan(view(waiting("a", 64)), pace={Lane.BATCH: 0.01})
    assert (len(plan.rings), len(plan.promises)) == (1, 25)
    plan = turns().plan(view(waiting("a", 64), rung={Lane.BATCH: 1}), pace={Lane.BATCH: 0.01})
    assert (len(plan.rings), len(plan.promises)) == (0, 25)


def test_explanations_wait_for_all_predictions_of_their_tenant() -> None:
    explanation, prediction = replace(waiting("a", 1)[0], explains=True), waiting("a", 1)[0]
    of_another = replace(waiting("b", 1)[0], explains=True)
    policy = turns()
    assert policy.plan(view([explanation, prediction]), pace={}).rings == [prediction]
    assert policy.plan(view([explanation]), pace={}).rings == [explanation]
    two = (PREDICTOR, Worker("predict@b", PREDICTOR.lanes))
    rung = turns().plan(view([explanation, prediction, of_another], workers=two), pace={}).rings
    assert {unit.unit_id for unit in rung} == {prediction.unit_id, of_another.unit_id}, "of their tenant alone"


def test_nothing_is_promised_to_a_worker_that_is_busy_in_another_lane() -> None:
    urgent = waiting("a", 3, scans=1, lane=Lane.URGENT)
    plan = turns().plan(view(urgent, (running("a"),)), pace={Lane.URGENT: 0.01})
    assert plan.promises == []
    assert len(plan.yields) == 1, "it asks for its place instead"


def test_what_was_promised_to_a_worker_that_is_idle_now_is_rung() -> None:
    promised = [replace(unit, promised=True) for unit in waiting("a", 3)]
    plan = turns().plan(view(promised), pace={Lane.BATCH: 0.1})
    assert (plan.rings, plan.promises) == (promised[:1], [])


def test_what_is_promised_takes_the_place_of_new_promises() -> None:
    promised = [replace(unit, promised=True) for unit in waiting("a", 20)]
    plan = turns().plan(view(promised + waiting("a", 20), (running("a"),)), pace={Lane.BATCH: 0.01})
    assert (len(plan.rings), len(plan.promises)) == (0, 5)


def test_what_is_rung_already_takes_the_place_of_new_rings() -> None:
    plan = turns().plan(view(waiting("a", 4), rung={Lane.BATCH: 1}), pace={})
    assert plan.rings == []


def test_a_unit_that_nobody_came_for_is_rung_again_whatever_the_room() -> None:
    (unit,) = waiting("a", 1, again=True)
    assert turns().plan(view([unit], (running("b"),), {Lane.BATCH: 1}), pace={}).rings == [unit]


def test_one_unit_is_rung_where_no_worker_seems_to_live() -> None:
    assert len(turns().plan(view(waiting("a", 4), workers=()), pace={}).rings) == 1


def test_tenants_take_turns_by_scans_not_by_units() -> None:
    policy, served = turns(), {"large": 0, "small": 0}
    for _ in range(200):
        units = waiting("large", 8, scans=128) + waiting("small", 8, scans=16)
        for unit in policy.plan(view(units), pace={}).rings:
            served[unit.tenant_id] += unit.scans
    assert 0.8 < served["large"] / served["small"] < 1.25


def test_one_tenants_units_keep_their_order() -> None:
    units = waiting("a", 30)
    assert turns().plan(view(units, (running("a"),)), pace={Lane.BATCH: 0.01}).promises == units[:25]


def test_a_newcomer_asks_a_busy_worker_for_its_place() -> None:
    held = running("a")
    plan = turns().plan(view(waiting("b", 2, scans=10) + waiting("a", 2), (held,)), pace={Lane.BATCH: 2.0})
    assert (plan.rings, plan.yields) == ([], [held])


def test_it_asks_once() -> None:
    held = running("a", yields=False, asked=True), running("a", "predict@c")
    workers = (PREDICTOR, Worker("predict@c", frozenset({Lane.BATCH})))
    assert turns().plan(view(waiting("b", 2), held, workers=workers), pace={}).yields == []


def test_a_newcomer_is_served_before_the_one_that_made_room() -> None:
    policy = turns()
    policy.plan(view(waiting("a", 4)), pace={})
    (first,) = policy.plan(view(waiting("a", 4) + waiting("b", 1, scans=10)), pace={}).rings
    assert first.tenant_id == "b"


def test_two_large_batches_do_not_interrupt_each_other() -> None:
    clock = Clock()
    policy = turns(clock)
    policy.plan(view(waiting("b", 1)), pace={})
    clock.now += 4
    assert policy.plan(view(waiting("b", 3), (running("a"),)), pace={}).yields == []
    clock.now += 2
    assert len(policy.plan(view(waiting("b", 3), (running("a"),)), pace={}).yields) == 1


def test_one_tenant_does_not_interrupt_itself() -> None:
    assert turns().plan(view(waiting("a", 3), (running("a"),)), pace={}).yields == []


def test_an_urgent_scan_asks_a_batch_for_its_place_even_its_own_tenants() -> None:
    held = running("a")
    urgent = waiting("a", 1, scans=1, lane=Lane.URGENT)
    assert turns().plan(view(urgent, (held,)), pace={Lane.URGENT: 1.0}).yields == [held]


def test_an_urgent_scan_that_was_rung_asks_too_when_its_worker_heard_a_batch_first() -> None:
    held = running("a")
    assert turns().plan(view([], (held,), {Lane.URGENT: 1}), pace={}).yields == [held]
    assert turns().plan(view([], (), {Lane.URGENT: 1}), pace={}).yields == [], "an idle worker is on its way"


def test_nobody_asks_a_training_or_an_ingest_for_its_place() -> None:
    held = RunningUnit(new_id(), Lane.BATCH, "a", "predict@a", yields=False, asked=False)
    urgent = waiting("b", 1, scans=1, lane=Lane.URGENT)
    training = waiting("b", 1, scans=1, lane=Lane.TRAIN)
    assert turns().plan(view(urgent + training, (held,)), pace={}).yields == []
