"""The worst request bodies that somebody with one key can think of, made when they are asked for."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

MIB = 1024 * 1024
LARGE = 31 * MIB
JSON = {"Content-Type": "application/json"}
GZIP = {**JSON, "Content-Encoding": "gzip"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
TRAIN, SCANS, BATCH, KNOWN = "/v1/jobs/train", "/v1/scans", "/v1/jobs/predict/batch", "/v1/scans/known"


@dataclass(frozen=True)
class Attack:
    """A body, and where it is sent."""

    path: str
    headers: dict[str, str]
    body: bytes


def filled(begin: bytes, element: bytes, end: bytes, size: int = LARGE) -> bytes:
    """`begin`, so many elements that `size` is reached, `end`."""
    return begin + element * ((size - len(begin) - len(end)) // len(element)) + end


def numbered(size: int) -> bytes:
    """An object with a different unknown field for each value."""
    names = (b'"%x":0' % number for number in range(size // 10))
    return b"{" + b",".join(names) + b"}"


def part(name: str, content: bytes, more: str = "") -> bytes:
    """A part of multipart."""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + b"\r\n"


LONG_KEY = b"k" * (MIB // 2)
MANY = 24_000
MAKERS: dict[str, Callable[[], Attack]] = {
    "lists in a list": lambda: Attack(SCANS, JSON, filled(b"[", b"[],", b"[]]")),
    "lists in lists": lambda: Attack(SCANS, JSON, b"[" * LARGE),
    "unknown fields": lambda: Attack(TRAIN, JSON, numbered(LARGE)),
    "unknown fields beside a scan": lambda: Attack(SCANS, JSON, numbered(LARGE)),
    "ids that are none": lambda: Attack(BATCH, JSON, filled(b'{"scan_ids":[', b'"x",', b'"x"]}')),
    "hashes that are none": lambda: Attack(KNOWN, JSON, filled(b'{"sha256":[', b"1,", b"1]}")),
    "strings without commas": lambda: Attack(SCANS, JSON, b'""' * (LARGE // 2)),
    "closing brackets": lambda: Attack(SCANS, JSON, b"]" * LARGE),
    "white space": lambda: Attack(SCANS, JSON, b" " * LARGE),
    "zeros as a scan": lambda: Attack(SCANS, JSON, filled(b'{"image":"', b"AAAA", b'"}')),
    "a scan of escapes": lambda: Attack(SCANS, JSON, filled(b'{"image":"', b"\\u0041", b'"}')),
    "a scan without an end": lambda: Attack(SCANS, JSON, b'{"image":"' + b"A" * LARGE),
    "a scan in a field of text": lambda: Attack(SCANS, JSON, filled(b'{"pipeline":"', b"A", b'"}')),
    "a hundred scans": lambda: Attack(
        "/batch_predict", JSON, json.dumps({"images": [base64.b64encode(bytes(240_000)).decode()] * 100}).encode()
    ),
    "a number of digits": lambda: Attack(TRAIN, JSON, filled(b'{"name":', b"1", b"}", MIB)),
    "a fraction of digits": lambda: Attack(TRAIN, JSON, filled(b'{"name":0.', b"1", b"}", MIB)),
    "numbers of digits": lambda: Attack(KNOWN, JSON, filled(b'{"sha256":[', b"1" * 4000 + b",", b"1]}", MIB)),
    "as many values as go in": lambda: Attack(KNOWN, JSON, filled(b"[", b"[],", b"[]]", 3 * MANY)),
    "wrong numbers under a long name": lambda: Attack(
        TRAIN, JSON, b'{"metadata":{"' + LONG_KEY + b'":[' + b"1e999," * MANY + b"1]}}"
    ),
    "long names": lambda: Attack(TRAIN, JSON, b'{"' + LONG_KEY + b'":1,"' + LONG_KEY[:-9] + b'":{"a":[]}}'),
    "wrong labels": lambda: Attack(
        TRAIN, JSON, json.dumps({"metadata": {f"{n}": [] for n in range(MANY)}}).encode()
    ),
    "fields of sixty kB": lambda: Attack(TRAIN, JSON, numbered(60_000)),
    "lists of sixty kB": lambda: Attack(TRAIN, JSON, filled(b"[", b"[],", b"[]]", 60_000)),
    "packed lists": lambda: Attack(SCANS, GZIP, gzip.compress(filled(b"[", b"[],", b"[]]"))),
    "packed zeros as a scan": lambda: Attack(SCANS, GZIP, gzip.compress(filled(b'{"image":"', b"AAAA", b'"}'))),
    "UTF-16 whose letters look like quotes": lambda: Attack(
        TRAIN, JSON, ('["∀",' + "[]," * (MIB // 8) + '"∀"]').encode("utf-16-le")
    ),
    "lists in a form": lambda: Attack(
        "/v1/jobs/predict", MULTIPART,
        part("metadata", filled(b"[", b"[],", b"[]]", 490_000)) * 60 + part("file", b"x", '; filename="x"') + b"--x--",
    ),
    "files of a form": lambda: Attack(BATCH, MULTIPART, part("files", b"", '; filename=""') * 19_999 + b"--x--\r\n"),
    "texts of a form": lambda: Attack(BATCH, MULTIPART, part("custom_ids", b"x" * 1500) * 19_999 + b"--x--\r\n"),
    "lines of a manifest": lambda: Attack(
        BATCH, {"Content-Type": "application/x-ndjson"}, (b'{"a":[' + b"[]," * 20_000 + b"1]}\n") * 200
    ),
}  # fmt: skip


@cache
def attack(name: str) -> Attack:
    """One of `MAKERS`."""
    return MAKERS[name]()
