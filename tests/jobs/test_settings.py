"""Every setting is documented."""

from pathlib import Path

import pytest

from jobs.settings import Settings, as_markdown

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_the_document_lists_every_setting_as_it_is() -> None:
    assert DOCUMENT.read_text() == as_markdown(), "write it anew: python -m jobs.settings > docs/settings.md"


@pytest.mark.parametrize(("above", "below"), [(0.7, 0.3), (0.5, 0.5)])
def test_between_negative_and_positive_there_is_room_for_doubt(above: float, below: float) -> None:
    with pytest.raises(ValueError, match="RENALQ_INDETERMINATE_ABOVE must be less than"):
        Settings(indeterminate_above=above, indeterminate_below=below)
