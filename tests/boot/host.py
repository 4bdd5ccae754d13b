"""What the boot tests need of this machine, and leave as it was."""

import atexit
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, List, Optional

CACHE = Path(os.environ.get("BOOT_CACHE", "/var/cache/azure-provision-boot"))
RUN = CACHE / "run"  # what a run makes, each part named after its process
PREFIX = "azboot"  # of network namespaces and interfaces; an interface has 15 characters at most


def missing() -> List[str]:
    """What the boot tests need and this machine does not have."""
    tools = {"systemd-nspawn": "systemd-container", "mmdebstrap": "mmdebstrap"}
    tools.update({"ip": "iproute2", "dnsmasq": "dnsmasq-base"})
    absent = [f"{tool} ({tools[tool]})" for tool in tools if which(tool) is None]
    return absent if os.geteuid() == 0 else ["root", *absent]


def which(tool: str) -> Optional[str]:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def command(*words: Any, cwd: Optional[Path] = None, **environment: Any) -> str:
    """The output of a command that succeeds; raises CalledProcessError with its errors."""
    path = {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
    process = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        cwd=str(cwd) if cwd else None,
        env=dict(os.environ, **path, **{name: str(v) for name, v in environment.items()}),
    )
    if process.returncode:
        raise RuntimeError(f"{words}: status {process.returncode}: {process.stderr[-2000:]}")
    return process.stdout


# Everything that a run makes, removed at its end, or by the next run if this one is killed.

_numbers = itertools.count(1)
_undo: List[Callable[[], Any]] = []


def number() -> int:
    """A number that no other part of this run has."""
    return next(_numbers)


def undo_at_exit(action: Callable[[], Any]) -> None:
    """Have ACTION done at the end of this process, if nothing does it before."""
    if not _undo:
        atexit.register(clean_up)
        for name in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, lambda number, frame: sys.exit(128 + number))
        sweep()
    _undo.append(action)


def clean_up() -> None:
    """Undo all that is still there, the newest first."""
    while _undo:
        _undo.pop()()


def sweep() -> None:
    """Remove what runs left behind that were killed."""
    for entry in command("ip", "netns", "list").split():
        if entry.startswith(PREFIX) and not Path("/proc", entry.split("-")[1]).exists():
            command("ip", "netns", "delete", entry)
    for directory in RUN.glob("*-*"):
        if not Path("/proc", directory.name.split("-")[0]).exists():
            remove_tree(directory)


def remove_tree(directory: Path) -> None:
    """Remove the copy of an image."""
    subprocess.call(
        ["umount", "--lazy", str(directory / "root")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    shutil.rmtree(str(directory), ignore_errors=True)
