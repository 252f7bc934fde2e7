"""The first page on the whole stack: a real network answers."""

from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from ml.synthetic.phantom import generate
from ml.synthetic.phantom_files import dicom_bytes, png_bytes
from tests.browser.conftest import visiting
from tests.e2e.conftest import Client

pytestmark = [pytest.mark.slow, pytest.mark.scaled, pytest.mark.timeout(900)]


def test_a_scan_gets_class_confidence_and_heatmap(client: Client, trained: dict[str, Any], browser: Browser) -> None:
    (image,) = generate(patients=1, slices=1, seed=7)
    files: list[Any] = [
        {"name": "a.png", "mimeType": "image/png", "buffer": png_bytes(image)},
        {"name": "b.dcm", "mimeType": "application/dicom", "buffer": dicom_bytes(image)},
    ]
    with visiting(browser, client.url, client.key) as visit:
        page = visit.page
        page.set_default_timeout(60_000)
        visit.enter()
        champion = client.get("/models/champion").json()["version"]
        expect(page.locator("#champion-version")).to_have_text(f"version {champion}")
        page.set_input_files("#files", files)
        for place in range(2):
            card = page.locator(".scan").nth(place)
            expect(card).to_have_attribute("data-state", "done", timeout=60_000)
            expect(card.locator(".disposition")).not_to_be_empty()
            expect(card.locator(".classes li")).to_have_count(2)
            expect(card.get_by_role("img", name="with a heatmap")).to_be_visible()
        expect(page.locator(".job").first).to_contain_text("Prediction")
