"""Hooks of schemathesis' command line, to fuzz a running stack:

SCHEMATHESIS_HOOKS=tests.abuse.fuzzing schemathesis run http://127.0.0.1:8080/openapi.json --phases fuzzing \\
    -H "Authorization: Bearer $KEY"
"""

import schemathesis

# tus' own media type for pieces of files, of which schemathesis knows no serializer
schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


@schemathesis.hook
def before_call(context: object, case: schemathesis.Case, kwargs: dict[str, object]) -> None:
    """Nobody waits for a job that no worker takes."""
    case.headers["Prefer"] = "wait=0"
