"""Python imports this by itself at the start of each process whose PYTHONPATH names this folder.

It reads the environment variable SABOTAGE, a list in JSON made by `tests.faults.sabotage`, and patches the named
functions as soon as their modules are imported. The code under test knows nothing of it.
"""

import errno
import functools
import importlib
import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

ACTS = json.loads(os.environ.get("SABOTAGE", "[]"))
STUBS = {
    "stub_network": ("ml.image.serving.predictor", "stub_network.py"),
    "stub_training": ("ml.__main__", "stub_training.py"),
}
HERE = Path(__file__).resolve().parent


class Saboteur:
    """A finder before all others: it puts a stub in a module's place, or patches a module once it is imported."""

    def __init__(self, acts):
        self._stubs = dict(STUBS[act["do"]] for act in acts if act["do"] in STUBS)
        self._acts = [act for act in acts if "at" in act]

    def find_spec(self, name, path=None, target=None):
        if name in self._stubs:
            return importlib.util.spec_from_file_location(name, HERE / self._stubs[name])
        mine = [act for act in self._acts if act["at"].partition(":")[0] == name]
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None) if mine else None
        if spec is not None:
            _patch_after_import(spec.loader, mine)
        return spec


def _patch_after_import(loader, acts):
    real = loader.exec_module

    def exec_module(module):
        real(module)
        for act in acts:
            CONFIGURE(module, act) if act["do"] == "celery" else _wrap(module, act)

    loader.exec_module = exec_module


def CONFIGURE(module, act):  # noqa: N802
    """Other settings of Celery, where a case must wait for a time-out that is an hour long by default."""
    transport = dict(module.app.conf.broker_transport_options, **act.get("transport", {}))
    module.app.conf.update(act.get("settings", {}), broker_transport_options=transport)


def _wrap(module, act):
    *owners, name = act["at"].partition(":")[2].split(".")
    owner = functools.reduce(getattr, owners, module)
    real, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(real)
    def sabotaged(*args, **kwargs):
        mine = _given(act, args) and act["nth"] in (None, next(calls))
        if mine and act["when"] == "before":
            _act(act)
        answer = real(*args, **kwargs)
        if mine and act["when"] == "after":
            _act(act)
        return answer

    setattr(owner, name, sabotaged)


def _given(act, args):
    return act["given"] is None or any(act["given"] in str(arg) for arg in args)


def _act(act):
    if _first(act):
        DEEDS[act["do"]](act)


def _first(act):
    """Whether this is to be done now. The flag, with our process id in it, appears whole or not at all."""
    flag = Path(act["flag"])
    if flag.exists() and act["once"]:
        return False
    draft = flag.with_name(f"{flag.name}.{os.getpid()}.{time.monotonic_ns()}")
    draft.write_text(str(os.getpid()))
    try:
        os.link(draft, flag)  # refuses where another process was first
    except FileExistsError:
        return not act["once"]
    finally:
        draft.unlink()
    return True


# --- the deeds ---


def _kill(act):
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_tree(act):
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(act):
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang(act):
    while True:
        time.sleep(3600)


def _pause(act):
    while not Path(act["until"]).exists():
        time.sleep(0.02)


def _slow(act):
    time.sleep(act["seconds"])


def _raise(act):
    module, _, name = act["error"].rpartition(".")
    raise getattr(importlib.import_module(module), name)(act.get("text", "sabotage"))


def _enospc(act):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


DEEDS = {
    "kill": _kill,
    "kill_tree": _kill_tree,
    "stop": _stop,
    "hang": _hang,
    "pause": _pause,
    "slow": _slow,
    "raise": _raise,
    "enospc": _enospc,
    "note": lambda act: None,  # the flag says that it was reached
}


# --- a clock that is wrong ---


def _shift_clock(seconds):
    import datetime

    real_time, real_ns, real = time.time, time.time_ns, datetime.datetime
    off = datetime.timedelta(seconds=seconds)

    class Kind(type):
        def __instancecheck__(cls, thing):
            return isinstance(thing, real)

        def __subclasscheck__(cls, other):
            return issubclass(other, real)

    class Shifted(real, metaclass=Kind):
        def __new__(cls, *args, **kwargs):
            return real(*args, **kwargs)

        @classmethod
        def now(cls, tz=None):
            return real.now(tz) + off

        @classmethod
        def utcnow(cls):
            return real.now(datetime.UTC).replace(tzinfo=None) + off

    time.time = lambda: real_time() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)
    datetime.datetime = Shifted


if ACTS:
    sys.meta_path.insert(0, Saboteur(ACTS))
    for one in ACTS:
        if one["do"] == "clock":
            _shift_clock(one["seconds"])
