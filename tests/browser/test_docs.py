"""The page of all operations, under the policy of the first page."""

import pytest

from tests.browser.conftest import Visit

pytestmark = pytest.mark.slow


def test_swagger_ui_shows_all_operations_and_breaks_no_rule_of_the_policy(visit: Visit) -> None:
    visit.page.goto(f"{visit.url}/v1/docs/")
    visit.page.locator(".opblock").first.click()
    visit.page.get_by_text("A repeated request with the same key").first.wait_for()
    assert visit.page.locator(".opblock").count() > 50
    assert all(url.startswith(visit.url) or url.startswith("data:") for url in visit.requested)
    assert visit.complaints == []
