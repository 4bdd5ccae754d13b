"""The networks of the boot tests: namespaces of this machine, which nothing leaves."""

import ctypes
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import List, NamedTuple

from azure_provision import IMDS, WIRESERVER
from tests.boot.host import NETNS, command, new_name, which
from tests.fake_azure import Address, FakeAzure, listen

HOST_INTERFACE = "host0"  # the machine's end of a cable
CLONE_NEWNET = 0x40000000  # setns(2)


class Namespace:
    def __init__(self) -> None:
        self.name = new_name()
        self.path = NETNS / self.name
        command("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def remove(self) -> None:
        command("ip", "netns", "delete", self.name)

    def ip(self, *words: str) -> str:
        return command("ip", "-n", self.name, *words)

    def add_platform(self) -> None:
        """Give it the addresses of the WireServer and of IMDS."""
        for address in (WIRESERVER, IMDS):
            self.ip("address", "add", f"{address}/32", "dev", "lo")

    def _enter(self) -> None:
        """Move this thread into the namespace."""
        with self.path.open() as file:
            assert ctypes.CDLL(None).setns(file.fileno(), CLONE_NEWNET) == 0

    def azure(
        self, wireserver: Address = (WIRESERVER, 80), imds: Address = (IMDS, 80)
    ) -> FakeAzure:
        """Listen at the platform's addresses here, which may come later."""
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._enter).result()
            # A socket stays in the namespace that it was made in.
            return FakeAzure(wireserver, imds, lambda at: thread.submit(listen, at).result())


def add_interface(host: Namespace, name: str) -> None:
    """Add an interface that leads nowhere: the other end of its cable is up, and on the floor."""
    other_end = f"{name}-end"
    host.ip("link", "add", name, "type", "veth", "peer", "name", other_end)
    host.ip("link", "set", other_end, "up")


def connect(router: Namespace, host: Namespace) -> str:
    """Lay a cable between two namespaces; return the name of its router's end."""
    cable = "cable"
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
            stderr=subprocess.PIPE,
            universal_newlines=True,
        )
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                found = re.search(r"DHCPACK\(\S+\) (\S+) \S+ ?(\S*)", line)
                if found:
                    now = time.monotonic()
                    self.acknowledgements.append(Acknowledgement(now, *found.groups()))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.thread.join()
