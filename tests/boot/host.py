"""What the boot tests need of this machine, and leave as it was."""

import atexit
import itertools
import os
import shutil
import signal
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any, List, Optional, Sequence

CACHE = Path(os.environ.get("BOOT_CACHE", "/var/cache/azure-provision-boot"))
RUN = CACHE / "run"  # directories that a run makes
NETNS = Path("/run/netns")  # ip-netns(8)
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def missing() -> List[str]:
    """What the boot tests need and this machine does not have."""
    tools = ("systemd-nspawn", "mmdebstrap", "ip", "dnsmasq")
    absent = [tool for tool in tools if which(tool) is None]
    return absent if os.geteuid() == 0 else ["root", *absent]


def skip_if(absent: Sequence[str]) -> None:
    """Skip the tests if anything is missing."""
    if absent:
        raise unittest.SkipTest(f"a boot needs {', '.join(absent)}")


def note(text: str) -> None:
    """Add TEXT to the file that BOOT_FIGURES names, if it names one."""
    path = os.environ.get("BOOT_FIGURES")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            print(text, file=file)


def which(tool: str) -> Optional[str]:
    return shutil.which(tool, path=PATH)


def attempt(
    *words: Any, cwd: Optional[Path] = None, stderr: int = subprocess.STDOUT, **environment: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, whatever its status; its errors are part of its output."""
    environment.update(PATH=PATH, LC_ALL="C.UTF-8")
    return subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        encoding="utf-8",
        errors="replace",
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )


def command(*words: Any, **options: Any) -> str:
    """The output of a command that succeeds; raises RuntimeError with its errors."""
    done = attempt(*words, stderr=subprocess.PIPE, **options)
    if done.returncode:
        raise RuntimeError(f"{words}: status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


# What a run makes is named after its process, and removed when that ends, or by the next run.

_numbers = itertools.count()


def new_name() -> str:
    """A name of our own, with the number of this process."""
    number = next(_numbers)
    if number == 0:
        sweep()
        atexit.register(sweep)
        for name in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, lambda number, frame: sys.exit(128 + number))
    return f"azboot-{os.getpid()}-{number}"


def new_directory() -> Path:
    """A directory that anybody can read."""
    directory = RUN / new_name()
    directory.mkdir(parents=True)
    return directory


def sweep() -> None:
    """Remove what is named after this process, or after one that is gone."""
    for path in [*NETNS.glob("azboot-*"), *RUN.glob("azboot-*")]:
        process = path.name.split("-")[1]
        if process != str(os.getpid()) and Path("/proc", process).exists():
            continue
        if path.parent == NETNS:
            command("ip", "netns", "delete", path.name)
        else:
            remove_tree(path)


def remove_tree(directory: Path) -> None:
    """Remove a directory, and the root that may be mounted there."""
    attempt("umount", "--lazy", directory / "root")
    shutil.rmtree(str(directory), ignore_errors=True)
