"""What a hospital's systems send at night, by REST alone: every form of scan, some twice, with names of their own."""

import csv
import hashlib
import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from tests.e2e.conftest import Client

pytestmark = [pytest.mark.slow, pytest.mark.scaled, pytest.mark.timeout(900)]

NDJSON = {"Accept": "application/x-ndjson"}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Something grey with a form in it."""
    y, x = np.mgrid[0:160, 0:200]
    disc = (x - 120) ** 2 + (y - 60) ** 2 < 900
    return Image.fromarray((40 + x // 4 + y // 4 + 90 * disc).astype(np.uint8))


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    sink = io.BytesIO()
    picture.save(sink, form, **options)
    return sink.getvalue()


def predicted(client: Client, files: dict[str, bytes], **data: str) -> dict[str, Any]:
    """The job of these files in one call, at its end."""
    answer = client.post("/jobs/predict/batch", files=[("files", item) for item in files.items()], data=data)
    assert answer.status_code == 202, answer.text
    return client.ended(answer.json())


def results(client: Client, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The job's results by name."""
    rows = client.get(job["links"]["results"], headers=NDJSON).text.splitlines()
    return {row["name"]: row for row in map(json.loads, rows)}


def dicom(name: str) -> bytes:
    """A file of pydicom's."""
    with open(str(get_testdata_file(name)), "rb") as file:  # noqa: PTH123  (a path of pydicom's own)
        return file.read()


def test_every_form_of_scan_is_right_or_has_its_own_error(
    client: Client, trained: dict[str, Any], picture: Image.Image
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side: it stands upright once it is turned by 90°
    alike = {
        "plain.png": encoded(picture),
        "palette.png": encoded(picture.convert("P")),
        "colour.png": encoded(picture.convert("RGB")),
        "opaque.png": encoded(picture.convert("RGBA")),
        "print.tiff": encoded(picture.convert("CMYK"), "TIFF"),
        "plain.bmp": encoded(picture, "BMP"),
        "lossless.webp": encoded(picture.convert("RGB"), "WEBP", lossless=True),
        # Of two frames the middle one is the second.
        "animated.webp": encoded(
            Image.new("RGB", (200, 160)), "WEBP", lossless=True, save_all=True, append_images=[picture.convert("RGB")]
        ),
        "pages.tiff": encoded(Image.new("L", (200, 160)), "TIFF", save_all=True, append_images=[picture]),
        "turned.png": encoded(picture.transpose(Image.Transpose.ROTATE_90), exif=turned),
    }
    fine = {
        "deep.png": encoded(Image.fromarray(np.asarray(picture).astype(np.uint16) * 200)),
        "camera.jpg": encoded(picture, "JPEG", quality=95),
        "ct.dcm": dicom("CT_small.dcm"),
        "jpeg2000.dcm": dicom("JPEG2000.dcm"),
        "deflated.dcm": dicom("image_dfl.dcm"),
        "frames.dcm": dicom("SC_rgb_rle_2frame.dcm"),
    }
    syntaxes = ("", "_implicit", "_bigendian", "_RLE", "_jpeg_ls_lossless", "_jp2klossless")
    slices = {f"MR_small{syntax}.dcm": dicom(f"MR_small{syntax}.dcm") for syntax in syntaxes}
    broken = {
        "empty.png": (b"", "NOT_AN_IMAGE"),
        "text.png": (b"Dear colleague,", "NOT_AN_IMAGE"),
        "half.png": (encoded(picture)[:-500], "BAD_IMAGE"),
        "half.dcm": (dicom("CT_small.dcm")[:-5000], "BAD_IMAGE"),
        "structure.dcm": (dicom("rtstruct.dcm"), "NOT_AN_IMAGE"),
        "dose.dcm": (dicom("rtdose.dcm"), "NOT_AN_IMAGE"),
    }
    job = predicted(client, {**alike, **fine, **slices, **{name: content for name, (content, _) in broken.items()}})
    assert job["state"] == "partially_succeeded"
    found = results(client, job)
    failed = {name: row["error"]["code"] for name, row in found.items() if row["state"] == "failed"}
    assert failed == {name: code for name, (_, code) in broken.items()}
    assert all(found[name]["error"]["detail"] for name in broken)
    tumor = {name: found[name]["probabilities"]["Tumor"] for name in alike}
    assert tumor == pytest.approx(dict.fromkeys(alike, tumor["plain.png"]), abs=0.02), "the same picture"
    assert {name for name in found if (found[name].get("output") or {}).get("frames")} >= {
        "animated.webp",
        "pages.tiff",
    }
    of_slice = {found[name]["probabilities"]["Tumor"] for name in slices}
    assert max(of_slice) - min(of_slice) < 1e-6, "one slice in six transfer syntaxes"
    assert abs(found["camera.jpg"]["probabilities"]["Tumor"] - tumor["plain.png"]) < 0.1


def test_the_same_scan_is_computed_once(client: Client, trained: dict[str, Any], picture: Image.Image) -> None:
    new = encoded(picture.rotate(7))
    first = results(client, predicted(client, {"a.png": new, "b.png": new, "c.png": encoded(picture.rotate(9))}))
    assert [first[name]["cached"] for name in ("a.png", "b.png", "c.png")] == [False, True, False]
    again = results(client, predicted(client, {"d.png": new}))
    assert again["d.png"]["cached"]
    same = ("label", "probabilities", "engine", "model_version", "scan_id")
    assert [again["d.png"][name] for name in same] == [first["a.png"][name] for name in same]


def test_a_manifest_says_what_scans_are_called(client: Client, trained: dict[str, Any], picture: Image.Image) -> None:
    scans = {f"slices/{angle}.png": encoded(picture.rotate(angle)) for angle in (1, 2)}
    rows = [{"file": name, "custom_id": f"acc-{n}", "patient": "p1", "study": "s9"} for n, name in enumerate(scans)]
    packed, listed = io.BytesIO(), io.StringIO()
    writer = csv.DictWriter(listed, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("manifest.csv", listed.getvalue())
        for name, content in scans.items():
            archive.writestr(name, content)
    found = results(client, predicted(client, {"night.zip": packed.getvalue()}))
    assert {name: (row["custom_id"], row["patient"], row["study"]) for name, row in found.items()} == {
        "slices/1.png": ("acc-0", "p1", "s9"),
        "slices/2.png": ("acc-1", "p1", "s9"),
    }


def test_what_is_stored_need_not_be_sent_again(client: Client, trained: dict[str, Any], picture: Image.Image) -> None:
    here, there = encoded(picture.rotate(11)), encoded(picture.rotate(12))
    stored = client.post("/scans", files={"file": ("a.png", here)}).json()
    hashes = [hashlib.sha256(content).hexdigest() for content in (here, there)]
    assert client.post("/scans/known", json={"sha256": hashes}).json()["data"] == {hashes[0]: stored["id"]}


def test_results_are_explained_after_all_predictions(
    client: Client, trained: dict[str, Any], picture: Image.Image
) -> None:
    scans = {f"{angle}.png": encoded(picture.rotate(angle)) for angle in (21, 22)}
    job = predicted(client, {**scans, "text.png": b"no image"}, explain="true")
    assert job["state"] == "partially_succeeded", job["error"]
    found = results(client, job)
    assert "explanation" not in found["text.png"]
    for name in scans:
        overlay = client.get(found[name]["explanation"])
        assert overlay.headers["Content-Type"] == "image/png"
        with Image.open(io.BytesIO(overlay.content)) as shown:
            assert (shown.size, shown.format) == (picture.size, "PNG")
    single = client.post(
        "/jobs/predict",
        files={"file": ("a.png", scans["21.png"])},
        data={"explain": "true"},
        headers={"Prefer": "wait=60"},
    )
    assert single.status_code == 200, single.text
    (row,) = client.get(single.json()["links"]["results"]).json()["data"]
    assert client.get(row["explanation"]).content == client.get(found["21.png"]["explanation"]).content


def test_a_summary_counts_classes_and_errors(client: Client, trained: dict[str, Any], picture: Image.Image) -> None:
    scans = {f"{angle}.png": encoded(picture.rotate(angle)) for angle in (31, 32, 33)}
    job = predicted(client, {**scans, "text.png": b"no image"})
    summary = client.get(job["links"]["summary"]).json()
    assert sum(summary["classes"].values()) == 3
    assert summary["errors"] == {"NOT_AN_IMAGE": 1}
    drawn = client.get(job["links"]["summary"], headers={"Accept": "image/png"})
    assert drawn.content.startswith(b"\x89PNG")
