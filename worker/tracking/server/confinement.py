"""Rights on files for this process and its children, by Landlock (Linux 5.13): the programs of this machine, and one
folder.

See https://docs.kernel.org/userspace-api/landlock.html. It holds for root as well.
"""

import sys
from pathlib import Path

PROGRAMS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/nix")
"""Not /proc, where root reads the environment of all processes."""
RESOLVER = "/run/systemd/resolve"
"""Where /etc/resolv.conf may lead."""


def confine(folder: Path) -> bool:
    """Leave this process no file but programs, which it may read and run, and those in `folder`. False: the kernel
    cannot do that, and nothing has changed."""
    if sys.platform != "linux":
        return False
    from landlockpy import AccessFS, AccessNet, Ruleset, fs_for_abi, supported

    if not supported():
        return False
    read = AccessFS.READ_FILE | AccessFS.READ_DIR | AccessFS.EXECUTE
    with Ruleset(handled_net=AccessNet.NONE) as rules:
        for path in _readable(folder):
            rules.allow_path(path, read)
        rules.allow_path("/dev", read | AccessFS.WRITE_FILE)
        rules.allow_path(folder, fs_for_abi(rules.abi_version))
        rules.restrict()
    return True


def _readable(folder: Path) -> set[Path]:
    """Folders of programs and of Python, without those that hold `folder`: RENALQ_HOME may lie in the checkout."""
    wanted = [*PROGRAMS, RESOLVER, sys.prefix, sys.base_prefix, *sys.path, str(Path(__file__).parent)]
    found = {Path(path).resolve() for path in wanted if path and Path(path).is_dir()}
    return {path for path in found if not folder.is_relative_to(path)}
