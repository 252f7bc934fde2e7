"""Settings, and their documentation."""

from pathlib import Path

import pytest

from jobs.models import drift
from jobs.settings import Settings, as_markdown

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_settings_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == as_markdown(), "regenerate it: python -m jobs.settings > docs/settings.md"


@pytest.mark.parametrize(("above", "below"), [(0.7, 0.3), (0.5, 0.5)])
def test_empty_indeterminate_range_is_refused(above: float, below: float) -> None:
    with pytest.raises(ValueError, match="RENALQ_INDETERMINATE_ABOVE must be less than"):
        Settings(indeterminate_above=above, indeterminate_below=below)


def test_deliveries_are_kept_longer_than_drift_is_checked() -> None:
    """The delivery prevents a second event: once it is pruned, the event would be sent again."""
    with pytest.raises(ValueError, match="delivery_days"):
        Settings(delivery_days=drift.MONITORED_DAYS)
    assert Settings(delivery_days=drift.MONITORED_DAYS + 1).delivery_days == 3
