"""gunicorn: one process, many threads, since most of them wait.

Start it with `python -m gunicorn -c api/gunicorn_conf.py --bind HOST:PORT "api:create_app()"`. The arbiter
reads this file as well as the worker, so nothing of ours is imported at its top: 25 MB for the arbiter, not 38.
"""

import signal
from types import FrameType
from typing import Any

worker_class = "gthread"
workers = 1  # one listener and one pool of connections; the work is done elsewhere
threads = 256  # a waiting client holds one; RENALQ_WAIT_SLOTS leaves some for the others
worker_connections = 4 * threads
keepalive = 30
graceful_timeout = 8
timeout = 60
accesslog = None  # api/http/request_log.py writes a line without anything of a patient
loglevel = "warning"
control_socket_disable = True  # nobody speaks to it, and it would write a socket into the home folder
# Heartbeats into memory: a full or slow disk must not make the arbiter kill a living worker.
worker_tmp_dir = "/dev/shm"  # noqa: S108


def post_worker_init(worker: Any) -> None:
    """Log as JSON, and let SIGTERM wake everybody who waits: a hundred of them must not hold up the end."""
    from jobs import logs

    services = worker.wsgi.extensions["renalq"]
    logs.configure("api", services.settings.log_level)

    def wake_and_end(number: int, frame: FrameType | None) -> None:
        services.listener.close()
        worker.handle_exit(number, frame)

    signal.signal(signal.SIGTERM, wake_and_end)
