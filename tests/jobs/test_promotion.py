"""Promotion, rollback and comparison of model versions, on real Postgres."""

import random
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs.db import Sessions, listening
from jobs.errors import Invalid, LeaseLost, ModelNotFound, NoChampion, NothingBefore, PromotionRefused
from jobs.events.job_events import UNITS_CHANNEL
from jobs.models import comparison, promotion, registry
from jobs.models.cards import REGISTRY_SYNC
from jobs.models.comparison import PairedScores
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import lifecycle
from jobs.tables import Job, ModelEvaluation, ModelVersion, Promotion, new_id
from tests import builders
from tests.builders import TENANT

POLICY = GatePolicy()
ONE_SET, OTHER_SET = "1" * 64, "2" * 64
WHY = "The radiologists want it back."


def scores(f1: float, test_digest: str = ONE_SET, **more: Any) -> dict[str, Any]:
    """Metrics on 93 test scans that meet the policy except for F1."""
    return {**builders.SCORES, "f1": f1, "test_digest": test_digest, "held_out": 93, **more}


def measured(champion: ModelVersion, ours: float, theirs: float, test_digest: str = OTHER_SET) -> PairedScores:
    """Paired scores of a training's network and this champion."""
    scans = 93 if test_digest == ONE_SET else 40
    both = scores(ours, test_digest), scores(theirs, test_digest)
    return PairedScores(champion.id, "", test_digest, scans, *both, builders.paired(ours, theirs))


def trained(
    session: Session,
    metrics: dict[str, Any],
    beside: PairedScores | None = None,
    tenant_id: str = TENANT,
    promote: str = "auto",
    **new: Any,
) -> ModelVersion:
    """The version of a training that ends now; on the champion's own test scans, it was scored beside it."""
    now = registry.find_champion(session, tenant_id)
    if beside is None and now is not None and now.metrics.get("test_digest", "") == metrics.get("test_digest"):
        beside = measured(now, metrics["f1"], now.metrics["f1"], metrics["test_digest"])
    job = builders.make_job(session, tenant_id=tenant_id, promote=promote)
    held = builders.claim(session, builders.units_of(session, job)[0])
    fields: dict[str, Any] = {"params": {}, "dataset_digest": "d" * 64, "code_revision": "abc", **new}
    made = promotion.register(
        session, held, NewModel("a" * 64, ["Normal", "Tumor"], metrics=metrics, **fields), POLICY, beside
    )
    lifecycle.succeed(session, held)
    return made


def test_a_training_that_has_lost_its_lease_registers_no_version(sessions: Sessions) -> None:
    """Two attempts may end at once: the second one is told by the fence, not by a key of the database."""
    new = NewModel("a" * 64, ["Normal", "Tumor"], {}, scores(0.8), "d" * 64, "abc")
    with sessions.begin() as session:
        job = builders.make_job(session)
        stale = builders.claim(session, builders.units_of(session, job)[0])
        lifecycle.requeue(session, stale, "DRAINED")
        held = builders.claim(session, builders.units_of(session, job)[0])
        promotion.register(session, held, new, POLICY)
        with pytest.raises(LeaseLost):
            promotion.register(session, stale, new, POLICY)
        lifecycle.succeed(session, held)
        with pytest.raises(LeaseLost):
            promotion.register(session, held, new, POLICY)


def history(session: Session, tenant_id: str = TENANT) -> list[tuple[int, int | None, str]]:
    """(version, replaced version, how), oldest first."""
    rows = session.scalars(select(Promotion).where(Promotion.tenant_id == tenant_id).order_by(Promotion.id))
    return [(row.version, row.replaced, row.how) for row in rows]


def champion(session: Session, tenant_id: str = TENANT) -> int | None:
    """The champion's number."""
    found = registry.find_champion(session, tenant_id)
    return found.version if found else None


@pytest.fixture
def session(sessions: Sessions) -> Any:
    """A session whose transaction is rolled back."""
    with sessions() as opened:
        yield opened
        opened.rollback()


@pytest.fixture
def three(session: Session) -> list[ModelVersion]:
    """Three champions, one after another."""
    return [trained(session, scores(f1)) for f1 in (0.90, 0.92, 0.94)]


# --- at a training's end ---


def test_gate_promotion_is_recorded_with_the_verdict(session: Session) -> None:
    version = trained(session, scores(0.9), reference={"scans": 93})
    assert (version.champion, version.promoted_at is not None) == (True, True)
    assert version.reference == {"scans": 93}
    row = session.scalars(select(Promotion)).one()
    assert (row.model_id, row.replaced, row.back_id, row.how, row.by_key) == (version.id, None, None, "gate", None)
    assert row.verdict == version.gate
    assert version.gate["reasons"][2] == "There is no champion yet, and F1 0.9000 ≥ the required 0.8500."


def test_gate_compares_on_the_scans_shared_with_the_champion(session: Session) -> None:
    first = trained(session, scores(0.95))
    worse = trained(session, scores(0.99, "3" * 64), measured(first, 0.89, 0.92))
    assert not worse.champion
    assert worse.gate["reasons"][2].startswith(
        "F1 0.8900, the champion's 0.9200 (version 1) on the same 40 test scans in 60"
    )
    better = trained(session, scores(0.90, "4" * 64), measured(first, 0.93, 0.92))
    assert better.champion
    assert history(session) == [(1, None, "gate"), (3, 1, "gate")]


def test_scores_of_both_versions_are_stored_per_test_set(session: Session) -> None:
    first = trained(session, scores(0.95))
    second = trained(session, scores(0.99, "3" * 64), measured(first, 0.91, 0.92))
    rows = session.scalars(select(ModelEvaluation)).all()
    found = {(row.model_id, row.test_digest): (row.scans, row.metrics["f1"], row.job_id) for row in rows}
    assert found == {
        (first.id, ONE_SET): (93, 0.95, first.job_id),
        (second.id, "3" * 64): (93, 0.99, second.job_id),
        (second.id, OTHER_SET): (40, 0.91, second.job_id),
        (first.id, OTHER_SET): (40, 0.92, second.job_id),
    }


def test_latest_scores_on_a_test_set_are_compared(session: Session) -> None:
    first = trained(session, scores(0.95))
    second = trained(session, scores(0.951), measured(first, 0.92, 0.952, ONE_SET))
    assert not second.champion, "on this machine, now, the champion has 0.952"
    found = comparison.compare(session, TENANT, "1", "2")
    assert (found.scans, found.metrics["f1"]) == (93, [0.952, 0.92])
    assert first.metrics["f1"] == 0.95, "what its own training found stays as it was"
    assert found.paired is not None
    assert found.paired["differences"]["f1"]["difference"] == pytest.approx(0.952 - 0.92), "of version 1 against 2"
    assert comparison.compare(session, TENANT, "2", "1").paired["differences"]["f1"]["ours"] == 0.92  # type: ignore[index]


def test_paired_scores_replace_those_of_own_test_scans(session: Session) -> None:
    first = trained(session, scores(0.95))
    second = trained(session, scores(0.951), measured(first, 0.92, 0.95, ONE_SET))
    assert not second.champion, "rounded as predictions are, it has 0.92"
    assert comparison.compare(session, TENANT, "1", "2").metrics["f1"] == [0.95, 0.92]


def test_scores_with_leaks_are_not_compared(session: Session) -> None:
    trained(session, scores(0.99, leaks={"patients": 0, "duplicates": 33}))
    promotion.promote(session, TENANT, "1", POLICY, force=True, reason=WHY)
    leaky = registry.resolve(session, TENANT, "1")
    honest = trained(session, scores(0.93), measured(leaky, 0.92, 0.90))
    assert honest.gate["reasons"][2].startswith(
        "F1 0.9200, the champion's 0.9000 (version 1) on the same 40 test scans"
    )
    assert comparison.compare(session, TENANT, "1", "2").scans == 40


def test_missing_comparison_is_explained_in_the_reasons(session: Session) -> None:
    first = trained(session, scores(0.9))
    version = trained(session, scores(0.99, OTHER_SET), PairedScores(first.id, "its file cannot be read"))
    assert not version.champion
    assert "cannot be compared with the champion (version 1): its file cannot be read." in version.gate["reasons"][2]


def test_champion_changed_during_training_needs_shared_scans(session: Session) -> None:
    first = trained(session, scores(0.9))
    trained(session, scores(0.95, "3" * 64), measured(first, 0.95, 0.90))
    late = trained(session, scores(0.99, "4" * 64), measured(first, 0.93, 0.90, "5" * 64))
    assert not late.champion
    assert "(version 2): the champion changed while it trained" in late.gate["reasons"][2]
    assert "no test scans were scored with both" in late.gate["reasons"][2]


def test_first_champion_during_training_needs_shared_scans(session: Session) -> None:
    trained(session, scores(0.9))
    late = trained(session, scores(0.99, OTHER_SET))
    assert not late.champion
    assert "the champion changed while it trained" in late.gate["reasons"][2]


def test_changed_champion_is_compared_on_a_shared_test_set(session: Session) -> None:
    first = trained(session, scores(0.9))
    trained(session, scores(0.95), measured(first, 0.95, 0.90, ONE_SET))
    late = trained(session, scores(0.94), measured(first, 0.94, 0.90, ONE_SET))
    assert not late.champion
    assert late.gate["reasons"][2].startswith("It cannot be compared with the champion (version 2): F1 has no")


def test_promote_never_records_the_verdict_against_the_champion(session: Session) -> None:
    first = trained(session, scores(0.9))
    version = trained(session, scores(0.95), measured(first, 0.95, 0.90), promote="never")
    assert not version.champion
    assert "would have promoted it" in version.gate["reasons"][0]
    assert "(version 1)" in version.gate["reasons"][3]


# --- promotion by request ---


def test_request_promotes_a_version_that_passes_the_gate(session: Session) -> None:
    trained(session, scores(0.9))
    waiting = trained(session, scores(0.95), promote="never")
    key = new_id()
    promoted = promotion.promote(session, TENANT, "2", POLICY, reason="better", key_id=key)
    assert promoted.id == waiting.id
    assert (promoted.champion, champion(session)) == (True, 2)
    row = promotion.promotions(session, TENANT, 1).data[0]
    assert (row.version, row.replaced, row.how, row.reason, row.by_key) == (2, 1, "request", "better", key)
    assert row.verdict is not None
    assert row.verdict["reasons"][2].startswith(
        "F1 0.9500, the champion's 0.9000 (version 1) on the same 93 test scans"
    )


def test_worse_version_is_refused_with_all_reasons(session: Session, three: list[ModelVersion]) -> None:
    with pytest.raises(PromotionRefused) as raised:
        promotion.promote(session, TENANT, "1", POLICY)
    assert raised.value.reasons[2].startswith(
        "It cannot be compared with the champion (version 3): F1 has no paired test."
    )
    assert len(raised.value.reasons) == 7, "two counts of patients, three bounds, and how often the test chose"
    assert "version 1" in str(raised.value)
    assert champion(session) == 3


def test_refusal_without_shared_scans_names_the_remedy(session: Session) -> None:
    first = trained(session, scores(0.9))
    trained(session, scores(0.99, OTHER_SET), PairedScores(first.id, "it could not be scored"))
    with pytest.raises(PromotionRefused) as raised:
        promotion.promote(session, TENANT, "2", POLICY)
    assert raised.value.reasons[2] == (
        "It cannot be compared with the champion (version 1): no test scans were scored with both. "
        "Train anew, or promote it with `force` and a `reason`."
    )


def test_force_promotes_and_records_the_verdict(session: Session, three: list[ModelVersion]) -> None:
    promotion.promote(session, TENANT, "1", POLICY, force=True, reason=f"  {WHY} ")
    assert champion(session) == 1
    row = promotion.promotions(session, TENANT, 1).data[0]
    assert (row.how, row.reason) == ("force", WHY)
    assert row.verdict is not None
    assert row.verdict["promoted"] is False


@pytest.mark.parametrize("reason", [None, "", "  "])
def test_force_needs_a_reason(session: Session, three: list[ModelVersion], reason: str | None) -> None:
    with pytest.raises(Invalid) as raised:
        promotion.promote(session, TENANT, "1", POLICY, force=True, reason=reason)
    assert raised.value.pointer == "/reason"
    assert champion(session) == 3


def test_promoting_the_champion_changes_nothing(session: Session, three: list[ModelVersion]) -> None:
    before = history(session)
    for wanted in ("3", "champion"):
        assert promotion.promote(session, TENANT, wanted, POLICY).version == 3
    assert promotion.promote(session, TENANT, "3", POLICY, force=True, reason=WHY).version == 3
    assert history(session) == before


@pytest.mark.parametrize("wanted", ["9", "0", "-1", "first", ""])
def test_promoting_an_unknown_version_raises_not_found(session: Session, wanted: str) -> None:
    with pytest.raises((ModelNotFound, NoChampion)):
        promotion.promote(session, TENANT, wanted, POLICY)


def test_promotion_notifies_the_dispatcher_at_commit(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for f1 in (0.9, 0.95):
            trained(session, scores(f1))
    with listening(sessions.kw["bind"], UNITS_CHANNEL) as notifications:
        with sessions.begin() as session:
            promotion.rollback(session, TENANT)
            assert notifications.wait(0) == []
        assert notifications.wait(5) == [REGISTRY_SYNC]


# --- rollback ---


def test_two_rollbacks_go_back_two_champions(session: Session, three: list[ModelVersion]) -> None:
    key = new_id()
    assert promotion.rollback(session, TENANT, reason="It misses cysts.", key_id=key).version == 2
    assert promotion.rollback(session, TENANT).version == 1
    with pytest.raises(NothingBefore):
        promotion.rollback(session, TENANT)
    assert champion(session) == 1
    assert history(session)[3:] == [(2, 3, "rollback"), (1, 2, "rollback")]
    row = promotion.promotions(session, TENANT, 10).data[1]
    assert (row.reason, row.by_key) == ("It misses cysts.", key)


def test_rollback_after_force_returns_to_the_replaced_version(session: Session, three: list[ModelVersion]) -> None:
    promotion.promote(session, TENANT, "1", POLICY, force=True, reason=WHY)
    assert promotion.rollback(session, TENANT).version == 3
    assert promotion.rollback(session, TENANT).version == 2


def test_rollback_after_rollback_and_promotion_skips_the_rolled_back_version(
    session: Session, three: list[ModelVersion]
) -> None:
    assert promotion.rollback(session, TENANT).version == 2
    promotion.promote(session, TENANT, "1", POLICY, force=True, reason=WHY)
    assert [promotion.rollback(session, TENANT).version for _ in range(2)] == [2, 1]
    with pytest.raises(NothingBefore):
        promotion.rollback(session, TENANT)


def test_rollback_without_champion_raises(session: Session) -> None:
    with pytest.raises(NoChampion):
        promotion.rollback(session, TENANT)


def test_submitted_jobs_keep_their_pinned_version(session: Session, three: list[ModelVersion]) -> None:
    job = builders.make_job(session, model_id=three[2].id, model_version=3)
    promotion.rollback(session, TENANT)
    assert session.get_one(Job, job.id, populate_existing=True).model_id == three[2].id
    assert registry.resolve(session, TENANT, None).version == 2


def test_champion_without_promotion_gets_one_inserted(session: Session, three: list[ModelVersion]) -> None:
    """During an upgrade an old worker may still promote; it writes no promotion."""
    session.execute(update(ModelVersion).where(ModelVersion.champion).values(champion=False))
    session.execute(update(ModelVersion).where(ModelVersion.version == 1).values(champion=True))
    assert promotion.rollback(session, TENANT).version == 3
    assert history(session)[3:] == [(1, 3, "gate"), (3, 1, "rollback")]
    assert promotion.rollback(session, TENANT).version == 2


# --- the history ---


def test_promotions_page_newest_first(session: Session, three: list[ModelVersion]) -> None:
    first = promotion.promotions(session, TENANT, 2)
    assert ([row.version for row in first.data], first.has_more) == ([3, 2], True)
    assert first.next is not None
    rest = promotion.promotions(session, TENANT, 2, int(first.next))
    assert ([row.version for row in rest.data], rest.has_more, rest.next) == ([1], False, None)


@pytest.mark.parametrize("change", [update(Promotion).values(reason="another"), delete(Promotion)])
def test_promotions_are_append_only(session: Session, three: list[ModelVersion], change: Any) -> None:
    with pytest.raises(IntegrityError, match="is history"):
        session.execute(change)


def test_database_refuses_two_champions(session: Session, three: list[ModelVersion]) -> None:
    with pytest.raises(IntegrityError, match="uq_model_versions_champion"):
        session.execute(update(ModelVersion).where(ModelVersion.version == 1).values(champion=True))


def test_database_refuses_force_without_reason(session: Session, three: list[ModelVersion]) -> None:
    row = Promotion(tenant_id=TENANT, model_id=three[0].id, version=1, how="force")
    session.add(row)
    with pytest.raises(IntegrityError, match="force_has_reason"):
        session.flush()


def test_tenants_have_separate_champions_and_histories(session: Session, three: list[ModelVersion]) -> None:
    other = trained(session, scores(0.86), tenant_id="elsewhere")
    assert (other.version, other.champion, champion(session)) == (1, True, 3)
    assert history(session, "elsewhere") == [(1, None, "gate")]
    for what in (
        lambda: promotion.promote(session, "elsewhere", "3", POLICY, force=True, reason=WHY),
        lambda: comparison.compare(session, "elsewhere", "1", "2"),
    ):
        with pytest.raises(ModelNotFound):
            what()
    with pytest.raises(NothingBefore):
        promotion.rollback(session, "elsewhere")
    assert [row.version for row in promotion.promotions(session, "elsewhere", 10).data] == [1]


# --- many at once ---


def test_fifty_concurrent_changes_keep_one_champion_and_a_consistent_history(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for f1 in (0.90, 0.92, 0.94, 0.96):
            trained(session, scores(f1))
    lots = random.Random(7)
    changes: list[Callable[[Session], ModelVersion]] = [_change(lots) for _ in range(50)]

    def do(change: Callable[[Session], ModelVersion]) -> bool:
        try:
            with sessions.begin() as session:
                change(session)
        except NothingBefore:
            return False
        with sessions() as session:  # in between, too, there is exactly one
            assert len(session.scalars(select(ModelVersion).where(ModelVersion.champion)).all()) == 1
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(do, changes)) > 25
    with sessions() as session:
        rows = session.scalars(select(Promotion).order_by(Promotion.id)).all()
        assert rows[-1].version == champion(session)
        for before, after in pairwise(rows):
            assert after.replaced == before.version, "each one replaced the one before it"
            assert after.version != before.version


def _change(lots: random.Random) -> Callable[[Session], ModelVersion]:
    if lots.random() < 0.5:
        return lambda session: promotion.rollback(session, TENANT, reason=WHY)
    wanted = str(lots.randint(1, 4))
    return lambda session: promotion.promote(session, TENANT, wanted, POLICY, force=True, reason=WHY)


def test_training_ending_during_rollback_is_not_compared_with_an_unmeasured_champion(
    sessions: Sessions,
) -> None:
    with sessions.begin() as session:
        for f1 in (0.90, 0.95):
            trained(session, scores(f1))
    with ThreadPoolExecutor(1) as pool, sessions.begin() as session:
        promotion.rollback(session, TENANT)

        def end() -> str:
            with sessions.begin() as other:
                return str(trained(other, scores(0.97)).gate["reasons"][2])

        ending = pool.submit(end)
        _wait_for_lock(sessions)
        session.commit()
        assert ending.result(10).startswith("It cannot be compared with the champion (version 1)")


def _wait_for_lock(sessions: Sessions) -> None:
    with sessions() as session:
        waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        while not session.scalar(waiting):
            session.rollback()


# --- two versions beside each other ---


def test_comparison_uses_the_largest_shared_test_set(session: Session) -> None:
    first = trained(session, scores(0.9, recall=0.88), params={"epochs": 5, "seed": 7}, environment={"torch": "2.9"})
    second = trained(
        session, scores(0.95), measured(first, 0.7, 0.6),
        params={"epochs": 9, "seed": 7}, environment={"torch": "2.9"}, dataset_digest="e" * 64,
    )  # fmt: skip
    found = comparison.compare(session, TENANT, "1", "champion")
    assert (found.a.id, found.b.id) == (first.id, second.id)
    assert (found.scans, found.test_digest) == (93, ONE_SET)
    assert (found.metrics["f1"], found.metrics["recall"]) == ([0.9, 0.95], [0.88, 0.96])
    assert "roc_auc" not in found.metrics, "neither has it"
    assert found.differences == {
        "params": {"epochs": [5, 9]}, "environment": {}, "dataset": ["d" * 64, "e" * 64],
    }  # fmt: skip
    assert found.note == "Both were scored on the same 93 test scans."


def test_comparison_without_shared_scans_has_no_metrics(session: Session) -> None:
    trained(session, scores(0.9))
    trained(session, scores(0.95, OTHER_SET), code_revision="def")
    found = comparison.compare(session, TENANT, "1", "2")
    assert (found.scans, found.metrics, found.test_digest) == (None, {}, None)
    assert found.differences["code_revision"] == ["abc", "def"]
    assert found.note.startswith("No test scans were scored with both")


def test_versions_without_test_digest_share_no_test_set(session: Session) -> None:
    for _ in range(2):
        trained(session, builders.SCORES)
    assert comparison.compare(session, TENANT, "1", "2").metrics == {}
    assert session.scalars(select(ModelEvaluation)).all() == []


def test_comparing_an_unknown_version_raises_not_found(session: Session) -> None:
    trained(session, scores(0.9))
    with pytest.raises(ModelNotFound):
        comparison.compare(session, TENANT, "1", "2")


def test_paired_scores_of_another_champion_are_ignored(session: Session) -> None:
    first, unknown = trained(session, scores(0.9)), uuid.uuid4()
    assert (
        comparison.missing_reason(first, PairedScores(unknown, "its file cannot be read")) != "its file cannot be read"
    )
    assert (
        comparison.missing_reason(first, PairedScores(first.id, "its file cannot be read")) == "its file cannot be read"
    )
    assert comparison.missing_reason(None, None) is None


def test_scores_of_a_champion_whose_point_was_set_anew_meanwhile_decide_nothing(sessions: Sessions) -> None:
    with sessions.begin() as session:
        first = trained(session, scores(0.95, threshold=0.5))
        beside = measured(first, 0.97, 0.95)
        beside = replace(beside, champion={**scores(0.95, OTHER_SET), "threshold": 0.5})
        first.metrics = {**first.metrics, "threshold": 0.3}
        session.flush()
        second = trained(session, scores(0.97, "3" * 64), beside)
    assert second.gate["promoted"] is False
    assert "operating point was set anew while it trained" in " ".join(second.gate["reasons"])


# --- the same two versions again, and the same test scans again ---


def test_a_replaced_champion_is_held_against_its_successor_by_the_same_paired_test(session: Session) -> None:
    first = trained(session, scores(0.90))
    trained(session, scores(0.91), measured(first, 0.91, 0.90, ONE_SET))
    back = promotion.promote(session, TENANT, "1", POLICY, reason=WHY)
    assert back.version == 1
    verdict = promotion.promotions(session, TENANT, 1).data[0].verdict
    assert verdict is not None
    assert "difference -0.0100, 95 % interval -0.0400 to +0.0200" in verdict["reasons"][2]


def test_how_often_test_scans_have_chosen_is_counted(session: Session, three: list[ModelVersion]) -> None:
    assert [each.gate["reported"]["choices"] for each in three] == [1, 2, 3]
    assert [each.gate["reported"]["value"] for each in three] == [0.90, 0.90, 0.90], "no difference beyond chance"
    assert "Its test scans have now been used for 3 such decisions." in three[2].gate["reasons"]
    other = trained(session, scores(0.95), measured(three[2], 0.93, 0.94, OTHER_SET))
    assert other.gate["reported"] == {"figure": "f1", "value": 0.93, "choices": 1, "test_digest": OTHER_SET}


def test_tenants_and_tasks_do_not_count_each_others_choices(session: Session, three: list[ModelVersion]) -> None:
    assert trained(session, scores(0.9), tenant_id="elsewhere").gate["reported"]["choices"] == 1
