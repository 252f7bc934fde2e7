"""multipart/form-data as clients write it: what is read, and what is refused with the true cause."""

import base64
import binascii
import hashlib
import io
import json
import re
import tracemalloc
from typing import Any

import pytest
from flask.testing import FlaskClient

from api.http.body import multipart
from jobs.db import Sessions
from jobs.settings import Settings
from tests.api.conftest import Door, png
from tests.api.test_errors import assert_problem
from tests.applications import application

TYPE = "multipart/form-data; boundary=x"
SCAN = png()
END = b"--x--\r\n"
ENCODING = "Content-Transfer-Encoding: "


def part(disposition: str | bytes, content: bytes = SCAN, *headers: str, line: bytes = b"\r\n") -> bytes:
    """A part, from its boundary to the line break before the next."""
    given = disposition if isinstance(disposition, bytes) else disposition.encode()
    lines = [b"--x", b"Content-Disposition: " + given, *(header.encode() for header in headers), b"", content, b""]
    return line.join(lines)


def file(name: str = 'filename="scan.png"', content: bytes = SCAN, *headers: str, line: bytes = b"\r\n") -> bytes:
    """The file; `name` is the parameter of its name."""
    return part(f'form-data; name="file"; {name}', content, *headers, line=line)


def text(content: bytes, *headers: str, name: str = "custom_id") -> bytes:
    """A text."""
    return part(f'form-data; name="{name}"', content, *headers)


# --- read ---

NAMES: dict[str, tuple[str, str | None]] = {
    "plain": ('filename="scan.png"', "scan.png"),
    "empty": ('filename=""', None),
    "without quotes": ("filename=scan.png", "scan.png"),
    "spaces without quotes": ("filename=scan one.png ", "scan one.png"),
    "UTF-8": ('filename="Läsion.png"', "Läsion.png"),
    "UTF-8 without quotes": ("filename=Läsion.png", "Läsion.png"),
    "semicolon and equals sign": ('filename="a;name=b.png"', "a;name=b.png"),
    "a quote as browsers write it": ('filename="a%22b.png"', 'a"b.png'),
    "a quote as curl writes it": (r'filename="a\"b.png"', 'a"b.png'),
    "a per cent sign": ('filename="50%41.png"', "50%41.png"),
    "extended": ("filename*=UTF-8''L%C3%A4sion.png", "Läsion.png"),
    "extended, with what looks like escapes": ("filename*=UTF-8''50%2522.png", "50%22.png"),
    "extended, Latin-1": ("filename*=iso-8859-1'de'L%E4sion.png", "Läsion.png"),
    "extended, of Windows": ("filename*=windows-1252''%80.png", "€.png"),
    "extended after plain": ("filename=\"L.png\"; filename*=UTF-8''L%C3%A4.png", "Lä.png"),
    "extended before plain": ("filename*=UTF-8''L%C3%A4.png; filename=\"L.png\"", "Lä.png"),
    "continued": ("filename*0*=UTF-8''L%C3%A4; filename*1=sion.png", "Läsion.png"),
    "encoded word, base64": ('filename="=?UTF-8?B?TMOkc2lvbi5wbmc=?="', "Läsion.png"),
    "encoded word, quoted": ('filename="=?iso-8859-1?q?L=E4si_on?=.png"', "Läsi on.png"),
    "encoded word without quotes": ("filename==?utf-8?B?TMOkc2lvbi5wbmc=?=", "Läsion.png"),
    "a character in two encoded words": ('filename="=?UTF-8?B?TMM=?=\r\n =?UTF-8?B?pC5wbmc=?="', "Lä.png"),
    "no encoded word": ('filename="=?UTF-8?.png"', "=?UTF-8?.png"),
    "Windows path": (r'filename="C:\Users\new\tumor.png"', "tumor.png"),
    "Windows path, escaped": (r'filename="C:\\Users\\new\\tumor.png"', "tumor.png"),
    "Windows path in an encoded word": (r'filename="=?utf-8?Q?C:\temp\t=C3=BCmor.png?="', "tümor.png"),
    "network path": (r'filename="\\server\scans\tumor.png"', "tumor.png"),
    "folder of Windows": (r'filename="night\tumor.png"', "tumor.png"),
    "Unix path": ('filename="/home/me/tumor.png"', "tumor.png"),
}
"""How a file's name is written, and what it is."""

SHAPES: dict[str, tuple[str, bytes]] = {
    "no line break at the end": (TYPE, file() + b"--x--"),
    "preamble and epilogue": (TYPE, b"Read me\r\n" + file() + END + b"--x\r\nand the rest"),
    "a long epilogue": (TYPE, file() + END + bytes(2_000_000)),
    "LF alone": (TYPE, file(line=b"\n") + b"--x--\n"),
    "spaces after boundaries": (TYPE, file().replace(b"--x\r\n", b"--x \t\r\n", 1) + b"--x-- \r\n"),
    "quoted boundary": ('multipart/form-data; boundary="x y"', (file() + END).replace(b"--x", b"--x y")),
    "quoted boundary that ends with spaces": ('multipart/form-data; boundary="x  "', file() + END),
    "type in capitals, charset": ("Multipart/Form-Data; charset=utf-8; Boundary=x", file() + END),
    "nearly the boundary in the content": (TYPE, file(content=SCAN + b"\r\n--xy--\r\n--\r\n") + END),
    "folded header": (TYPE, part('form-data; name="file";\r\n\tfilename="scan.png"') + END),
    "header names in capitals": (TYPE, file().replace(b"Content-Disposition", b"CONTENT-DISPOSITION") + END),
    "parameters in capitals, no spaces": (TYPE, part('form-data;NAME="file";FileName="scan.png"') + END),
    "name without quotes": (TYPE, part("form-data; name=file; filename=scan.png") + END),
    "attachment": (TYPE, part('attachment; name="file"; filename="scan.png"') + END),
    "a list, as PHP names it": (TYPE, part('form-data; name="file[]"; filename="scan.png"') + END),
    "base64": (TYPE, file('filename="scan.png"', base64.encodebytes(SCAN), ENCODING + "base64") + END),
    "base64 in one line": (TYPE, file('filename="scan.png"', base64.b64encode(SCAN), ENCODING + "BASE64") + END),
    "quoted-printable": (
        TYPE,
        file('filename="scan.png"', binascii.b2a_qp(SCAN, istext=False), ENCODING + "quoted-printable") + END,
    ),
    "binary": (TYPE, file('filename="scan.png"', SCAN, "Content-Type: image/png", ENCODING + "binary") + END),
}
"""How the body is written. The file is the same in all."""

TEXTS: dict[str, tuple[bytes, str]] = {
    "plain": (text(b"a-1"), "a-1"),
    "UTF-8": (text("Ä€".encode()), "Ä€"),
    "UTF-8 with a byte order mark": (text("Ä".encode("utf-8-sig")), "Ä"),
    "Latin-1 that says so": (text(b"\xc4", "Content-Type: text/plain; charset=ISO-8859-1"), "Ä"),
    "quoted charset": (text(b"\x80", 'Content-Type: text/plain; charset="windows-1252"'), "€"),
    "base64": (text(b"YS0x\r\n", ENCODING + "base64"), "a-1"),
    "quoted-printable": (text(b"=C3=84=\r\n-=31", ENCODING + "quoted-printable"), "Ä-1"),
}


def predicted(client: FlaskClient, content_type: str, body: bytes) -> tuple[dict, bytes]:
    """The result of the scan in this body, and the scan's hash."""
    answer = client.post("/jobs/predict", data=body, content_type=content_type)
    assert answer.status_code == 202, answer.get_data(as_text=True)
    job = answer.get_json()
    (result,) = client.get(f"/jobs/{job['id']}/results?state=pending").get_json()["data"]
    return result, client.get(f"/scans/{result['scan_id']}").get_json()["sha256"]


@pytest.mark.parametrize("what", NAMES)
def test_a_file_has_its_name(client: FlaskClient, champion: object, what: str) -> None:
    written, name = NAMES[what]
    result, sha256 = predicted(client, TYPE, file(written) + END)
    assert (result["name"], sha256) == (name, hashlib.sha256(SCAN).hexdigest())


@pytest.mark.parametrize("what", SHAPES)
def test_a_body_is_read(client: FlaskClient, champion: object, what: str) -> None:
    result, sha256 = predicted(client, *SHAPES[what])
    content = SCAN + b"\r\n--xy--\r\n--\r\n" if what.startswith("nearly") else SCAN
    assert (result["name"], sha256) == ("scan.png", hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("what", TEXTS)
def test_a_text_is_read(client: FlaskClient, champion: object, what: str) -> None:
    written, value = TEXTS[what]
    for body in (file() + written + END, written + file() + END):
        assert predicted(client, TYPE, body)[0]["custom_id"] == value


def test_files_under_one_name_keep_their_order(client: FlaskClient, champion: object) -> None:
    files = [
        part(f'form-data; name="{name}"; filename="{n}.png"', png(shade=n))
        for n, name in enumerate(("files[]", "files", "files[]"))
    ]
    ids = [text(f"id-{n}".encode(), name="custom_ids[]") for n in range(3)]
    answer = client.post("/jobs/predict/batch", data=b"".join([ids[0], *files, *ids[1:], END]), content_type=TYPE)
    found = client.get(f"/jobs/{answer.get_json()['id']}/results?state=pending").get_json()["data"]
    assert [(one["name"], one["custom_id"]) for one in found] == [(f"{n}.png", f"id-{n}") for n in range(3)]


@pytest.mark.parametrize("boundary", [b"b", b"----b", b"b--"])
@pytest.mark.parametrize("content", [b"", b"a", b"a-", b"--", b"a\r\n", b"\r\n--x"])
def test_files_are_the_same_wherever_a_block_ends(boundary: bytes, content: bytes, monkeypatch: Any) -> None:
    head = b'--%b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' % boundary
    body = (head + content + b"\r\n") * 2 + b"--%b--\r\n" % boundary
    for size in range(1, len(body) + 1):
        monkeypatch.setattr(multipart, "BLOCK", size)
        _, _, files = multipart.MultipartParser(lambda *_: io.BytesIO()).parse(
            io.BytesIO(body), multipart.MULTIPART, len(body), {"boundary": boundary.decode()}
        )
        assert [file.read() for file in files.getlist("files")] == [content] * 2, size


def test_a_manifest_names_files_with_their_folders_but_no_drive(client: FlaskClient, champion: object) -> None:
    manifest = b"file\nnight/a.png\nb.png\n"
    body = (
        part('form-data; name="manifest"; filename="m.csv"', manifest)
        + part('form-data; name="files"; filename="night/a.png"')
        + part(r'form-data; name="files"; filename="C:\scans\b.png"', png(shade=1))
        + END
    )
    answer = client.post("/jobs/predict/batch", data=body, content_type=TYPE)
    assert answer.status_code == 202, answer.get_json()


# --- refused ---

LATIN = 'form-data; name="file"; filename="Läsion.png"'.encode("latin-1")
NESTED = b"--y\r\nContent-Disposition: file; filename=a.png\r\n\r\nCanary\r\n--y--"
CUT_OFF = "Part 1 .*(closing boundary is missing|cut off)"
MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "no boundary": ("multipart/form-data", file() + END, "names no boundary"),
    "empty boundary": ('multipart/form-data; boundary=""', file() + END, "names no boundary"),
    "another boundary": ("multipart/form-data; boundary=y", file() + END, "nowhere in the body"),
    "another boundary, a large body": ("multipart/form-data; boundary=y", bytes(900_000), "nowhere in the body"),
    "not closed": (TYPE, file(), CUT_OFF),
    "cut off in the content": (TYPE, file()[:-20], CUT_OFF),
    "cut off in the headers": (TYPE, file()[:40], CUT_OFF),
    "cut off in the second part": (TYPE, file() + text(b"Canary")[:-9], "Part 2 .*cut off"),
    "no name": (TYPE, part('form-data; filename="Canary.png"') + END, "Part 1 .*has no name"),
    "empty name": (TYPE, file() + part('form-data; name=""', b"Canary") + END, "Part 2 .*has no name"),
    "no headers": (TYPE, b"--x\r\n\r\nCanary\r\n" + END, "Part 1 .*no Content-Disposition"),
    "no headers, binary": (TYPE, b"--x\r\n\r\n\xff\r\n\r\n" + bytes(900_000) + END, "Part 1 .*no Content-Disposition"),
    "no Content-Disposition": (TYPE, b"--x\r\nContent-Type: a/b\r\n\r\nCanary\r\n" + END, "no Content-Disposition"),
    "headers in Latin-1": (TYPE, part(LATIN) + END, "Part 1 .*not in UTF-8.*Latin-1"),
    "endless headers": (TYPE, b"--x\r\nA: " + b"a" * 900_000, "Part 1 .*no end|headers"),
    "long headers": (TYPE, part("form-data; name=file", b"", "A: " + "a" * 9000) + END, "headers of more than 8192"),
    "open quote": (TYPE, file('filename="Canary.png') + END, "quote"),
    "extended name in another charset": (TYPE, file("filename*=UTF-8''L%E4.png") + END, "charset"),
    "extended name in an unknown charset": (TYPE, file("filename*=rot13''Canary.png") + END, "charset"),
    "encoded word in an unknown charset": (TYPE, file('filename="=?idna?q?Canary?="') + END, "charset"),
    "continued name without order": (TYPE, file(f"filename*{'9' * 5000}=a") + END, "cannot be read"),
    "name both whole and continued": (TYPE, file("filename*=a; filename*0=b") + END, "cannot be read"),
    "text in Latin-1": (TYPE, file() + text("Canary Ä".encode("latin-1")) + END, "Part 2 .*not in UTF-8.*charset"),
    "text in an unknown charset": (TYPE, text(b"Canary", "Content-Type: a/b; charset=x") + file() + END, "charset"),
    "a file without filename": (TYPE, text(SCAN, name="file") + END, 'no file name.*filename="…"'),
    "damaged base64": (TYPE, file('filename="a"', b"Cana*y", ENCODING + "base64") + END, "Part 1 .*base64.*characters"),
    "base64 with spaces": (TYPE, file('filename="a"', b"Can ry==", ENCODING + "base64") + END, "spaces"),
    "base64 cut off": (TYPE, file('filename="a"', b"Canar", ENCODING + "base64") + END, "cut off"),
    "another encoding": (TYPE, file('filename="a"', b"Canary", ENCODING + "x-uuencode") + END, "Transfer-Encoding"),
    "multipart inside": (TYPE, text(NESTED, "Content-Type: multipart/mixed; boundary=y") + END, "is itself multipart"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_body_that_cannot_be_parsed_says_why(client: FlaskClient, what: str) -> None:
    content_type, body, why = MALFORMED[what]
    problem = assert_problem(client.post("/scans", data=body, content_type=content_type), 400, "MALFORMED_BODY")
    assert_says(problem, problem["detail"], why)


FIELDS: dict[str, tuple[bytes, str, str]] = {
    "a short file without filename": (text(b"Canary", name="file"), "/file", "filename="),
    "a text with a file name": (
        file() + part('form-data; name="pipeline"; filename="blob"', b"Canary"),
        "/pipeline",
        "without a file name",
    ),
    "two files for one": (file() + file(), "/file", "more than once"),
    "another field": (file() + text(b"Canary", name="colour"), "/colour", "Unknown"),
    "a field of forms that name their charset": (text(b"Canary", name="_charset_") + file(), "/_charset_", "Unknown"),
    "quotes that are none": (part("form-data; name='file'; filename='Canary'"), "/'file'", "Unknown"),
    "only the end": (b"", "/file", "Missing"),
    "an empty file": (file(content=b""), "/file", "image"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_wrong_field_is_named(client: FlaskClient, what: str) -> None:
    body, pointer, why = FIELDS[what]
    problem = assert_problem(client.post("/scans", data=body + END, content_type=TYPE), 422)
    assert_says(problem, {one["pointer"]: one["detail"] for one in problem["errors"]}[pointer], why)


def assert_says(problem: dict, detail: str, why: str) -> None:
    assert re.search(why, detail, re.DOTALL), detail
    assert "Canary" not in json.dumps(problem)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (text(b"a" * 600_000, name="file") + END, "Part 1 .*no file name"),
        (b"".join(text(b"") for _ in range(20_001)) + END, "20000 parts"),
    ],
    ids=["a long text", "many parts"],
)
def test_what_is_too_large_names_what_it_is(client: FlaskClient, body: bytes, why: str) -> None:
    problem = assert_problem(client.post("/scans", data=body, content_type=TYPE), 413, "TOO_LARGE")
    assert_says(problem, problem["detail"], why)
    assert "RENALQ_" not in problem["detail"]


def test_all_texts_together_are_bounded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "TEXT_BYTES", 1000)
    body = b"".join(text(b"a" * 600) for _ in range(2)) + END
    assert_problem(client.post("/scans", data=body, content_type=TYPE), 413, "TOO_LARGE")


def test_memory_is_flat_whatever_the_encoding(settings: Settings, sessions: Sessions) -> None:
    content = bytes(16 * 1024 * 1024)
    bodies = [
        file(content=content) + END,
        file('filename="a"', base64.b64encode(content), ENCODING + "base64") + END,
        file('filename="a"', content, ENCODING + "quoted-printable") + END,
    ]
    with application(settings.model_copy(update={"max_scan_bytes": 1000}), sessions) as app:
        client = Door(app, sessions).client()
        client.post("/scans", data=file() + END, content_type=TYPE)
        for body in bodies:
            tracemalloc.start()
            assert_problem(client.post("/scans", data=body, content_type=TYPE), 413)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * 1024 * 1024


@pytest.mark.parametrize("media_type", ['multipart/related; type="application/dicom"; boundary=x', "multipart/mixed"])
def test_dicomweb_is_told_what_to_send(client: FlaskClient, media_type: str) -> None:
    problem = assert_problem(client.post("/scans", data=file() + END, content_type=media_type), 415)
    assert "multipart/form-data" in problem["detail"].removeprefix(media_type)
    assert "part with a file name" in problem["detail"]
