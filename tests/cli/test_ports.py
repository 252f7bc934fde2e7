"""The addresses of a stack's parts stay the same, and those of two stacks differ."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cli.stack.launch import CannotStartError
from cli.stack.ports import OFFSETS, choose_ports, require_free
from cli.stack.server_plan import LOOPBACK, free_port
from jobs.settings import Settings


def all_free(port: int) -> bool:
    try:
        for number in (port, *(port + offset + near for offset in OFFSETS.values() for near in (0, 1))):
            require_free(LOOPBACK, number, "")
    except CannotStartError:
        return False
    return True


@pytest.fixture
def settings() -> Settings:
    """Where no port of a stack, and none of a stack beside it, is taken."""
    return Settings(port=next(port for port in iter(free_port, None) if all_free(port)))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "ports.json"


@pytest.fixture
def flower_taken(settings: Settings) -> Iterator[int]:
    """Somebody else listens on Flower's default port."""
    with closing(socket.create_server((LOOPBACK, settings.port + OFFSETS["flower"]))) as other:
        yield other.getsockname()[1]


def test_the_defaults_are_counted_from_the_apis_port(settings: Settings, kept: Path) -> None:
    expected = {name: settings.port + offset for name, offset in OFFSETS.items()}
    assert choose_ports(settings, OFFSETS, kept) == expected


def test_stacks_on_neighbouring_ports_do_not_meet(settings: Settings, tmp_path: Path) -> None:
    beside = settings.model_copy(update={"port": settings.port + 1})
    one, other = (choose_ports(each, OFFSETS, tmp_path / f"{each.port}") for each in (settings, beside))
    assert other == {name: port + 1 for name, port in one.items()}
    assert len({settings.port, beside.port, *one.values(), *other.values()}) == 10


def test_a_taken_port_is_replaced_and_its_replacement_kept(settings: Settings, kept: Path, flower_taken: int) -> None:
    first = choose_ports(settings, OFFSETS, kept)
    assert first["flower"] != flower_taken
    assert choose_ports(settings, OFFSETS, kept) == first


def test_a_kept_port_stays_while_the_apis_port_does(settings: Settings, kept: Path) -> None:
    kept.write_text(json.dumps({"renalq": settings.port, "flower": (drawn := free_port())}))
    assert choose_ports(settings, OFFSETS, kept)["flower"] == drawn
    elsewhere = settings.model_copy(update={"port": settings.port + 1})
    assert choose_ports(elsewhere, ["flower"], kept)["flower"] == elsewhere.port + OFFSETS["flower"]


def test_a_start_without_flower_keeps_its_port(settings: Settings, kept: Path) -> None:
    first = choose_ports(settings, OFFSETS, kept)
    assert choose_ports(settings, ["redis"], kept) == {"redis": first["redis"]}
    assert json.loads(kept.read_text())["flower"] == first["flower"]


def test_a_port_that_is_set_is_used_or_the_refusal_names_its_setting(
    settings: Settings, kept: Path, flower_taken: int
) -> None:
    mine = settings.model_copy(update={"mlflow_port": (wanted := free_port())})
    assert choose_ports(mine, OFFSETS, kept)["mlflow"] == wanted
    with pytest.raises(CannotStartError, match="set RENALQ_FLOWER_PORT to a free port"):
        choose_ports(settings.model_copy(update={"flower_port": flower_taken}), OFFSETS, kept)
    twice = settings.model_copy(update={"postgres_port": wanted, "redis_port": wanted})
    with pytest.raises(CannotStartError, match="RENALQ_REDIS_PORT and the port of postgres are both"):
        choose_ports(twice, OFFSETS, kept)


def test_a_default_gives_way_to_a_port_that_is_set(settings: Settings, kept: Path) -> None:
    redis = settings.port + OFFSETS["flower"]
    chosen = choose_ports(settings.model_copy(update={"redis_port": redis}), OFFSETS, kept)
    assert (chosen["redis"], len(set(chosen.values()))) == (redis, 4)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"renalq": {}}'])
def test_a_damaged_file_is_as_none(settings: Settings, kept: Path, content: str) -> None:
    kept.write_text(content)
    assert choose_ports(settings, ["redis"], kept) == {"redis": settings.port + OFFSETS["redis"]}


def test_beyond_the_last_port_one_is_drawn(kept: Path) -> None:
    assert choose_ports(Settings(port=65_500), ["redis"], kept)["redis"] < 65_500
