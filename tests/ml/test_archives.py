"""Extraction of zips: valid ones, and refused ones, which leave nothing behind."""

from __future__ import annotations

import stat
import zipfile

import pytest

from ml.runtime.archives import ArchiveLimits, extract_zip
from ml.runtime.errors import ArchiveError
from tests.ml.builders import make_files, write_zip


def write_member(path, name, content=b"x", **attributes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        for key, value in attributes.items():
            setattr(info, key, value)
        archive.writestr(info, content)
    return path


def test_a_zip_is_unpacked_whole(tmp_path):
    files = make_files(2)
    extract_zip(write_zip(files, tmp_path / "data.zip"), tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_the_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    extract_zip(write_zip({"a.txt": b"new"}, tmp_path / "data.zip"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


def test_litter_of_file_managers_is_left_out(tmp_path):
    files = {"__MACOSX/._a.png": b"x", "Normal/.DS_Store": b"x", "Normal/a.png": b"x"}
    extract_zip(write_zip(files, tmp_path / "data.zip"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["a.png"]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "..\\evil", "a\nb"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    refused_whole(tmp_path, write_member(tmp_path / "data.zip", name))


def test_links_are_refused(tmp_path):
    link = (stat.S_IFLNK | 0o777) << 16
    refused_whole(tmp_path, write_member(tmp_path / "data.zip", "link", b"/etc/passwd", external_attr=link))


def test_a_bomb_is_refused(tmp_path):
    refused_whole(tmp_path, write_member(tmp_path / "data.zip", "bomb.png", b"\0" * (4 * 2**20)))


def test_archives_within_are_refused(tmp_path):
    refused_whole(tmp_path, write_zip({"a.png": b"x", "inner.zip": b"PK"}, tmp_path / "data.zip"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a.png", b"1")
        archive.writestr("a.png", b"2")
    refused_whole(tmp_path, tmp_path / "data.zip")


def test_too_many_members_and_too_many_bytes_are_refused(tmp_path):
    path = write_zip(make_files(3), tmp_path / "data.zip")
    refused_whole(tmp_path, path, ArchiveLimits(members=5))
    refused_whole(tmp_path, path, ArchiveLimits(total_bytes=100))


@pytest.mark.parametrize("content", [b"", b"not a zip"])
def test_what_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "data.zip").write_bytes(content)
    refused_whole(tmp_path, tmp_path / "data.zip")


def test_half_a_zip_and_a_damaged_member_are_refused(tmp_path):
    whole = write_zip(make_files(3), tmp_path / "whole.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.zip").write_bytes(whole[:200] + b"\xff" * 40 + whole[240:])
    refused_whole(tmp_path, tmp_path / "half.zip")
    refused_whole(tmp_path, tmp_path / "damaged.zip")


def refused_whole(tmp_path, archive, limits=None):
    """The zip is refused, and nothing remains: neither the folder, nor a temporary one, nor a file outside."""
    target = tmp_path / "two" / "below" / "out"  # so that `../..` still ends where we look
    target.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArchiveError):
        extract_zip(archive, target, limits)
    assert sorted(tmp_path.rglob("*")) == before
