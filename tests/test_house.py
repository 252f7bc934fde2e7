"""The house: no circles of files, small files, small folders, small functions, and a sentence for each room."""

import ast
import statistics
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("api", "cli", "jobs", "ml", "worker")
FOLDERS = (*PACKAGES, "bench")  # migrations are one file a revision
MOST_LINES, MOST_FILES = 400, 15


def files(*folders: str) -> list[Path]:
    """All modules below these folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_imports_itself_through_others() -> None:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' → '.join(error.args[1])}")


def test_a_file_fits_in_a_head() -> None:
    sizes = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in files(*PACKAGES, "bench")}
    assert {path: lines for path, lines in sizes.items() if lines > MOST_LINES} == {}


def test_a_folder_has_rooms_before_it_is_full() -> None:
    folders = {path.parent for path in files(*FOLDERS)} - {ROOT / "migrations" / "versions"}  # a history only grows
    counts = {folder.relative_to(ROOT): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def _lengths() -> Iterator[int]:
    for path in files(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1


def test_half_of_the_functions_have_seven_lines_at_most() -> None:
    assert statistics.median(_lengths()) <= 7


@pytest.mark.parametrize("room", [path for path in files(*PACKAGES) if path.name == "__init__.py"], ids=str)
def test_each_room_says_in_a_sentence_what_it_is(room: Path) -> None:
    sentence = (ast.get_docstring(ast.parse(room.read_text())) or "").split("\n\n")[0]
    assert sentence.endswith((".", ":"))
    assert len(sentence) < 250
