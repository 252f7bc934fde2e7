"""Resumable uploads: tus 1.0.0 (https://tus.io/protocols/resumable-upload)."""

import base64
import datetime as dt
import uuid
from typing import Any

import marshmallow as ma
from flask import Response, current_app, request
from marshmallow import fields, validate
from werkzeug.datastructures import FileStorage
from werkzeug.http import http_date

from api.http.auth import needs
from api.http.bodies import UNSUPPORTED_MEDIA, Blueprint
from api.http.body.transfer_encoding import decode_base64
from api.http.context import services
from api.http.fields import Time
from api.http.idempotency import idempotent
from api.http.problems import InvalidFields
from api.http.versioning import address
from api.intake import scan_store, upload_store
from jobs.errors import OtherTusVersion, TooLarge, UnsupportedMedia, WrongOffset
from jobs.keys import Scope
from jobs.tables import Upload

VERSION = "1.0.0"
CHUNK = "application/offset+octet-stream"
BIGINT_DIGITS = 18

blueprint = Blueprint("uploads", __name__, url_prefix="/uploads", description="Resumable uploads (tus 1.0.0).")


class Bytes(fields.Integer):
    """A number of bytes in a header: only digits."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if not (value.isascii() and value.isdigit() and len(value) <= BIGINT_DIGITS):
            raise self.make_error("invalid")
        return int(value)


class TusHeaders(ma.Schema):
    """Headers of every request."""

    class Meta:
        unknown = ma.EXCLUDE

    version = fields.String(data_key="Tus-Resumable", required=True, validate=validate.OneOf([VERSION]))


class NewUploadHeaders(TusHeaders):
    """Size of a new file (bytes), and its name as `filename BASE64`."""

    size = Bytes(data_key="Upload-Length", required=True, validate=validate.Range(0))
    metadata = fields.String(data_key="Upload-Metadata", load_default="")


class ChunkHeaders(TusHeaders):
    """Offset of a chunk in the file (bytes)."""

    offset = Bytes(data_key="Upload-Offset", required=True, validate=validate.Range(0))


class UploadSchema(ma.Schema):
    """A new upload: PATCH its `Location`."""

    id = fields.UUID(required=True)
    name = fields.String(required=True, allow_none=True)
    size = fields.Integer(required=True)
    created_at = Time(required=True)


@blueprint.before_request
def _check_version() -> None:
    if request.method != "OPTIONS" and request.headers.get("Tus-Resumable") != VERSION:
        raise OtherTusVersion(version=VERSION)


@blueprint.after_request
def _add_tus_headers(response: Response) -> Response:
    response.headers["Tus-Resumable"] = VERSION
    response.headers["Tus-Version"] = VERSION
    return response


@blueprint.route("", methods=["OPTIONS"])
@needs(Scope.JOBS_WRITE)
@blueprint.response(204)
@blueprint.doc(operationId="describeUploads")
def describe() -> tuple[None, int, dict[str, str]]:
    """Show the supported tus version and extensions."""
    limit = services().settings.max_upload_bytes
    return None, 204, {"Tus-Extension": "creation,expiration,termination", "Tus-Max-Size": str(limit)}


@blueprint.route("", methods=["POST"])
@needs(Scope.JOBS_WRITE)
@blueprint.arguments(NewUploadHeaders, location="headers")
@blueprint.response(201, UploadSchema)
@blueprint.doc(operationId="createUpload")
@idempotent()
def create_upload(headers: dict[str, Any]) -> tuple[Upload, int, dict[str, str]]:
    """Create an upload."""
    upload = upload_store.create(headers["size"], _file_name(headers["metadata"]))
    return upload, 201, {"Location": address(f"/uploads/{upload.id}"), **_expiry(upload)}


@blueprint.route("/<id:upload_id>", methods=["HEAD"])
@needs(Scope.JOBS_WRITE)
@blueprint.arguments(TusHeaders, location="headers")
@blueprint.response(200)
@blueprint.doc(operationId="getUploadOffset")
def get_offset(headers: dict[str, Any], upload_id: uuid.UUID) -> Response:
    """Show how many bytes of an upload were received, in `Upload-Offset`."""
    upload, offset = upload_store.find(upload_id)
    headers_ = {"Upload-Length": str(upload.size), **_at(offset, upload)}
    if upload.name is not None:
        headers_["Upload-Metadata"] = f"filename {base64.b64encode(upload.name.encode()).decode()}"
    response = current_app.response_class(headers=headers_)
    del response.headers["Content-Type"]
    return response


@blueprint.route("/<id:upload_id>", methods=["PATCH"])
@needs(Scope.JOBS_WRITE)
@blueprint.arguments(ChunkHeaders, location="headers")
@blueprint.response(204)
@blueprint.doc(
    operationId="appendToUpload",
    requestBody={"required": True, "content": {CHUNK: {"schema": {"type": "string", "format": "binary"}}}},
    responses=UNSUPPORTED_MEDIA,
)
def append(headers: dict[str, Any], upload_id: uuid.UUID) -> tuple[None, int, dict[str, str]]:
    """Append the next chunk. If it is cut off, the received bytes are kept."""
    if request.mimetype != CHUNK:
        raise UnsupportedMedia(f"Send the piece as {CHUNK}.")
    with upload_store.lock_upload(upload_id) as locked:
        if headers["offset"] != locked.offset:
            raise WrongOffset(given=headers["offset"], offset=locked.offset, size=locked.upload.size)
        length = 0 if request.content_encoding else request.content_length or 0
        if length > locked.upload.size - locked.offset:
            raise TooLarge(f"The piece goes beyond the upload's {locked.upload.size} bytes. Send only what is missing.")
        locked.append(request.stream)
        return None, 204, _at(locked.offset, locked.upload)


@blueprint.route("/<id:upload_id>", methods=["DELETE"])
@needs(Scope.JOBS_WRITE)
@blueprint.arguments(TusHeaders, location="headers")
@blueprint.response(204)
@blueprint.doc(operationId="deleteUpload")
def delete_upload(headers: dict[str, Any], upload_id: uuid.UUID) -> None:
    """Delete an upload."""
    with upload_store.lock_upload(upload_id) as locked:
        locked.remove()


def _at(offset: int, upload: Upload) -> dict[str, str]:
    return {"Upload-Offset": str(offset), **_expiry(upload)}


def _expiry(upload: Upload) -> dict[str, str]:
    return {"Upload-Expires": http_date(upload_store.expires_at(upload).astimezone(dt.UTC))}


def _file_name(metadata: str) -> str | None:
    """The value of `filename` in `Upload-Metadata`: pairs of a key and base64."""
    for pair in metadata.split(","):
        name, _, value = pair.strip().partition(" ")
        if name == "filename":
            try:
                name = b"".join(decode_base64([value])).decode()
            except ValueError:
                raise InvalidFields([("/headers/Upload-Metadata", "`filename` must be UTF-8 in base64.")]) from None
            return scan_store.file_name(FileStorage(filename=name))
    return None
