"""Extraction of zips: valid ones, and refused ones, which leave nothing behind."""

from __future__ import annotations

import io
import stat
import struct
import zipfile

import pytest

from ml.runtime.archives import ArchiveLimits, extract_zip
from ml.runtime.errors import ArchiveError
from ml.spec.junk_files import is_junk
from ml.spec.zips import Limits, open_zip
from tests.ml.builders import make_files, write_zip


def write_member(path, name, content=b"x", **attributes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        for key, value in attributes.items():
            setattr(info, key, value)
        archive.writestr(info, content)
    return path


def stored_zip(names: dict[bytes, bytes], flags: int = 0, extra: bytes = b"") -> bytes:
    """A zip with these very bytes as names, which zipfile would not write: APPNOTE 4.3.7, 4.3.12 and 4.3.16."""
    body, directory = b"", b""
    for name, content in names.items():
        fields = (flags, 0, 0, 0x21, zipfile.crc32(content), len(content), len(content), len(name))
        head = struct.pack("<HHHHHIIIHH", 20, *fields, 0)
        entry = head[:-2] + struct.pack("<HHHHII", len(extra), 0, 0, 0, 0, len(body)) + name + extra
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + entry
        body += b"PK\x03\x04" + head + name + content
    end = struct.pack("<HHHHIIH", 0, 0, len(names), len(names), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def unpacked(tmp_path, content: bytes) -> tuple[list[str], tuple[str, ...]]:
    """Names of the files that come out, and the warnings."""
    warnings = extract_zip(write(tmp_path / "data.zip", content), tmp_path / "out")
    files = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    return sorted(path.relative_to(tmp_path / "out").as_posix() for path in files), warnings


def test_a_zip_is_unpacked_whole(tmp_path):
    files = make_files(2)
    extract_zip(write_zip(files, tmp_path / "data.zip"), tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_the_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    extract_zip(write_zip({"a.txt": b"new"}, tmp_path / "data.zip"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "name",
    [
        *("__MACOSX/._a.png", "Normal/.DS_Store", "Normal/._a.png", "a/b/.ipynb_checkpoints/a-checkpoint.png"),
        *(".Trash-1000/files/a.png", "Normal/@eaDir/a.png/SYNOFILE_THUMB_M.png", "Normal/Thumbs.db", "DICOMDIR"),
        *("LICENSE", "kidney/LICENSE.txt", "VERSION", "Normal/README", "readme.md", "SHA256SUMS", ".git/objects/ab/cd"),
        *("License-2.0", "CHANGELOG.rst", "$RECYCLE.BIN/a.png", "desktop.ini", "licence.pdf"),
    ],
)
def test_what_is_passed_over_by_its_name(name):
    assert is_junk(name)


@pytest.mark.parametrize(
    "name",
    [
        *("Normal/a.png", "1.2.826.0.1.3680043.8.498.3000", "Normal/license.png", "version.dcm", "README/a.png"),
        *(
            "Normal/v1.0/a.png",
            "a..png",
            "versions.png",
            "patients.csv",
            "notice-board.jpg",
            "IM0001",
            "Versions/1.tif",
        ),
    ],
)
def test_what_is_not_passed_over_by_its_name(name):
    assert not is_junk(name)


def test_a_batch_and_a_dataset_pass_over_the_same_and_only_a_dataset_unpacks_it_to_count_it(tmp_path):
    files = {"__MACOSX/._a.png": b"x", "Normal/.ipynb_checkpoints/a.png": b"x", "LICENSE": b"x", "Normal/a.png": b"x"}
    path = write_zip(files, tmp_path / "data.zip")
    with open_zip(path, Limits(), ArchiveError) as members:
        assert ([member.name for member in members], members.junk) == (["Normal/a.png"], 3)
    assert unpacked(tmp_path, path.read_bytes())[0] == sorted(files)


def test_junk_that_may_not_be_unpacked_stays_in_the_zip(tmp_path):
    files = {".git/pack.zip": b"PK", "Normal/a.png": b"x"}
    assert unpacked(tmp_path, write_zip(files, tmp_path / "data.zip").read_bytes())[0] == ["Normal/a.png"]


# --- names ---


@pytest.mark.parametrize(
    ("packed", "flags", "name", "guessed"),
    [
        ("Läsion/1.png".encode(), 0x800, "Läsion/1.png", 0),
        ("Läsion/1.png".encode(), 0, "Läsion/1.png", 0),
        ("La\u0308sion/1.png".encode(), 0, "Läsion/1.png", 0),
        ("Läsion/1.png".encode("cp437"), 0, "Läsion/1.png", 1),
        ("肿瘤/1.png".encode("gbk"), 0, b"\xd6\xd7\xc1\xf6/1.png".decode("cp437"), 1),
        ("a/9.15.07\u202fAM.png".encode(), 0x800, "a/9.15.07\u202fAM.png", 0),
        (b"a/tab\there.png", 0, "a/tab%09here.png", 0),
        (b"a/two\nlines.png", 0, "a/two%0Alines.png", 0),
        ("a/left\u202egnp.png".encode(), 0x800, "a/left%E2%80%AEgnp.png", 0),
        (b"a/12:30.png", 0, "a/12:30.png", 0),
        (b"C:notes.png", 0, "C:notes.png", 0),
        (b"a./b..png.", 0, "a./b..png.", 0),
        (b" a / b .png ", 0, " a / b .png ", 0),
        (b"a\\b.png", 0, "a/b.png", 0),
        (b"./a//b.png", 0, "a/b.png", 0),
        (b"a/../b.png", 0, "b.png", 0),
        (b"nul\0.png", 0, "nul%00.png", 0),
    ],
)
def test_names_as_they_are_packed_and_stored(tmp_path, packed, flags, name, guessed):
    names, warnings = unpacked(tmp_path, stored_zip({packed: b"x"}, flags))
    assert names == [name]
    assert len(warnings) == guessed
    assert not guessed or "not UTF-8: 1." in warnings[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil", "outside"),
        ("a/../../evil", "outside"),
        ("..\\evil", "outside"),
        ("/etc/evil", "absolute"),
        ("C:/evil", "absolute"),
        ("c:\\evil", "absolute"),
        ("\\\\server\\evil", "absolute"),
    ],
)
def test_names_that_lead_outside_are_refused(tmp_path, name, why):
    assert why in refused_whole(tmp_path, write_member(tmp_path / "data.zip", name))


@pytest.mark.parametrize("name", [b"", b".", b"./.", b"a/.."])
def test_files_without_a_name_are_refused(tmp_path, name):
    assert "no name" in refused_whole(tmp_path, write(tmp_path / "data.zip", stored_zip({name: b"x"})))


def test_names_that_no_disk_takes_are_refused(tmp_path):
    long, deep = "is too long: a file or folder takes 255 bytes at most", "lies too deep: in 64 folders at most"
    names = {
        "Normal/" + 300 * "n": long,
        "ä" * 150 + "/1.png": long,
        "f/" * 1400 + "1.png": deep,
        "f/" * 64 + "1": deep,
    }
    for name, why in names.items():
        content = stored_zip({name.encode(): b"x"}, 0x800)
        assert why in refused_whole(tmp_path, write(tmp_path / "data.zip", content))


def test_names_that_no_disk_takes_do_not_matter_where_they_are_passed_over(tmp_path):
    longest = 255 * "n"  # beside which macOS puts one of 257
    files = {f"Normal/{longest}": b"x", f"__MACOSX/Normal/._{longest}": b"x"}
    names, _ = unpacked(tmp_path, stored_zip({name.encode(): content for name, content in files.items()}))
    assert f"Normal/{longest}" in names


@pytest.mark.parametrize(("of", "name"), [(b"L\x84sion/1.png", "Läsion/1.png"), (b"other", "L\u00e4sion/1.png")])
def test_the_name_in_an_extra_field_counts_if_it_is_of_this_name(tmp_path, of, name):
    told = "Läsion/1.png" if of != b"other" else "Zyste/1.png"
    field = b"\x01" + struct.pack("<I", zipfile.crc32(of)) + told.encode()
    extra = struct.pack("<HHI", 1, 4, 0) + struct.pack("<HH", 0x7075, len(field)) + field
    names, warnings = unpacked(tmp_path, stored_zip({b"L\x84sion/1.png": b"x"}, extra=extra))
    assert (names, len(warnings)) == ([name], int(of == b"other"))


def test_a_file_and_a_folder_of_one_name_are_refused(tmp_path):
    for names in (("Tumor", "Tumor/1.png"), ("Tumor/1.png", "Tumor")):
        path = write_zip(dict.fromkeys(names, b"x"), tmp_path / "data.zip")
        assert "'Tumor' is both a file and a folder" in refused_whole(tmp_path, path)


def test_one_folder_in_two_unicode_forms_is_refused_with_both(tmp_path):
    content = stored_zip({"Läsion/1.png".encode(): b"x", "La\u0308sion/2.png".encode(): b"x"})
    why = refused_whole(tmp_path, write(tmp_path / "data.zip", content))
    assert "'L\\xe4sion'" in why
    assert "'La\\u0308sion'" in why


# --- what is refused ---


def test_links_are_refused(tmp_path):
    link = (stat.S_IFLNK | 0o777) << 16
    assert "link" in refused_whole(
        tmp_path, write_member(tmp_path / "data.zip", "link", b"/etc/passwd", external_attr=link)
    )


def test_a_bomb_is_refused(tmp_path):
    refused_whole(tmp_path, write_member(tmp_path / "data.zip", "bomb.png", b"\0" * (4 * 2**20)))


def test_archives_within_are_refused(tmp_path):
    refused_whole(tmp_path, write_zip({"a.png": b"x", "inner.zip": b"PK"}, tmp_path / "data.zip"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a.png", b"1")
        archive.writestr("a.png", b"2")
    assert "twice" in refused_whole(tmp_path, tmp_path / "data.zip")


def test_too_many_members_and_too_many_bytes_are_refused(tmp_path):
    path = write_zip(make_files(3), tmp_path / "data.zip")
    refused_whole(tmp_path, path, ArchiveLimits(members=5))
    refused_whole(tmp_path, path, ArchiveLimits(total_bytes=100))


@pytest.mark.parametrize("content", [b"", b"not a zip"])
def test_what_is_no_zip_is_refused(tmp_path, content):
    assert "not a zip" in refused_whole(tmp_path, write(tmp_path / "data.zip", content))


WHOLE = stored_zip({b"Normal/1.png": b"0123456789" * 9, b"Tumor/2.png": b"x"})
DIRECTORY = WHOLE.index(b"PK\x01\x02")


def changed(at: int, content: bytes) -> bytes:
    return WHOLE[:at] + content + WHOLE[at + len(content) :]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (WHOLE[: len(WHOLE) // 2], "cut off"),
        (WHOLE[:-10], "cut off"),
        (changed(50, b"\xff\xff"), "'Normal/1.png' cannot be unpacked: the zip is damaged (wrong checksum)"),
        (changed(DIRECTORY + 8, b"\x01"), "'Normal/1.png' is encrypted"),
        (changed(DIRECTORY + 8, b"\x41"), "'Normal/1.png' is encrypted"),
        (changed(DIRECTORY + 10, b"\x09"), "compressed by the method 9"),
        (changed(DIRECTORY + 10, b"\x5f"), "compressed by the method 95"),
        (changed(DIRECTORY + 34, b"\x01"), "another part of a zip"),
        (changed(0, b"PK\x07\x08"), "broken content"),
        (changed(DIRECTORY, b"XX"), "directory cannot be read"),
        (stored_zip({b"L\xe4sion/1.png": b"x"}, 0x800), "UTF-8 that are not"),
    ],
)
def test_damage_is_told_by_its_cause(tmp_path, content, why):
    path = write(tmp_path / "data.zip", content)
    assert why in refused_whole(tmp_path, path)


def test_every_single_damaged_byte_is_taken_or_refused_and_nothing_else(tmp_path):
    content = write_zip({"Normal/1.png": bytes(range(200)), "b.dcm": b"x"}, tmp_path / "whole.zip").read_bytes()
    for at in range(len(content)):
        for byte in (0, 0xFF, content[at] ^ 0x01):
            damaged = io.BytesIO(content[:at] + bytes([byte]) + content[at + 1 :])
            try:
                with open_zip(damaged, Limits(), ArchiveError) as members:  # type: ignore[arg-type]
                    assert all(len(member.read()) == member.size for member in members)
            except ArchiveError:
                pass


def test_files_that_lie_over_each_other_are_refused(tmp_path):
    overlapping = changed(DIRECTORY + 46 + len(b"Normal/1.png") + 42, b"\0")  # the second one begins with the first
    assert "lie over each other" in refused_whole(tmp_path, write(tmp_path / "data.zip", overlapping))


def test_half_a_zip_and_a_damaged_member_are_refused(tmp_path):
    whole = write_zip(make_files(3), tmp_path / "whole.zip").read_bytes()
    refused_whole(tmp_path, write(tmp_path / "half.zip", whole[: len(whole) // 2]))
    refused_whole(tmp_path, write(tmp_path / "damaged.zip", whole[:200] + b"\xff" * 40 + whole[240:]))


def refused_whole(tmp_path, archive, limits=None) -> str:
    """Why the zip is refused; nothing remains: neither the folder, nor a temporary one, nor a file outside."""
    target = tmp_path / "two" / "below" / "out"  # so that `../..` still ends where we look
    target.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArchiveError) as refusal:
        extract_zip(archive, target, limits)
    assert sorted(tmp_path.rglob("*")) == before
    return str(refusal.value)
