#!/usr/bin/env python3
"""Provision an Azure VM that has no provisioning agent, once, at its first boot.

Report Ready to the WireServer, set the hostname from IMDS, publish it through DHCP, and disable
the unit that ran this. Responses are validated; failures are retried until a deadline; each event
is one line on standard output.
Exit status: 0 provisioned (or not on Azure, or a dry run), 1 failed, 2 refused.
"""

import sys

# Makes http.client's "import ssl" fail, harmlessly: the platform speaks plain HTTP; ssl takes 3 MB.
sys.modules["ssl"] = None  # type: ignore[assignment]

import argparse
import functools
import json
import mmap
import os
import re
import signal
import socket
import struct
import time
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection
from subprocess import PIPE, STDOUT, Popen
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple
from xml.etree import ElementTree

__version__ = "1.1.0"
Headers = Dict[str, str]
UNIT = "azure-provisioning.service"
HOSTNAME_FILE = "/etc/hostname"  # hostname(5)
ROUTE_FILE = "/proc/self/net/route"  # proc_net(5)
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6  # sd-daemon(3)
RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTM_NEWADDR = 0x10, 0x40, 20  # <linux/rtnetlink.h>

# https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
# https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
WIRESERVER = "168.63.129.16"
IMDS = "169.254.169.254"
IMDS_HEADERS = {"Metadata": "true"}
WIRESERVER_HEADERS = {"x-ms-version": "2012-11-30", "x-ms-agent-name": "custom-provisioning"}
HEALTH_HEADERS = {"Content-Type": "text/xml;charset=utf-8", **WIRESERVER_HEADERS}
HEALTH_REPORT = (
    "<Health><GoalStateIncarnation>{}</GoalStateIncarnation><Container><ContainerId>{}</ContainerId>"
    "<RoleInstanceList><Role><InstanceId>{}</InstanceId><Health><State>Ready</State></Health></Role>"
    "</RoleInstanceList></Container></Health>"
)
XML_ESCAPES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}  # html.escape takes 0.4 MB
# (version, statuses to accept). An older IMDS (Azure Stack Hub) answers 400; ask twice to be sure.
IMDS_VERSIONS = (("2021-02-01", (200, 400)), ("2021-02-01", (200, 400)), ("2019-06-01", (200,)))
# "MSFT AZURE VM" as decimal ASCII codes. Arm VMs and those of Azure Stack Hub have this tag, too.
AZURE_CHASSIS_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
CHASSIS_ASSET_TAG_FILE = "/sys/class/dmi/id/chassis_asset_tag"

READY_LIMIT = 20 * 60  # seconds: Azure fails the VM's creation about then
HOSTNAME_LIMIT = 5 * 60  # seconds
RESPONSE_TIMEOUT = 10  # seconds, for one exchange, from connecting to the last byte
COMMAND_TIMEOUT = 30  # seconds: hostnamectl, systemctl
PUBLISH_TIMEOUT = 30  # seconds, for the whole step
SHOW_TIMEOUT = 4  # seconds out of PUBLISH_TIMEOUT, for each command that shows a state
MAX_BODY = 1024 * 1024  # bytes of a response; a goal state has about 3,000
MAX_OUTPUT = 65536  # bytes of a command's output
MAX_REASONS = 10  # logged in one step, however often the reason changes

# hostname(7), at most 64 characters: sethostname(2). hostnamectl would silently drop an underscore.
LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
HOSTNAME = rf"(?=.{{1,64}}\Z){LABEL}(\.{LABEL})*\Z"

# For each DHCP client: the command that shows the state of interface {}, a pattern that matches its
# output if the client manages {}, and the command that sends the DHCP request again with the new
# name ("networkctl renew" and "nmcli device reapply" don't). An interface that is up can still be
# "configuring", or in NetworkManager's states 40 to 90, because of IPv6 or a dispatcher script.
DHCP_CLIENTS = (
    ("networkctl --no-legend list {}", " configur(ed|ing)$", "networkctl reconfigure {}"),
    ("nmcli -g GENERAL.STATE device show {}", r"^[4-9]0|\(connected\)$", "nmcli device connect {}"),
    ("systemctl is-active ifup@{}.service", "^active$", "systemctl restart ifup@{}.service"),
    ("ifquery --state {}", "=", "systemctl try-restart networking.service"),  # "eth0=eth0"
    ("dhcpcd -U {}", "=", "systemctl try-restart dhcpcd.service"),  # its variables
)


class ProvisioningError(Exception):
    """Every failure below; the message says why, in one line."""


class GoalState(NamedTuple):
    """Which VM this is; the health report repeats it."""

    incarnation: str
    container_id: str
    instance_id: str


def log(priority: int, message: str) -> None:
    """Print one line; the journal takes its priority from a prefix: sd-daemon(3)."""
    with suppress(OSError):  # standard output is closed; don't fail for that
        stdout = os.fstat(1)
        # systemd.exec(5): the variable may be inherited from elsewhere, so compare
        if os.environ.get("JOURNAL_STREAM") == f"{stdout.st_dev}:{stdout.st_ino}":
            message = f"<{priority}>{message}"
        os.write(1, (message + "\n").encode("ascii", "backslashreplace"))


def clean(text: str, length: int = 100) -> str:
    """Return TEXT as at most LENGTH printable ASCII characters, so that it cannot forge a line."""
    line = text[: length + 1].encode("unicode_escape").decode("ascii")
    return line if len(line) <= length else line[: length - 3] + "..."


@contextmanager
def time_limit(seconds: float, problem: str = "timed out") -> Iterator[None]:
    """Raise ProvisioningError if the block takes over SECONDS; a socket's timeout is per read."""

    def expire(*_: object) -> None:
        raise ProvisioningError(f"{problem} after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))  # 0 would mean no limit
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def keep_trying(attempt: Callable[[], Tuple[str, str]], limit: float) -> Tuple[str, str]:
    """Call ATTEMPT until it succeeds, for LIMIT s; return its result. All retries are here."""
    start = time.monotonic()
    attempts, logged = 0, [""]
    while True:
        attempts += 1
        try:
            result = attempt()
            if attempts > 1:
                log(INFO, f"Succeeded on attempt {attempts} after {time.monotonic() - start:.1f} s")
            return result
        except ProvisioningError as error:
            reason = str(error)
        spent = time.monotonic() - start
        if spent >= limit:
            raise ProvisioningError(f"{reason}; gave up after {attempts} attempts in {spent:.0f} s")
        if reason != logged[-1] and len(logged) <= MAX_REASONS:
            logged.append(reason)
            log(WARNING, f"{reason}; retrying for up to {limit - spent:.0f} s")
        time.sleep(min(max(spent / 4, 0.05), 1))  # short at first: the network may be up any moment


def exchange(
    host: str, method: str, path: str, headers: Headers, accept: Sequence[int], body: str = ""
) -> Tuple[str, bytes]:
    """Send a request; return the status line ("200 OK") and the body if the status is in ACCEPT."""
    try:
        buffer = mmap.mmap(-1, MAX_BODY + 1)  # takes only the memory that is written to
        with time_limit(RESPONSE_TIMEOUT), closing(HTTPConnection(host)) as connection:
            headers = {"Connection": "close", **headers}
            connection.request(method, path, body.encode("utf-8") or None, headers)
            with connection.getresponse() as response:
                status_line = f"{response.status} {response.reason}"
                if response.status not in accept:
                    raise ProvisioningError(status_line)
                lengths = response.headers.get_all("Content-Length", [])
                if len(lengths) > 1 or not all(length.strip().isdecimal() for length in lengths):
                    raise ProvisioningError("the Content-Length is not one number")
                size = response.readinto(buffer)  # read(n) has no limit in a chunk of size -1
                if size > MAX_BODY or response.length:  # length: what is still missing
                    raise ProvisioningError(f"the body is truncated, or over {MAX_BODY} bytes")
    except Exception as error:  # ours, too; and http.client's are of more kinds than documented
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ProvisioningError(f"{host}: {method} {path}: {clean(reason)}") from None
    return clean(status_line), buffer[:size]


def chassis_asset_tag() -> str:
    """Return this machine's tag; Azure's if it has none, as in a container or without DMI."""
    with suppress(OSError), open(CHASSIS_ASSET_TAG_FILE, encoding="latin-1") as file:
        return clean(file.read().strip())
    return AZURE_CHASSIS_ASSET_TAG


def fetch_goal_state(wireserver: str) -> GoalState:
    """Ask the WireServer which VM this is."""
    _, body = exchange(wireserver, "GET", "/machine?comp=goalstate", WIRESERVER_HEADERS, (200,))
    try:
        text = body.decode("utf-8-sig")  # parsing str ignores the declared encoding
        # a DOCTYPE's entities can make a small document fill the memory; UTF-16's NULs can hide one
        if "<!DOCTYPE" in text or "\0" in text:
            raise ProvisioningError("The goal state has a DOCTYPE or a NUL")
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ProvisioningError(f"The goal state is not valid XML: {clean(str(error))}") from None
    container_id = root.findtext("Container/ContainerId", "").strip()
    instance_id = root.findtext("Container/RoleInstanceList/RoleInstance/InstanceId", "").strip()
    if not container_id or not instance_id:
        raise ProvisioningError("The goal state has no ContainerId or no InstanceId")
    return GoalState(root.findtext("Incarnation", "").strip() or "1", container_id, instance_id)


def report_ready(wireserver: str, dry_run: bool) -> None:
    """Tell the WireServer that the VM is ready; a dry run only shows what it would be told."""
    logged = [("", "")]

    def attempt() -> Tuple[str, str]:
        goal_state = fetch_goal_state(wireserver)  # each time: 410 means that it has moved on
        ids = (goal_state.container_id, goal_state.instance_id)
        # Azure support asks for these, so log them first: the report may be rejected
        if ids != logged[-1] and len(logged) <= MAX_REASONS:
            logged.append(ids)
            log(INFO, f"ContainerId: {clean(ids[0])}")
            log(INFO, f"InstanceId: {clean(ids[1])}")
        report = HEALTH_REPORT.format(*(value.translate(XML_ESCAPES) for value in goal_state))
        if dry_run:
            return report, "none, because nothing is posted in a dry run"
        path, success = "/machine?comp=health", range(200, 300)
        return report, exchange(wireserver, "POST", path, HEALTH_HEADERS, success, report)[0]

    report, response = keep_trying(attempt, READY_LIMIT)
    log(INFO, f"Health report: {clean(report, 1000)}")
    log(INFO, f"Response: {response}")


def fetch_hostname(imds: str) -> str:
    """Return the hostname that the user gave this VM, from IMDS; it is valid, so safe to use."""

    def attempt() -> Tuple[str, str]:
        for version, accept in IMDS_VERSIONS:
            path = f"/metadata/instance/compute?api-version={version}"
            status, body = exchange(imds, "GET", path, IMDS_HEADERS, accept)
            if status.startswith("200"):
                break
        try:
            # int() would take seconds for a million digits; no number is used here
            compute = json.loads(body.decode("utf-8-sig"), parse_int=float)
            profile = compute.get("osProfile")
            computer_name = None if profile is None else profile.get("computerName")
            # "name" is the VM resource's, in a scale set not even a hostname ("myset_0")
            for name, source in ((computer_name, "computerName"), (compute.get("name"), "name")):
                if name is not None and name.strip(" \t\r\n"):
                    return name.strip(" \t\r\n"), source
        except (ValueError, AttributeError, RecursionError):  # not JSON, or of another shape
            sent = clean(body[:100].decode("latin-1"))
            raise ProvisioningError(f"IMDS did not send compute metadata, but: {sent}") from None
        raise ProvisioningError("IMDS has neither a computer name nor a VM name")

    name, source = keep_trying(attempt, HOSTNAME_LIMIT)
    if not re.match(HOSTNAME, name):
        raise ProvisioningError(f"The {source} in IMDS is not a valid hostname: {clean(name)}")
    log(INFO, f"Hostname: {name} ({source})")
    return name


def run(command: str, timeout: float) -> str:
    """Run COMMAND, split at spaces, for at most TIMEOUT seconds; return all that it prints."""
    # not this process's environment: SYSTEMD_COLORS and the like change what a command prints
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    words = command.split(" ")
    try:
        with Popen(words, stdout=PIPE, stderr=STDOUT, env=env, start_new_session=True) as process:
            assert process.stdout is not None
            try:
                with time_limit(timeout):
                    output = process.stdout.read(MAX_OUTPUT + 1)
                    if len(output) > MAX_OUTPUT:
                        raise ProvisioningError(f"printed more than {MAX_OUTPUT} bytes")
                    process.wait()
            except ProvisioningError:
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(process.pid, signal.SIGKILL)  # its children, too
                raise
        text = output.decode("latin-1").strip()  # decodes any byte
        if process.returncode != 0:
            raise ProvisioningError(clean(text, 200) or f"status {process.returncode}")
    except (OSError, ProvisioningError) as error:
        raise ProvisioningError(f"{words[0]}: {getattr(error, 'strerror', error)}") from None
    return text


def set_hostname(name: str) -> bool:
    """Make NAME the hostname, now and after a reboot; return whether it is stored for that."""
    try:
        run(f"hostnamectl set-hostname {name}", COMMAND_TIMEOUT)
        log(INFO, "Hostname set by hostnamectl")
    except ProvisioningError as error:  # it needs D-Bus and a writable root
        log(NOTICE, f"{error}; setting the hostname without hostnamectl")
        socket.sethostname(name)
    try:
        # hostnamectl does not fsync, and the unit runs only once. Without O_TRUNC a full disk keeps
        # the old name; with O_NONBLOCK a FIFO is an error.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK
        with open(os.open(HOSTNAME_FILE, flags, 0o644), "wb") as file:
            file.write(name.encode("ascii") + b"\n")
            file.truncate()
            os.fsync(file.fileno())
    except OSError as error:
        log(WARNING, f"{HOSTNAME_FILE}: {error.strerror}; {UNIT} stays enabled for the next boot")
        return False
    return True


def publish_hostname() -> None:
    """Have the DHCP client send its request again, with the new name, and wait for the network."""
    # Azure's DNS learns the name from that alone: https://github.com/Azure/azure-init/issues/68
    started = time.monotonic()
    deadline = started + PUBLISH_TIMEOUT
    try:
        interface, publish = find_dhcp_client()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
            events.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
            run(publish, deadline - time.monotonic())
            wait_for_network(interface, events, deadline - time.monotonic())
        log(INFO, f"Hostname published by {clean(publish)}, in {time.monotonic() - started:.2f} s")
    except Exception as error:  # whatever it is, the VM is provisioned
        reason = clean(str(getattr(error, "strerror", None) or error), 200)
        log(NOTICE, f"Hostname not published: {reason}; reboot, or restart the DHCP client")


def find_dhcp_client() -> Tuple[str, str]:
    """Return the interface with the default route, and the command that publishes the hostname."""
    interfaces = default_interfaces()
    if not interfaces:
        raise ProvisioningError("there is no default route")
    interface = interfaces[0]
    for show, managed, publish in DHCP_CLIENTS:
        with suppress(ProvisioningError):  # not installed, or not running
            if re.search(managed, run(show.format(interface), SHOW_TIMEOUT)):
                return interface, publish.format(interface)
    clients = "systemd-networkd, NetworkManager, ifupdown or dhcpcd"
    raise ProvisioningError(f"{interface} is not managed by {clients}")


def default_interfaces() -> List[str]:
    """Return the interfaces that have an IPv4 default route, the best first: proc_net(5)."""
    with open(ROUTE_FILE, "rb") as file:
        routes = [line.split() for line in file]
    zero = b"00000000"  # fields: 0 interface ("*" to reject), 1 destination, 6 metric, 7 mask
    defaults = [(int(r[6]), r[0]) for r in routes if r[1] == r[7] == zero and r[0] != b"*"]
    return [os.fsdecode(interface) for _, interface in sorted(defaults)]


def wait_for_network(interface: str, events: socket.socket, limit: float) -> None:
    """Wait until INTERFACE has an address again, then a default route. EVENTS: rtnetlink(7)."""
    address_seen = False
    with time_limit(limit, f"the network of {interface} is not back"):
        while not address_seen or interface not in default_interfaces():
            try:
                # nlmsghdr: 4 bytes, type (2), 10 bytes; ifaddrmsg: 4 bytes, index (4)
                kind, index = struct.unpack_from("=4xH14xI", events.recv(65536))
                if kind == RTM_NEWADDR and (index, interface) in socket.if_nameindex():
                    address_seen = True
            except OSError:  # ENOBUFS: events were lost, and the address may be among them
                address_seen = True


def disable_unit() -> None:
    """Disable the unit. Never fails: the VM is provisioned all the same."""
    try:
        # Without --no-reload systemd would read every unit again while this one waits.
        run(f"systemctl disable --no-reload {UNIT}", COMMAND_TIMEOUT)
        log(INFO, f"{UNIT} disabled")
    except ProvisioningError as error:
        log(WARNING, f"{error}; {UNIT} will run again at the next boot")


def endpoint(text: str) -> str:
    """Return TEXT if it is HOST[:PORT]; raises ValueError, which argparse reports, if it is not."""
    host, _, port = text.partition(":")
    if not re.match(HOSTNAME, host) or not 0 < int(port or 80) < 65536:
        raise ValueError
    return text


def main(arguments: List[str]) -> int:
    """Run the steps, which stand above in this order; return the exit status."""
    started = time.monotonic()
    # Without a width argparse would import shutil, which takes 0.5 MB.
    layout = functools.partial(argparse.HelpFormatter, width=100)
    parser = argparse.ArgumentParser(
        "azure_provision.py", description=__doc__, allow_abbrev=False, formatter_class=layout
    )
    option = parser.add_argument
    option("--wireserver", metavar="HOST[:PORT]", type=endpoint, help=f"instead of {WIRESERVER}")
    option("--imds", metavar="HOST[:PORT]", type=endpoint, help=f"instead of {IMDS}")
    option("--dry-run", action="store_true", help="show what would be sent and set; do neither")
    option("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    if bool(options.wireserver) != bool(options.imds):
        parser.error("give both --wireserver and --imds, or neither")
    if not options.wireserver:  # another platform may be anywhere
        tag = chassis_asset_tag()
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
        if changed:
            publish_hostname()
        if stored:
            disable_unit()
    except (ProvisioningError, OSError) as error:
        log(ERROR, f"Not provisioned: {error}; the next boot tries again")
        return 1
    log(INFO, f"Provisioned as {hostname} in {time.monotonic() - started:.2f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a trial without a traceback
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, exit statuses are lost
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})  # if blocked, nothing times out
    sys.exit(main(sys.argv[1:]))
