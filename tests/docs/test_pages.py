"""What the pages of the documentation name exists, and their prose has the width of the house."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WIDTH = 100

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"`((?:api|jobs|worker|ml|cli|migrations|bench|tests|docs|deploy|config)/[a-z0-9_./-]+)`")
TARGET = re.compile(r"(?:^|`)make ([a-z]+(?:-[a-z]+)*)(?![-\w])", re.MULTILINE)
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@PAGE
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@PAGE
def test_every_path_that_is_named_exists(page: Path) -> None:
    if page.name != "CHANGELOG.md":  # it names what was there once
        assert [path for path in PATH.findall(prose(page)) if not (ROOT / path).exists()] == []


@PAGE
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files, rooms = (ROOT / "bench").glob("*.py"), (ROOT / "bench").glob("*/__main__.py")
    names = {*(file.stem for file in files), *(file.parent.name for file in rooms)}
    benches = {f"bench-{name.replace('_', '-')}" for name in names}
    assert [name for name in TARGET.findall(page.read_text()) if name not in targets | benches] == []


@PAGE
def test_prose_wraps_at_the_width(page: Path) -> None:
    lines = prose(page).splitlines()
    assert [line for line in lines if len(line) > WIDTH and not re.match(r" *(\||!?\[|\d+\. \[|<)", line)] == []
