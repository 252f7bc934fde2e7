"""Learning rate schedules, best epoch and early stopping."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.image.learning.schedules import Phase, best_epoch, gain, is_over, learning_rate, phases
from ml.runtime.events import Epoch
from ml.spec.image import Params
from tests.ml.builders import make_params

RATE = 0.1


def make_phase(epochs: int = 10) -> Phase:
    return Phase("head", 0, epochs, RATE)


def make_history(*losses: float, phase: str = "head") -> list[Epoch]:
    """Epochs with these validation losses; accuracy and F1 contradict each other."""
    return [
        Epoch(number, len(losses), 1.0, 0.5, loss, 1 - loss / 10, RATE, 1.0, loss / 10, phase)
        for number, loss in enumerate(losses, start=1)
    ]


def rates(params: Params, epochs: int = 10, steps: int = 4) -> list[float]:
    """The learning rates of all steps of a phase in which no epoch improves."""
    history = make_history(*[1.0] * epochs)
    progress = [step / steps for step in range(epochs * steps)]
    return [learning_rate(params, make_phase(epochs), done, history[: int(done)]) for done in progress]


def test_constant_is_constant():
    assert set(rates(make_params())) == {RATE}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "plateau"])
def test_warm_up_rises_evenly_to_the_rate(schedule):
    found = rates(make_params(schedule=schedule, warmup_epochs=2, step_epochs=100))
    rising = found[:8]
    assert rising == sorted(rising)
    assert 0 < rising[0] < 0.1 * RATE
    assert rising[4] == pytest.approx(RATE / 2)
    assert found[8] == pytest.approx(RATE)


def test_a_warm_up_as_long_as_the_training_still_reaches_the_rate():
    assert max(rates(make_params(warmup_epochs=50), epochs=3)) == pytest.approx(RATE)
    assert rates(make_params(warmup_epochs=50), epochs=1) == [RATE] * 4


def test_cosine_falls_by_half_in_the_middle_and_to_nothing_at_the_end():
    found = rates(make_params(schedule="cosine"))
    assert found == sorted(found, reverse=True)
    assert found[0] == RATE
    assert found[20] == pytest.approx(RATE / 2)
    assert found[-1] < 0.01 * RATE
    assert learning_rate(make_params(schedule="cosine"), make_phase(), 10.0, []) == pytest.approx(0, abs=1e-12)


def test_step_falls_by_gamma_every_so_many_epochs_after_the_warm_up():
    found = rates(make_params(schedule="step", step_epochs=3, gamma=0.5, warmup_epochs=1), steps=1)
    assert found[1:] == pytest.approx([RATE] * 3 + [RATE / 2] * 3 + [RATE / 4] * 3)


def test_plateau_falls_after_so_many_epochs_without_gain():
    params = make_params(schedule="plateau", step_epochs=2, gamma=0.1)

    def rate_after(*losses: float) -> float:
        return learning_rate(params, make_phase(), len(losses), make_history(*losses))

    assert rate_after(1.0, 0.9, 0.8) == RATE
    assert rate_after(1.0, 0.9, 0.95) == RATE
    assert rate_after(1.0, 0.9, 0.95, 0.91) == pytest.approx(RATE / 10)
    assert rate_after(1.0, 0.9, 0.95, 0.91, 0.92, 0.93) == pytest.approx(RATE / 100)
    assert rate_after(1.0, 0.9, 0.95, 0.91, 0.5) == pytest.approx(RATE / 10)
    assert rate_after(1.0, 0.99999, 0.99998) == pytest.approx(RATE / 10)  # such gains are noise


@given(
    schedule=st.sampled_from(["constant", "cosine", "step", "plateau"]),
    warmup=st.integers(0, 20), epochs=st.integers(1, 30), step=st.integers(1, 10),
    losses=st.lists(st.floats(0, 5), max_size=30), progress=st.floats(0, 1),
)  # fmt: skip
def test_a_rate_is_never_negative_nor_above_the_phases(schedule, warmup, epochs, step, losses, progress):
    params = make_params(schedule=schedule, warmup_epochs=warmup, step_epochs=step)
    rate = learning_rate(params, make_phase(epochs), progress * epochs, make_history(*losses))
    assert 0 <= rate <= RATE * (1 + 1e-9)
    assert math.isfinite(rate)


# --- phases ----------------------------------------------------------------------------------------------------------


def test_tuning_is_a_second_phase_with_its_own_rate():
    assert phases(make_params(epochs=3)) == (Phase("head", 0, 3, 0.01),)
    tuned = phases(make_params(epochs=3, fine_tune_epochs=4, fine_tune_blocks=2))
    assert tuned == (Phase("head", 0, 3, 0.01), Phase("fine_tune", 2, 4, 0.001))
    assert phases(make_params(fine_tune_epochs=1, fine_tune_learning_rate=0.5))[1].rate == 0.5


# --- the best epoch, and the end -------------------------------------------------------------------------------------


def test_the_best_epoch_is_the_first_of_the_best():
    history = make_history(1.0, 0.5, 0.5, 0.7)
    assert best_epoch(make_params(), history) == 2
    assert best_epoch(make_params(monitor="val_accuracy"), history) == 2
    assert best_epoch(make_params(monitor="val_f1"), history) == 1
    assert best_epoch(make_params(keep="last"), history) == 4
    assert best_epoch(make_params(), []) == 0


def test_an_epoch_without_f1_is_no_better_than_nothing():
    assert gain(make_params(monitor="val_f1"), Epoch(1, 1, 0.1, 0.5, 0.1, 0.5, 0.1, 1.0)) == 0.0


def test_patience_counts_from_the_best_epoch_of_the_phase():
    params = make_params(patience=2)
    assert not is_over(params, make_phase(), make_history(1.0, 0.5, 0.6))
    assert is_over(params, make_phase(), make_history(1.0, 0.5, 0.6, 0.5))
    assert not is_over(params, make_phase(), make_history(1.0, 0.5, 0.6, 0.4))
    assert not is_over(params, make_phase(), [])
    tuning = Phase("fine_tune", 1, 5, RATE)
    assert not is_over(params, tuning, make_history(0.1, 0.5, 0.6, 0.7))
    assert not is_over(params, tuning, [*make_history(0.1), *make_history(0.9, 0.8, 0.85, phase="fine_tune")])
    assert is_over(params, tuning, [*make_history(0.1), *make_history(0.9, 0.95, 0.91, phase="fine_tune")])


def test_without_patience_only_the_number_of_epochs_ends_a_phase():
    assert not is_over(make_params(), make_phase(5), make_history(0.1, 1.0, 2.0, 3.0))
    assert is_over(make_params(), make_phase(5), make_history(0.1, 1.0, 2.0, 3.0, 4.0))
