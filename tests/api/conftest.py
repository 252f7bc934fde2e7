"""The real application on the test's own Postgres, and clients with keys of their own."""

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
from flask import Flask
from flask.testing import FlaskClient

from cli.stack.server_plan import free_port
from jobs import keys
from jobs.db import Sessions
from jobs.models import promotion
from jobs.models.gate import GatePolicy
from jobs.models.registry import NewModel
from jobs.queue import lifecycle
from jobs.settings import Settings
from jobs.tables import Job, ModelVersion
from tests import builders
from tests.applications import application
from tests.databases import Database
from tests.processes import ROOT, eventually

ALL_SCOPES = ["jobs:read", "jobs:write", "models:write", "admin"]


@pytest.fixture
def app(settings: Settings, database: Database) -> Iterator[Flask]:
    """The application."""
    with application(settings, database.sessions(settings.db_pool, "renalq-api")) as app:
        yield app


@dataclass(frozen=True)
class Door:
    """Makes clients whose every request carries a key."""

    app: Flask
    sessions: Sessions

    def client(self, *scopes: str, tenant_id: str = builders.TENANT) -> FlaskClient:
        """A client with a new key."""
        with self.sessions.begin() as session:
            secret = keys.create(session, "test", scopes or ALL_SCOPES, tenant_id).secret
        client = self.app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {secret}"
        return client


@pytest.fixture
def door(app: Flask, sessions: Sessions) -> Door:
    """Makes clients."""
    return Door(app, sessions)


@pytest.fixture
def client(door: Door) -> FlaskClient:
    """A client that may do everything in its tenant."""
    return door.client()


@pytest.fixture
def stranger(door: Door) -> FlaskClient:
    """A client of another tenant that may do everything there."""
    return door.client(tenant_id="elsewhere")


@pytest.fixture
def champion(sessions: Sessions, settings: Settings) -> ModelVersion:
    """A champion, made by a training."""
    builders.store_weights(settings)
    with sessions.begin() as session:
        job = builders.make_job(session)
        held = builders.claim(session, builders.units_of(session, job)[0])
        new = NewModel(builders.WEIGHTS, ["Normal", "Tumor"], {"epochs": 2}, builders.SCORES, "d" * 64, "abc123")
        made = promotion.register(session, held, new, GatePolicy())
        lifecycle.succeed(session, held, metrics={"accuracy": 0.97, "f1": 0.97})
    return made


def png(width: int = 8, height: int = 8, shade: int = 0, declared: tuple[int, int] | None = None) -> bytes:
    """A grey PNG; `declared` writes other sizes into its header than it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *(declared or (width, height)), 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes([shade]) * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zipped(members: dict[str, bytes] | list[tuple[str, bytes]], compress: bool = True) -> bytes:
    """A zip: the same bytes for the same members, whatever the clock says."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(zipfile.ZipInfo(name), data, archive.compression)
    return content.getvalue()


def dicom(rows: int = 16, columns: int = 12, deflate: bool = False, syntax: bytes = b"") -> bytes:
    """A DICOM file with a header and zeros for pixels, explicit little endian."""

    def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        return struct.pack("<HH2sH", group, number, kind, len(value)) + value

    uid = b"1.2.840.10008.1.2.1.99" if deflate else (syntax or b"1.2.840.10008.1.2.1")
    meta = element(0x0002, 0x0010, b"UI", uid)
    size = element(0x0028, 0x0010, b"US", struct.pack("<H", rows)) + element(
        0x0028, 0x0011, b"US", struct.pack("<H", columns)
    )
    body = element(0x0008, 0x0060, b"CS", b"CT") + size
    if deflate:
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = packer.compress(body) + packer.flush()
    return bytes(128) + b"DICM" + element(0x0002, 0x0000, b"UL", struct.pack("<I", len(meta))) + meta + body


def file(content: bytes, name: str = "scan.png") -> tuple[io.BytesIO, str]:
    """A file for a multipart body."""
    return io.BytesIO(content), name


class Server:
    """The API as it runs in service, on a port of its own.

    Args:
        descriptors: limit of open files; None: this process' own.
    """

    def __init__(self, settings: Settings, descriptors: int | None = None) -> None:
        self._settings, self._process = settings, None
        self._limit = [] if descriptors is None else ["prlimit", f"--nofile={descriptors}"]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        command = [*self._limit, sys.executable, "-m", "gunicorn", "-c", "api/gunicorn_conf.py"]
        command += ["--bind", f"127.0.0.1:{self.port}"]
        fields = self._settings.model_dump(mode="json", exclude_none=True)
        environ = {**os.environ, **{f"RENALQ_{name.upper()}": str(value) for name, value in fields.items()}}
        path = self._settings.home / "api.log"
        with path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "api:create_app()"], cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        eventually(self._answers, 30, path.read_text)

    @property
    def pid(self) -> int:
        """Of the process that was started; its children belong to it."""
        return self._process.pid

    def kill(self) -> None:
        """kill -9, with its worker."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def server(settings: Settings, sessions: Sessions) -> Iterator[Server]:
    """The API as it runs in service."""
    server = Server(settings)
    server.start()
    yield server
    server.kill()


Finish = Callable[[str], None]


@pytest.fixture
def finish(sessions: Sessions) -> Finish:
    """Does what a worker would: every unit of a job, well."""

    def run(job_id: str) -> None:
        with sessions.begin() as session:
            for unit in builders.units_of(session, session.get_one(Job, uuid.UUID(job_id))):
                held = builders.claim(session, unit)
                lifecycle.succeed(session, held, outcomes=builders.outcomes_of(session, held))

    return run
