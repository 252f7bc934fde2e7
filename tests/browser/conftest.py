"""A real browser at the API as it runs in service. A thread stands in for the worker."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response

from jobs import keys
from jobs.db import Sessions
from jobs.queue import explanations
from jobs.queue.leases import Claim
from jobs.queue.outcomes import ScanOutcome
from jobs.settings import Settings
from jobs.storage.blobs import BlobStore
from tests.api.conftest import Server, champion, png  # noqa: F401  (a fixture)
from tests.databases import Database, Databases
from tests.processes import small_settings

SCAN = ("DOE^JANE-19460229.png", "image/png", png(64, 64, 60))
REFUSED = "Failed to load resource"
"""How the console tells of an answer that is no 2xx: a 4xx the page puts into words, and of a 5xx `answered` hears."""


def one(**outcome: Any) -> Callable[[list[int]], list[ScanOutcome]]:
    """What a worker would find in each scan."""
    found = {"label": "Tumor", "confidence": 0.9456, "probabilities": {"Normal": 0.0544, "Tumor": 0.9456}, **outcome}
    return lambda ordinals: [ScanOutcome(ordinal, engine="torch-fp32", **found) for ordinal in ordinals]


@dataclass
class Visit:
    """A tab at the first page, and what it did."""

    page: Page
    url: str
    key: str
    complaints: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)

    def enter(self) -> None:
        """Open the page with the key."""
        self.page.goto(self.url)
        self.open(self.key)

    def open(self, key: str) -> None:
        """Give the page that is there this key."""
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Open").click()
        self.page.get_by_role("heading", name="Jobs").wait_for()

    def drop(self, *files: tuple[str, str, bytes]) -> None:
        """Drop files (name, kind, content) onto the zone."""
        listed = [{"name": name, "kind": kind, "bytes": list(content)} for name, kind, content in files]
        self.page.locator("#drop").evaluate(DROP, listed)

    def heard(self, message: ConsoleMessage) -> None:
        """The console has said something."""
        if message.type in ("error", "warning") and REFUSED not in message.text:
            self.complaints.append(message.text)

    def answered(self, response: Response) -> None:
        """The page has got an answer."""
        if response.status >= 500:
            self.complaints.append(f"{response.status} {response.url}")

    def asked(self, request: Request) -> None:
        """The page has asked for something."""
        self.requested.append(request.url)


DROP = """(zone, files) => {
  const dataTransfer = new DataTransfer();
  for (const { name, kind, bytes } of files) {
    dataTransfer.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
  }
  zone.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="session")
def kept(databases: Databases) -> Iterator[Database]:
    """The database of the server."""
    with databases.borrow() as borrowed:
        yield borrowed


@pytest.fixture(scope="session")
def settings(kept: Database, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The server's settings."""
    return small_settings(tmp_path_factory.mktemp("browser"), kept.url, redis_url)


@pytest.fixture(scope="session")
def server(settings: Settings) -> Iterator[Server]:
    """The API as it runs in service, for all tests: each begins with an empty database."""
    server = Server(settings)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def database(kept: Database) -> Database:
    """The server's database, emptied."""
    kept.clear()
    return kept


@pytest.fixture
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How the tab is opened: a test sets it by indirect parameters."""
    return dict(getattr(request, "param", {}))


@contextmanager
def visiting(browser: Browser, url: str, key: str, **options: Any) -> Iterator[Visit]:
    """A tab. At its end nothing has failed in it, broken its policy, or asked another host for anything."""
    context = browser.new_context(**options)
    try:
        visit = Visit(context.new_page(), url, key)
        visit.page.set_default_timeout(15_000)
        visit.page.on("console", visit.heard)
        visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        visit.page.on("request", visit.asked)
        visit.page.on("response", visit.answered)
        yield visit
    finally:
        context.close()
    assert visit.complaints == []
    assert [url for url in visit.requested if not url.startswith((visit.url, f"blob:{visit.url}"))] == []


@pytest.fixture
def visit(browser: Browser, server: Server, sessions: Sessions, options: dict[str, Any]) -> Iterator[Visit]:
    """A tab at the server."""
    with sessions.begin() as session:
        secret = keys.create(session, "browser", ["jobs:read", "jobs:write"]).secret
    with visiting(browser, server.url, secret, **options) as visit:
        yield visit


@dataclass(frozen=True)
class Overlay:
    """Keeps an overlay of the claimed unit's first scan, as a worker does."""

    sessions: Sessions
    settings: Settings

    def __call__(self, held: Claim) -> None:
        blob = BlobStore(self.settings.artifacts).put(io.BytesIO(png(64, 64, 90)))
        with self.sessions.begin() as session:
            explanations.save(session, held, [(explanations.artifact_name(0), blob)])


@pytest.fixture
def overlay(sessions: Sessions, settings: Settings) -> Overlay:
    """Keeps an overlay."""
    return Overlay(sessions, settings)
