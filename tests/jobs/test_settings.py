"""Every setting is documented."""

from pathlib import Path

import pytest

from jobs.models import drift
from jobs.settings import Settings, as_markdown

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_the_document_lists_every_setting_as_it_is() -> None:
    assert DOCUMENT.read_text() == as_markdown(), "write it anew: python -m jobs.settings > docs/settings.md"


@pytest.mark.parametrize(("above", "below"), [(0.7, 0.3), (0.5, 0.5)])
def test_between_negative_and_positive_there_is_room_for_doubt(above: float, below: float) -> None:
    with pytest.raises(ValueError, match="RENALQ_INDETERMINATE_ABOVE must be less than"):
        Settings(indeterminate_above=above, indeterminate_below=below)


def test_deliveries_are_kept_for_longer_than_drift_is_looked_for() -> None:
    """An event is known by its delivery: once that is forgotten, it would be told again."""
    with pytest.raises(ValueError, match="delivery_days"):
        Settings(delivery_days=drift.MONITORED_DAYS)
    assert Settings(delivery_days=drift.MONITORED_DAYS + 1).delivery_days == 3
