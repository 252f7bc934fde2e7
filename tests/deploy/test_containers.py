"""The container files, as far as they can be checked without an engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.mark.parametrize("name", ["Dockerfile.api", "Dockerfile.worker"])
def test_the_dockerfiles_pass_their_linter(name: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_names_every_process_of_the_stack() -> None:
    ends = {"roles", "migrate"}
    lasts = {"postgres", "redis", "api", "proxy", "dispatcher", "worker-predict", "worker-train", "mlflow", "flower"}
    assert set(COMPOSE["services"]) == ends | lasts


def test_each_database_role_is_known_to_those_alone_who_need_it() -> None:
    knows = {
        word: {name for name, service in COMPOSE["services"].items() if f"{word}:?" in str(service)}
        for word in ("POSTGRES_PASSWORD", "OWNER_PASSWORD", "MLFLOW_STORE_PASSWORD")
    }
    assert knows == {
        "POSTGRES_PASSWORD": {"postgres", "roles"},
        "OWNER_PASSWORD": {"roles", "migrate"},
        "MLFLOW_STORE_PASSWORD": {"roles", "mlflow"},
    }
    application = {name for name, service in COMPOSE["services"].items() if "APP_PASSWORD:?" in str(service)}
    assert application == {"roles", "api", "dispatcher", "worker-predict", "worker-train", "flower"}


def test_mlflow_has_a_volume_of_its_own_and_no_other() -> None:
    volumes = {name: service.get("volumes", []) for name, service in COMPOSE["services"].items()}
    assert volumes["mlflow"] == ["mlflow:/var/lib/mlflow"]
    assert [name for name, mounted in volumes.items() if any(each.startswith("mlflow:") for each in mounted)] == [
        "mlflow"
    ]


def test_every_service_that_lasts_is_watched() -> None:
    for name, service in COMPOSE["services"].items():
        watched = "healthcheck" in service or service.get("image") == "renalq-api"  # its Dockerfile brings one
        assert watched, f"{name} has no healthcheck"


def test_every_log_is_bounded() -> None:
    for name, service in COMPOSE["services"].items():
        assert set(service.get("logging", {}).get("options", {})) == {"max-size", "max-file"}, f"{name} fills the disk"


def test_only_the_proxy_is_reachable_from_other_machines() -> None:
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert name == "proxy" or port.startswith("127.0.0.1:"), f"{name} publishes {port} to everybody"


def test_no_password_stands_in_the_files() -> None:
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            secret = "PASSWORD" in name or name.endswith("_AUTH") or "@" in str(value)
            assert not secret or ":?set it in .env}" in value, f"{name} holds a secret of its own"
    for line in (ROOT / "deploy" / "env.example").read_text().splitlines():
        assert "PASSWORD" not in line or line.endswith("=")


def test_every_lane_has_a_worker() -> None:
    from jobs.states import Lane

    lanes = {
        lane
        for service in COMPOSE["services"].values()
        for queues in [re.search(r"-Q (\S+)", " ".join(service.get("command", [])))]
        if queues
        for lane in queues[1].split(",")
    }
    assert lanes == {lane.value for lane in Lane}


def test_every_module_that_a_container_runs_exists() -> None:
    from importlib.util import find_spec

    for service in COMPOSE["services"].values():
        command = service.get("command", [])
        if command[:2] == ["python", "-m"]:
            assert find_spec(command[2]), command


def test_what_the_images_copy_exists_and_reaches_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in ("Dockerfile.api", "Dockerfile.worker"):
        for sources in re.findall(r"^COPY (.+) \S+$", (ROOT / name).read_text(), re.MULTILINE):
            for source in sources.split():
                assert (ROOT / source).exists(), source
                assert f"!{source.partition('/')[0]}" in ignored, f"{source} is kept from the build by .dockerignore"
