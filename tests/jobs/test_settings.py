"""Every setting is documented."""

from pathlib import Path

from jobs.settings import as_markdown

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def test_the_document_lists_every_setting_as_it_is() -> None:
    assert DOCUMENT.read_text() == as_markdown(), "write it anew: python -m jobs.settings > docs/settings.md"
