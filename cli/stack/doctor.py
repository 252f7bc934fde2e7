"""`renalq doctor`: check what is installed and reachable, and say in one line each what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from cli.stack.launch import CannotStartError
from cli.stack.postgres import postgres_binaries, postgres_version
from cli.stack.redis_server import ask_redis, redis_binary
from cli.stack.services import REPOSITORY
from jobs import stack_state
from jobs.settings import Settings

GIB = 1024**3
LOW_DISK, MIN_DISK = 10 * GIB, 2 * GIB
IMAGENET_FILES = "vgg16-????????.pth"
PROBE_SECONDS = 120

# Runs in its own process: this package must not import torch, and a broken install must not break the doctor.
_PROBE = """
import json, os, platform
found = {}
try:
    import torch
    found["torch"] = torch.__version__
    found["threads"] = torch.get_num_threads()
    found["hub"] = torch.hub.get_dir()
    found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    try:
        from ml.runtime import torchvision_import
        found["torchvision"] = torchvision_import.torchvision().__version__
        found["declared"] = torchvision_import.operators_declared()
    except Exception as error:
        found["torchvision_error"] = f"{type(error).__name__}: {error}"
except Exception as error:
    found["torch_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line: the subject, what was found, and what to do (empty if nothing)."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


def _ok(subject: str, text: str) -> Finding:
    return Finding(Level.OK, subject, text)


def _warning(subject: str, text: str, remedy: str) -> Finding:
    return Finding(Level.WARNING, subject, text, remedy)


def _problem(subject: str, text: str, remedy: str) -> Finding:
    return Finding(Level.PROBLEM, subject, text, remedy)


def findings(settings: Settings) -> Iterator[Finding]:
    """All findings, each as soon as it is known."""
    yield python_version()
    probed = probe()
    yield torch_found(probed)
    yield torchvision_found(probed)
    yield weights(settings, probed)
    yield disk(settings)
    yield port(settings)
    yield postgres(settings)
    yield redis(settings)
    yield from (optional(name, use) for name, use in _OPTIONAL.items())


_OPTIONAL = {"mlflow": "runs are not tracked", "flower": "queues are not shown"}


def python_version() -> Finding:
    """Its version: RenalQ cannot be installed into one that is too old."""
    return _ok("Python", f"{sys.version.split()[0]} in {sys.prefix}")


def probe() -> dict[str, Any]:
    """What a new process finds of torch and torchvision."""
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS, cwd=REPOSITORY
        )
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"torch_error": f"the probe failed: {type(error).__name__}"}


def torch_found(probed: dict[str, Any]) -> Finding:
    """The version of torch and its device."""
    if "torch_error" in probed:
        return _problem("torch", probed["torch_error"], "run make setup: it installs the extra [worker]")
    device = probed["device"] if probed["device"] != "cpu" else f"CPU, {probed['threads']} threads"
    return _ok("torch", f"{probed['torch']} on {device}")


def torchvision_found(probed: dict[str, Any]) -> Finding:
    """The version of torchvision, and whether its compiled operators load."""
    subject = "torchvision"
    if "torchvision" not in probed:
        return _problem(subject, probed.get("torchvision_error", "not looked at: no torch"), "run make setup")
    if probed["declared"]:
        text = "its compiled operators do not load beside this torch; stand-ins are declared, none of ours is needed"
        return _ok(subject, f"{probed['torchvision']}: {text}")
    return _ok(subject, f"{probed['torchvision']} with its compiled operators")


def weights(settings: Settings, probed: dict[str, Any]) -> Finding:
    """The ImageNet weights, which only `weights: imagenet` needs."""
    hub = Path(probed["hub"]) / "checkpoints" if "hub" in probed else None
    for folder in (settings.weights, hub):
        for path in sorted(folder.glob(IMAGENET_FILES)) if folder is not None else ():
            return _ok("weights", str(path))
    return _warning(
        "weights",
        "no ImageNet weights here yet",
        f"run renalq weights fetch vgg16, which brings them to {settings.weights} or tells what to copy there; "
        "or train with weights: none",
    )


def disk(settings: Settings) -> Finding:
    """Free space where RENALQ_HOME lies."""
    place = settings.home.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free for {settings.home.resolve()}"
    if free < MIN_DISK:
        return _problem("disk", text, "free some, or set RENALQ_HOME to a larger disk: a network takes 0.5 GiB")
    if free < LOW_DISK:
        return _warning("disk", text, "enough for a few trainings: a network takes 0.5 GiB")
    return _ok("disk", text)


def port(settings: Settings) -> Finding:
    """Whether the API can listen. A running stack of this home may have the port."""
    place = f"{settings.host}:{settings.port}"
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((settings.host, settings.port))
        except OSError as error:
            if stack_state.read(settings.home) is not None:
                return _ok("port", f"{place} is taken, by the stack that runs in {settings.home.resolve()}")
            return _problem("port", f"{place}: {error.strerror}", "set RENALQ_PORT to a free port")
    return _ok("port", f"{place} is free")


def postgres(settings: Settings) -> Finding:
    """The given server, or else the installed binaries."""
    if "database_url" in settings.model_fields_set:
        return _given(settings.database_url, "Postgres", "RENALQ_DATABASE_URL", postgres_version)
    try:
        folder = postgres_binaries()
    except CannotStartError as error:
        return _problem("Postgres", "none", str(error))
    return _binary("Postgres", folder / "postgres")


def redis(settings: Settings) -> Finding:
    """The given server, or else the installed binary."""
    if "redis_url" in settings.model_fields_set:
        return _given(settings.redis_url, "Redis", "RENALQ_REDIS_URL", _redis_version)
    try:
        return _binary("Redis", redis_binary())
    except CannotStartError as error:
        return _problem("Redis", "none", str(error))


def _given(url: str, subject: str, variable: str, version: Callable[[str], str]) -> Finding:
    try:
        shown = make_url(url).render_as_string(hide_password=True)
        return _ok(subject, f"{version(url)} at {shown}")
    except ArgumentError:
        return _problem(subject, f"{variable} is no URL", "write it as in docs/settings.md")
    except (psycopg2.Error, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return _problem(subject, f"{shown}: {reason}", f"start that server, or unset {variable} to use our own")


def _redis_version(url: str) -> str:
    lines = ask_redis(url, "INFO server").splitlines()
    for line in lines:
        if line.startswith(("redis_version:", "valkey_version:")):
            return line.partition(":")[2]
    raise OSError(lines[0].lstrip("-+") if lines else "nobody answers")


def _binary(subject: str, program: Path) -> Finding:
    """Its version, or why it does not run."""
    try:
        done = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return _problem(subject, f"{program} does not run: {error}", "run make setup again, or name a server by URL")
    words = done.stdout.split()
    version = next((word.removeprefix("v=") for word in words if word.removeprefix("v=")[:1].isdigit()), "?")
    return _ok(subject, f"{version} from {program}")


def optional(package: str, without: str) -> Finding:
    """Whether an optional package is installed; the stack runs without it."""
    name = package.capitalize() if package != "mlflow" else "MLflow"
    if importlib.util.find_spec(package) is None:
        return _warning(name, f"not installed: {without}", "run make setup")
    from importlib.metadata import version

    return _ok(name, version(package))


def doctor(machine: bool) -> int:
    """Print all findings. Returns 1 if one is a problem."""
    from rich.console import Console

    console, worst = Console(), Level.OK
    colours = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
    listed = []
    for found in findings(Settings()):
        listed.append({**found.__dict__, "level": found.level.value})
        worst = Level.PROBLEM if Level.PROBLEM in (worst, found.level) else worst
        if not machine:
            remedy = f" → {found.remedy}" if found.remedy else ""
            line = f"[{colours[found.level]}]{found.level:<8}[/] {found.subject:<12} "
            console.print(line, end="", highlight=False)
            console.print(found.text + remedy, highlight=False, markup=False, soft_wrap=True)
    if machine:
        print(json.dumps(listed, indent=2))
    return 1 if worst is Level.PROBLEM else 0
