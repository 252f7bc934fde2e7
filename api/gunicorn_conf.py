"""gunicorn: one process, many threads, since most of them wait.

Start it with `python -m gunicorn -c api/gunicorn_conf.py --bind HOST:PORT "api:create_app()"`. The arbiter reads this
file too, so our modules are imported in the function only: 25 MB for the arbiter instead of 38.
"""

import signal
from types import FrameType
from typing import Any

worker_class = "api.server.worker.Worker"
workers = 1  # one change listener and one connection pool; workers do the work
threads = 256  # each waiting client holds one; RENALQ_WAIT_SLOTS leaves some for others
backlog = 2048
keepalive = 30
graceful_timeout = 8
timeout = 60
accesslog = None  # api/http/request_log.py writes a line without patient data
loglevel = "warning"
logger_class = "api.server.log.Log"
control_socket_disable = True  # unused, and it would create a socket in the home folder
# Heartbeats in memory: a full or slow disk must not make the arbiter kill a live worker.
worker_tmp_dir = "/dev/shm"  # noqa: S108


def post_worker_init(worker: Any) -> None:
    """Log as JSON, and let SIGTERM wake all waiting requests, so that they do not delay the shutdown."""
    from jobs import logs

    services = worker.wsgi.extensions["renalq"]
    logs.configure("api", services.settings.log_level)

    def wake_and_end(number: int, frame: FrameType | None) -> None:
        services.listener.close()
        worker.handle_exit(number, frame)

    signal.signal(signal.SIGTERM, wake_and_end)
