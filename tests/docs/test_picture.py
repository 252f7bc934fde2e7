"""docs/architecture.svg and the tables of docs/architecture.md are what `make picture` makes of the code."""

from tests.docs import picture

REMEDY = "out of date: run `make picture` and commit docs/architecture.*"


def test_the_committed_picture_equals_the_import_graph() -> None:
    assert picture.SVG.read_text() == picture.svg(), REMEDY


def test_the_committed_tables_equal_the_docstrings_of_the_rooms() -> None:
    committed = picture.TABLES.search(picture.PAGE.read_text())
    assert committed is not None
    assert committed[0] == picture.tables(), REMEDY


def test_every_package_and_room_has_one_sentence() -> None:
    silent = [
        name
        for house in picture.houses().values()
        for name in [house.name, *(room for floor in house.floors for room in floor)]
        if not picture.sentence(name)
    ]
    assert silent == []


def test_rooms_without_a_contract_stand_above_what_they_import() -> None:
    edges = {
        "top": frozenset({"middle"}),
        "middle": frozenset({"low"}),
        "low": frozenset(),
        "other": frozenset({"low"}),
    }
    assert picture.levels(list(edges), edges, [["middle"], ["low"]]) == {"top": 2, "middle": 1, "low": 0, "other": 1}


def test_arrows_that_follow_from_others_are_left_out() -> None:
    edges = {"a": frozenset({"b", "c"}), "b": frozenset({"c"}), "c": frozenset()}
    assert picture.reduced(edges) == [("a", "b"), ("b", "c")]
