"""Base64 as clients write it (RFC 4648, RFC 2397): what is read, and what is refused with the true cause."""

import base64
import hashlib
import json
from urllib.parse import quote

import pytest
from flask.testing import FlaskClient

from api.http.body.transfer_encoding import Base64, DamagedText, QuotedPrintable, decode_base64
from tests.api.conftest import png
from tests.api.test_errors import assert_problem

SCAN = png(shade=0xFB) + b"\xfb\xef\xbe\xff\xff\xfe"
"""Has both characters in which the alphabets differ, and one byte more than a multiple of three."""
PLAIN = base64.b64encode(SCAN).decode()
URL_SAFE = base64.urlsafe_b64encode(SCAN).decode()
assert {"+", "/"} < set(PLAIN)
assert PLAIN.endswith("=")

READ = {
    "standard": PLAIN,
    "without padding": PLAIN.rstrip("="),
    "URL-safe": URL_SAFE,
    "URL-safe without padding": URL_SAFE.rstrip("="),
    "lines of MIME": base64.encodebytes(SCAN).decode(),
    "lines of Windows": base64.encodebytes(SCAN).decode().replace("\n", "\r\n"),
    "white space at both ends": f"\n  {PLAIN}\t\n ",
    "data URL": f"data:image/png;base64,{PLAIN}",
    "data URL in capitals": f"DATA:image/png;BASE64,{PLAIN}",
    "data URL without a type": f"data:;base64,{PLAIN}",
    "data URL with parameters": f"data:image/png;name=a.png;base64,{PLAIN}",
    "data URL with escapes": f"data:image/png;base64,{quote(PLAIN, safe='')}",
    "data URL, URL-safe": f"data:image/png;base64,{URL_SAFE.rstrip('=')}",
    "data URL with lines": f" data:image/png;base64,\n{base64.encodebytes(SCAN).decode()}",
}

REFUSED = {
    "pluses that became spaces": (PLAIN.replace("+", " "), "spaces"),
    "a plus at the end that became a space": ("AAA ", "spaces"),
    "a plus at the beginning that became a space": (" AAA", "spaces"),
    "spaces between groups": (f"{PLAIN[:8]} {PLAIN[8:]}", "spaces"),
    "cut off": (PLAIN.rstrip("=")[:-2], "cut off"),
    "padding inside": (f"{PLAIN}{PLAIN}", "padding"),
    "too much padding": (f"{PLAIN}=", "padding"),
    "too little padding": (f"{'A' * 6}=", "padding"),
    "only padding": ("====", "padding"),
    "another alphabet": (f"{PLAIN[:8]}*{PLAIN[9:]}", "characters"),
    "escaped": (quote(PLAIN, safe=""), "characters"),
    "not ASCII": (f"{PLAIN[:8]}ä{PLAIN[9:]}", "characters"),
    "data URL without a comma": ("data:image/png;base64", "comma"),
    "hex": (SCAN.hex() + "x", "cut off|image"),
}


@pytest.mark.parametrize("what", READ)
def test_a_form_of_base64_is_read(client: FlaskClient, what: str) -> None:
    answer = client.post("/scans", json={"image": READ[what]})
    assert answer.get_json()["sha256"] == hashlib.sha256(SCAN).hexdigest()


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_base64_says_why(client: FlaskClient, champion: object, what: str) -> None:
    text, why = REFUSED[what]
    for path in ("/scans", "/jobs/predict", "/predict"):
        problem = assert_problem(client.post(path, json={"image": text}), 422)
        (error,) = problem["errors"]
        assert error["pointer"] == "/image"
        assert pytest.raises(AssertionError, match=why).matches(AssertionError(error["detail"]))
        assert text[:20] not in json.dumps(problem)


def test_an_id_is_no_image(client: FlaskClient, champion: object) -> None:
    scan = client.post("/scans", json={"image": PLAIN}).get_json()["id"]
    assert client.post("/jobs/predict", json={"image": scan}).status_code == 202
    assert client.post("/jobs/predict", json={"image": scan.upper()}).status_code == 202
    assert_problem(client.post("/jobs/predict", json={"image": scan[:-2]}), 422)


@pytest.mark.parametrize("size", range(1, 9))
def test_blocks_of_any_size_decode_to_the_same(size: int) -> None:
    quoted = b"=C3=84 =\r\nend=3D"
    for decoder, text, content in (
        (Base64(), base64.encodebytes(SCAN), SCAN),
        (QuotedPrintable(), quoted, "Ä end=".encode()),
    ):
        blocks = [text[start : start + size] for start in range(0, len(text), size)]
        assert b"".join(map(decoder.decode, blocks)) + decoder.end() == content


@pytest.mark.parametrize("length", range(9))
def test_every_length_comes_back(length: int) -> None:
    content = SCAN[-length:] if length else b""
    for text in (base64.b64encode(content), base64.urlsafe_b64encode(content).rstrip(b"=")):
        assert b"".join(decode_base64([text.decode()])) == content


def test_padding_that_goes_on_is_refused_in_blocks() -> None:
    decoder = Base64()
    assert decoder.decode(b"AA==") == b""
    with pytest.raises(DamagedText):
        decoder.decode(b"AAAA")
