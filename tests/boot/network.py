"""The networks of the boot tests: namespaces of this machine, which nothing leaves."""

import ctypes
import os
import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Callable, List, NamedTuple, TypeVar

from azure_provision import IMDS, WIRESERVER
from tests.boot.host import PREFIX, command, number, undo_at_exit, which
from tests.fake_azure import Address, FakeAzure, listen

T = TypeVar("T")

HOST_INTERFACE = "host0"  # the machine's end of a cable


class Namespace:
    """A network namespace of its own; nothing leaves it."""

    def __init__(self) -> None:
        self.name = f"{PREFIX}-{os.getpid()}-{number()}"
        undo_at_exit(self.remove)
        command("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def remove(self) -> None:
        if Path("/run/netns", self.name).exists():
            command("ip", "netns", "delete", self.name)

    def ip(self, *words: str) -> str:
        return command("ip", "-n", self.name, *words)

    def add_platform(self) -> None:
        """Give it the addresses of the WireServer and of IMDS."""
        for address in (WIRESERVER, IMDS):
            self.ip("address", "add", f"{address}/32", "dev", "lo")

    def inside(self, action: Callable[[], T]) -> T:
        """Do ACTION in this namespace, in a thread of its own; a socket made there stays in it."""
        results: List[T] = []
        failures: List[BaseException] = []

        def enter() -> None:
            try:
                with open(f"/run/netns/{self.name}") as file:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(file.fileno(), 0x40000000):  # CLONE_NEWNET: setns(2)
                        raise OSError(ctypes.get_errno(), "setns")
                results.append(action())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return results[0]

    def azure(
        self, wireserver: Address = (WIRESERVER, 80), imds: Address = (IMDS, 80)
    ) -> FakeAzure:
        """Listen at the platform's addresses here, which may come later."""
        return FakeAzure(
            wireserver, imds, listen=lambda address: self.inside(lambda: listen(address))
        )


def connect(router: Namespace, host: Namespace) -> str:
    """Lay a cable between two namespaces; return the name of its router's end."""
    cable = f"{PREFIX}{number()}"
    router.ip("link", "add", cable, "type", "veth", "peer", "name", HOST_INTERFACE)
    router.ip("link", "set", HOST_INTERFACE, "netns", host.name)
    router.ip("address", "add", "10.0.0.1/16", "dev", cable)
    router.ip("link", "set", cable, "up")
    return cable


class Acknowledgement(NamedTuple):
    """A DHCPACK in dnsmasq's log: `dnsmasq-dhcp: DHCPACK(veth) 10.0.0.57 02:..:01 web-prod-01`."""

    time: float
    address: str
    name: str


class DhcpServer:
    """dnsmasq in the namespace of a router, at the other end of the machine's cable."""

    def __init__(self, router: Namespace, interface: str, *options: str) -> None:
        self.lines: List[str] = []
        self.acknowledgements: List[Acknowledgement] = []
        self.process = subprocess.Popen(
            [
                *("ip", "netns", "exec", router.name, which("dnsmasq") or "dnsmasq"),
                *("--keep-in-foreground", "--conf-file=/dev/null", "--log-facility=-"),
                *("--log-dhcp", "--port=0", "--bind-interfaces", f"--interface={interface}"),
                *("--dhcp-range=10.0.1.1,10.0.9.99,infinite", "--dhcp-authoritative"),
                *("--dhcp-leasefile=/dev/null", "--leasefile-ro", "--user=root"),
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                self.lines.append(line.rstrip())
                found = re.search(r"DHCPACK\(\S+\) (\S+) \S+ ?(\S*)", line)
                if found:
                    now = time.monotonic()
                    self.acknowledgements.append(Acknowledgement(now, *found.groups()))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.thread.join()
