#!/usr/bin/env python3
"""Provision an Azure VM that has no provisioning agent, once, at its first boot.

Report Ready to the WireServer, set the hostname from IMDS, publish it through DHCP, and disable
the unit that ran this. Each event is one line on standard output.
Exit status: 0 provisioned (or not on Azure, or a dry run), 1 failed, 2 refused.
"""

import json
import os
import re
import select
import socket
import struct
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import closing, suppress
from errno import EHOSTUNREACH, ENETUNREACH
from http.client import HTTPConnection
from subprocess import STDOUT, CalledProcessError, TimeoutExpired, check_output
from typing import Callable, Dict, List, Sequence, Set, Tuple, TypeVar
from xml.etree import ElementTree

__version__ = "1.2.0"
T = TypeVar("T")
UNIT = "azure-provisioning.service"
HOSTNAME_FILE = "/etc/hostname"  # hostname(5)
ROUTE_FILE = "/proc/self/net/route"  # proc_net(5)
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6  # sd-daemon(3)
RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTM_NEWADDR = 0x10, 0x40, 20  # <linux/rtnetlink.h>

# https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
# https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
WIRESERVER = "168.63.129.16"
IMDS = "169.254.169.254"
WIRESERVER_HEADERS = {"x-ms-version": "2012-11-30", "x-ms-agent-name": "custom-provisioning"}
HEALTH_HEADERS = {"Content-Type": "text/xml;charset=utf-8", **WIRESERVER_HEADERS}
HEALTH_REPORT = (
    "<Health><GoalStateIncarnation>{}</GoalStateIncarnation><Container><ContainerId>{}</ContainerId>"
    "<RoleInstanceList><Role><InstanceId>{}</InstanceId><Health><State>Ready</State></Health></Role>"
    "</RoleInstanceList></Container></Health>"
)
IMDS_HEADERS = {"Metadata": "true"}
# Without "extended", parts of the metadata may be missing from a 200, so that a VM would seem to
# have no computer name: https://github.com/Azure/azure-init/issues/134
METADATA = "/metadata/instance?api-version=2021-08-01&extended=true"
OLD_METADATA = "/metadata/instance?api-version=2017-12-01"  # has only the resource's name
# "MSFT AZURE VM" as decimal ASCII codes. Arm VMs and those of Azure Stack Hub have this tag, too.
AZURE_CHASSIS_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
CHASSIS_ASSET_TAG_FILE = "/sys/class/dmi/id/chassis_asset_tag"

READY_LIMIT, HOSTNAME_LIMIT = 20 * 60, 5 * 60  # seconds: Azure reboots a VM after 20 minutes
CONNECT_TIMEOUT = 10  # seconds, so that a lost SYN is soon sent again
RESPONSE_TIMEOUT = 60  # seconds: https://github.com/canonical/cloud-init/pull/1571
COMMAND_TIMEOUT = 30  # seconds, for each command
NETWORK_TIMEOUT = 30  # seconds, for the network to be back after DHCP was asked again
MIN_PAUSE, MAX_PAUSE = 0.5, 1.0  # seconds between attempts; IMDS allows 5 requests a second
MAX_BODY = 1024 * 1024  # bytes of a response; a goal state has about 3,000

# hostname(7), but a label may have 64, Linux's limit. hostnamectl would silently drop a "_".
HOSTNAME = r"(?=.{1,64}\Z)[A-Za-z0-9]+((\.|-+)[A-Za-z0-9]+)*\Z"

# For each DHCP client: the command that shows the state of interface {}, a pattern that matches its
# output if the client manages {}, and the command that sends the DHCP request again with the new
# name ("networkctl renew" and "nmcli device reapply" don't). An interface that is up can still be
# "configuring", or in NetworkManager's states 40 to 90, because of IPv6 or a dispatcher script.
DHCP_CLIENTS = (
    ("networkctl --no-legend list {}", " configur(ed|ing)$", "networkctl reconfigure {}"),
    # before systemd 244, which brought "reconfigure"
    ("networkctl status {}", r"\(configur(ed|ing)\)", "systemctl try-restart systemd-networkd"),
    ("nmcli -g GENERAL.STATE device show {}", r"^[4-9]0|\(connected\)$", "nmcli device connect {}"),
    ("systemctl is-active ifup@{}.service", "^active$", "systemctl restart ifup@{}.service"),
    ("ifquery --state {}", "=", "systemctl try-restart networking.service"),  # prints "eth0=eth0"
    ("dhcpcd -U {}", "=", "systemctl try-restart dhcpcd.service"),  # prints variables
)


class ProvisioningError(Exception):
    """A failure that ends or repeats a step; the message is a line for the log."""


def log(priority: int, message: str) -> None:
    """Print MESSAGE as one line of ASCII; the journal takes its priority from a prefix."""
    line = message[:1000].encode("unicode_escape").decode("ascii")
    with suppress(OSError):  # standard output is closed; don't fail for that
        stdout = os.fstat(1)  # the variable may be inherited: does it name this very output?
        if os.environ.get("JOURNAL_STREAM") == f"{stdout.st_dev}:{stdout.st_ino}":
            line = f"<{priority}>{line}"  # sd-daemon(3), systemd.exec(5)
        os.write(1, f"{line}\n".encode("ascii"))


def reason(error: Exception) -> str:
    """Return what ERROR says, without its number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def network_events() -> socket.socket:
    """Return a socket on which the kernel tells of new IPv4 addresses and routes: rtnetlink(7)."""
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    events.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
    return events


def wait_for_event(events: socket.socket, limit: float) -> Set[Tuple[int, int]]:
    """Wait up to LIMIT s for network events; return the type and the interface of each."""
    seen = set()
    while select.select([events], [], [], limit)[0]:
        limit = 0  # take those that have come, and wait no longer
        with suppress(OSError):  # ENOBUFS: some are lost
            # nlmsghdr: 4 bytes, type (2), 10 bytes; ifaddrmsg: 4 bytes, index (4)
            seen.add(struct.unpack_from("=4xH14xI", events.recv(65536)))
    return seen


def keep_trying(attempt: Callable[[], T], limit: float) -> T:
    """Call ATTEMPT until it succeeds, for LIMIT s; return its result. All retries are here."""
    start = time.monotonic()
    logged = ""
    with network_events() as events:
        while True:
            try:
                return attempt()
            except ProvisioningError as error:
                problem, cause = str(error), error.__cause__
            spent = time.monotonic() - start
            if spent >= limit:
                raise ProvisioningError(f"{problem}; gave up after {spent:.0f} s")
            if problem != logged:
                log(WARNING, f"{problem}; retrying for up to {limit - spent:.0f} s")
                logged = problem
            no_route = getattr(cause, "errno", 0) in (ENETUNREACH, EHOSTUNREACH)
            pause = 0 if no_route else MIN_PAUSE  # if anything was sent, even an event has to wait
            time.sleep(pause)
            wait_for_event(events, MAX_PAUSE - pause)


def exchange(
    host: str, path: str, headers: Dict[str, str], accept: Sequence[int], report: str = ""
) -> Tuple[str, bytes]:
    """GET PATH, or post REPORT there; return the status line and the body of a status in ACCEPT."""
    method = "POST" if report else "GET"
    try:
        with closing(HTTPConnection(host, timeout=CONNECT_TIMEOUT)) as connection:
            connection.connect()
            connection.sock.settimeout(RESPONSE_TIMEOUT)
            connection.request(method, path, report.encode("utf-8") or None, headers)
            with connection.getresponse() as response:
                status_line = f"{response.status} {response.reason}"
                if response.status not in accept:
                    raise ProvisioningError(status_line)
                body = b"" if report else response.read(MAX_BODY)  # a report's means nothing
    except Exception as error:  # whatever it is, it is retried
        raise ProvisioningError(f"{host}: {method} {path}: {reason(error)}") from error
    return status_line, body


def fetch_goal_state(wireserver: str) -> Tuple[str, str, str]:
    """Ask the WireServer which VM this is; return the incarnation, ContainerId and InstanceId."""
    _, body = exchange(wireserver, "/machine?comp=goalstate", WIRESERVER_HEADERS, (200,))
    try:
        text = body.decode("utf-8-sig")  # parsing str ignores the declared encoding
        if "<!DOCTYPE" in text:  # its entities can make a small document fill the memory
            raise ProvisioningError("The goal state has a DOCTYPE")
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ProvisioningError(f"The goal state is not valid XML: {error}") from None
    container_id = root.findtext("Container/ContainerId", "").strip()
    instance_id = root.findtext("Container/RoleInstanceList/RoleInstance/InstanceId", "").strip()
    if not container_id or not instance_id:  # for a moment there may be no role instance
        raise ProvisioningError("The goal state has no ContainerId or no InstanceId")
    return root.findtext("Incarnation", "").strip() or "1", container_id, instance_id


def report_ready(wireserver: str, dry_run: bool) -> None:
    """Tell the WireServer that the VM is ready; a dry run only shows what it would be told."""
    logged = set()

    def attempt() -> str:
        ids = fetch_goal_state(wireserver)  # each time: 410 means that it has moved on
        report = HEALTH_REPORT.format(*(i.replace("&", "&amp;").replace("<", "&lt;") for i in ids))
        if report not in logged:  # before it can be rejected: Azure support asks for its ids
            logged.add(report)
            log(INFO, f"Health report: {report}")
        if dry_run:
            return "none, because nothing is posted in a dry run"
        path, success = "/machine?comp=health", range(200, 300)
        return exchange(wireserver, path, HEALTH_HEADERS, success, report)[0]

    log(INFO, f"Response: {keep_trying(attempt, READY_LIMIT)}")


def fetch_hostname(imds: str) -> str:
    """Return the hostname that the user gave this VM, from IMDS; it is valid, so safe to use."""

    def attempt() -> Tuple[str, str]:
        status_line, body = exchange(imds, METADATA, IMDS_HEADERS, (200, 400))
        if status_line.startswith("400"):  # an older IMDS (Azure Stack Hub)
            _, body = exchange(imds, OLD_METADATA, IMDS_HEADERS, (200,))
        try:
            compute = json.loads(body.decode("utf-8-sig"))["compute"]
            computer_name = (compute.get("osProfile") or {"computerName": ""})["computerName"]
            # "name" is the VM resource's, in a scale set not even a hostname ("myset_0")
            name = computer_name or compute["name"]
            return name.strip(), "computerName" if computer_name else "name"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ProvisioningError(f"IMDS did not send metadata, but: {body[:100]!r}") from None

    name, source = keep_trying(attempt, HOSTNAME_LIMIT)
    if not re.match(HOSTNAME, name):
        raise ProvisioningError(f"The {source} in IMDS is not a valid hostname: {name[:100]}")
    log(INFO, f"Hostname: {name} ({source})")
    return name


def run(command: str) -> str:
    """Run COMMAND, split at spaces; return all that it prints."""
    # not this process's environment: SYSTEMD_COLORS and the like change what a command prints
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    words = command.split(" ")
    try:
        output = check_output(words, stderr=STDOUT, env=env, timeout=COMMAND_TIMEOUT)
        return output.decode("latin-1").strip()  # decodes any byte
    except CalledProcessError as error:
        problem = error.output.decode("latin-1").strip() or f"status {error.returncode}"
    except (OSError, TimeoutExpired) as error:
        problem = reason(error)
    raise ProvisioningError(f"{words[0]}: {problem}")


def set_hostname(name: str) -> bool:
    """Make NAME the hostname, now and after a reboot; return whether it is stored for that."""
    try:
        run(f"hostnamectl set-hostname {name}")
        log(INFO, "Hostname set by hostnamectl")
    except ProvisioningError as error:  # it needs D-Bus and a writable root
        log(NOTICE, f"{error}; setting the hostname without hostnamectl")
        socket.sethostname(name)
    try:
        with open(HOSTNAME_FILE, "w", encoding="ascii") as file:
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())  # hostnamectl does not, and the unit runs only once
    except OSError as error:
        log(WARNING, f"{HOSTNAME_FILE}: {reason(error)}; {UNIT} stays enabled for the next boot")
        return False
    return True


def publish_hostname() -> None:
    """Have the DHCP client send its request again, with the new name, and wait for the network."""
    # Azure's DNS learns the name from that alone: https://github.com/Azure/azure-init/issues/68
    try:
        interface, started = azure_interface(), time.monotonic()
        with network_events() as events:
            log(INFO, f"DHCP request sent again by {ask_dhcp_again(interface)}")
            wait_for_network(interface, events)
        log(INFO, f"The network of {interface} was back after {time.monotonic() - started:.2f} s")
    except (ProvisioningError, OSError) as error:
        log(NOTICE, f"{reason(error)}; DNS may not have the hostname until the next boot")


def azure_interface() -> str:
    """Return the interface of the best route to Azure, or "": proc_net(5)."""
    (azure,) = struct.unpack("=I", socket.inet_aton(WIRESERVER))
    routes = []
    with open(ROUTE_FILE, "rb") as file:
        for line in list(file)[1:]:
            interface, destination, *_, metric, mask, _, _, _ = line.split()
            if azure & int(mask, 16) == int(destination, 16) and interface != b"*":  # "*" rejects
                routes.append((int(mask, 16), -int(metric), os.fsdecode(interface)))
    # as the kernel: the longest prefix, then the lowest metric, then the first
    return max(routes, key=lambda route: route[:2], default=(0, 0, ""))[2]


def ask_dhcp_again(interface: str) -> str:
    """Have the DHCP client of INTERFACE send its request again; return the command that did."""
    if not interface:
        raise ProvisioningError(f"DHCP request not sent again: no route to {WIRESERVER}")
    problems = [f"no known DHCP client manages {interface}"]
    for show, managed, publish in DHCP_CLIENTS:
        try:
            if re.search(managed, run(show.format(interface))):
                run(publish.format(interface))
                return publish.format(interface)
        except ProvisioningError as error:  # not installed, not running, or an old version
            problems.append(str(error))
    raise ProvisioningError("DHCP request not sent again: " + "; ".join(dict.fromkeys(problems)))


def wait_for_network(interface: str, events: socket.socket) -> None:
    """Wait until INTERFACE has got an address and leads to Azure again."""
    deadline = time.monotonic() + NETWORK_TIMEOUT
    new_address, seen = (RTM_NEWADDR, socket.if_nametoindex(interface)), wait_for_event(events, 0)
    while new_address not in seen or azure_interface() != interface:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ProvisioningError(f"{interface} has no network again after {NETWORK_TIMEOUT} s")
        seen |= wait_for_event(events, left)


def disable_unit() -> None:
    """Disable the unit. Never fails: the VM is provisioned all the same."""
    try:
        # Without --no-reload systemd would read every unit again while this one waits.
        run(f"systemctl disable --no-reload {UNIT}")
        log(INFO, f"{UNIT} disabled")
    except ProvisioningError as error:
        log(WARNING, f"{error}; {UNIT} will run again at the next boot")


def main(arguments: List[str]) -> int:
    """Run the steps, which stand above in this order; return the exit status."""
    started = time.monotonic()
    options = Namespace(wireserver=None, imds=None, dry_run=False)
    if arguments:  # the unit gives none, and a parser takes 3 ms
        parser = ArgumentParser("azure_provision.py", description=__doc__, allow_abbrev=False)
        option = parser.add_argument
        option("--wireserver", metavar="HOST[:PORT]", help=f"a fake one instead of {WIRESERVER}")
        option("--imds", metavar="HOST[:PORT]", help=f"and instead of {IMDS}")
        option("--dry-run", action="store_true", help="show what would be sent and set; do neither")
        option("--version", action="version", version=f"%(prog)s {__version__}")
        options = parser.parse_args(arguments)
        if [options.wireserver, options.imds].count(None) == 1 or "" in vars(options).values():
            parser.error("give both --wireserver and --imds, or neither")
    if not options.wireserver:  # a fake one can be tried on any machine
        tag = AZURE_CHASSIS_ASSET_TAG  # if there is no file, as in a container
        with suppress(OSError), open(CHASSIS_ASSET_TAG_FILE, encoding="latin-1") as file:
            tag = file.read().strip()
        if tag != AZURE_CHASSIS_ASSET_TAG:
            log(NOTICE, f'Not on Azure (the chassis asset tag is "{tag}"): nothing to do')
            return 0
        if os.geteuid() != 0 and not options.dry_run:
            log(ERROR, "Not root: nothing was sent; run it as root, or with --dry-run")
            return 2
    try:
        report_ready(options.wireserver or WIRESERVER, options.dry_run)
        hostname = fetch_hostname(options.imds or IMDS)
        if options.dry_run:
            log(INFO, "Dry run: nothing was posted, nothing was changed")
            return 0
        changed = hostname != socket.gethostname()
        stored = set_hostname(hostname)
        if changed:  # or else DHCP has sent it
            publish_hostname()
        if stored:
            disable_unit()
    except (ProvisioningError, OSError) as error:
        next_step = "" if options.dry_run else "; the next boot tries again"
        log(ERROR, f"Not provisioned: {reason(error)}{next_step}")
        return 1
    except KeyboardInterrupt:
        log(ERROR, "Interrupted")
        return 130
    log(INFO, f"Provisioned as {hostname} in {time.monotonic() - started:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
