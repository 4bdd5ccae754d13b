#!/usr/bin/env python3
"""Provision an Azure VM that has no provisioning agent, once, at its first boot.

Report Ready to the WireServer, set the hostname from IMDS, publish it through DHCP, and disable
the unit that ran this. Responses are validated; failures are retried until a deadline; each event
is one line on standard output. The functions are in the order in which main() calls them.
"""

import sys

# The platform speaks plain HTTP, and http.client works without ssl, which takes 3 MB to import.
sys.modules["ssl"] = None  # type: ignore[assignment]

import argparse
import contextlib
import html
import http.client
import json
import os
import re
import signal
import socket
import struct
import time
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar
from xml.etree import ElementTree

__version__ = "1.1.0"
T = TypeVar("T")
Headers = Dict[str, str]
UNIT = "azure-provisioning.service"

# The platform's addresses, plain HTTP, the same in every region and cloud:
# https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
# https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
WIRESERVER = "168.63.129.16"
IMDS = "169.254.169.254"
WIRESERVER_HEADERS = {"x-ms-version": "2012-11-30", "x-ms-agent-name": "custom-provisioning"}
IMDS_HEADERS = {"Metadata": "true"}

# Every Azure VM has this tag ("MSFT AZURE VM" in ASCII), x86 and Arm, Azure Stack Hub included;
# cloud-init's DataSourceAzure relies on it alone.
AZURE_CHASSIS_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
CHASSIS_ASSET_TAG_FILE = "/sys/class/dmi/id/chassis_asset_tag"

HOSTNAME_FILE = "/etc/hostname"  # hostname(5)
ROUTE_FILE = "/proc/self/net/route"  # proc_net(5)

READY_LIMIT = 20 * 60  # seconds: Azure fails the VM's creation about then
HOSTNAME_LIMIT = 5 * 60  # seconds
RESPONSE_TIMEOUT = 10  # seconds, for one exchange, from connecting to the last byte
COMMAND_TIMEOUT = 30  # seconds: hostnamectl, systemctl
PUBLISH_TIMEOUT = 30  # seconds, for the whole step
MAX_BODY = 1024 * 1024  # bytes of a response; a goal state has about 3,000
MAX_OUTPUT = 65536  # bytes of a command's output
MAX_REASONS = 10  # that are logged in one step, however often the reason changes

# hostname(7), at most 64 characters on Linux: sethostname(2). No underscore, as in systemd's own
# rule: hostnamectl would drop it without a word.
LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
HOSTNAME = rf"(?=.{{1,64}}\Z){LABEL}(\.{LABEL})*\Z"

RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTM_NEWADDR = 0x10, 0x40, 20  # <linux/rtnetlink.h>

ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6  # sd-daemon(3)


# For each DHCP client: the command that shows the state of the interface {}, the output that means
# that the client manages it, and the command that sends the DHCP request again, with the new name
# ("networkctl renew", "networkctl forcerenew" and "nmcli device reapply" do not send it). An
# interface that is up can still be "configuring", or in one of NetworkManager's states 40 to 90,
# because of IPv6 or a dispatcher script; "100 (connected (externally))" is not NetworkManager's.
DHCP_CLIENTS = (
    ("networkctl --no-legend list {}", r" configur(ed|ing)$", "networkctl reconfigure {}"),
    (
        "nmcli -g GENERAL.STATE device show {}",
        r"^([4-9]0 .*|100 \(connected\))$",
        "nmcli device connect {}",
    ),
    ("systemctl is-active ifup@{}.service", "^active$", "systemctl restart ifup@{}.service"),
    ("ifquery --state {}", "=", "systemctl try-restart networking.service"),
    ("dhcpcd -U {}", "=", "systemctl try-restart dhcpcd.service"),
)

HEALTH_REPORT = (
    "<Health><GoalStateIncarnation>{}</GoalStateIncarnation><Container><ContainerId>{}</ContainerId>"
    "<RoleInstanceList><Role><InstanceId>{}</InstanceId><Health><State>Ready</State></Health></Role>"
    "</RoleInstanceList></Container></Health>"
)


class GoalState(NamedTuple):
    """Which VM this is; the health report repeats it."""

    incarnation: str
    container_id: str
    instance_id: str


class ProvisioningError(Exception):
    """What everything below raises if it fails; the message says why, in one line."""


def log(priority: int, message: str) -> None:
    """Print one line; the journal takes its priority from a prefix: sd-daemon(3)."""
    try:
        stdout = os.fstat(1)
        # systemd.exec(5): the variable may be inherited from elsewhere, so compare
        if os.environ.get("JOURNAL_STREAM") == f"{stdout.st_dev}:{stdout.st_ino}":
            message = f"<{priority}>{message}"
        os.write(1, (message + "\n").encode("ascii", "backslashreplace"))
    except OSError:
        pass  # standard output is closed; don't fail provisioning for that


def clean(text: str, length: int = 100) -> str:
    """Return TEXT as at most LENGTH printable ASCII characters, so that it cannot forge a line."""
    line = text[: length + 1].encode("unicode_escape").decode("ascii")
    return line if len(line) <= length else line[: length - 3] + "..."


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ProvisioningError in the block after SECONDS, whatever it is doing: setitimer(2).

    Unlike the timeout of a socket, the limit does not start again with every byte.
    """

    def expire(*_: object) -> None:
        raise ProvisioningError(f"timed out after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))  # 0 would mean no limit
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def keep_trying(attempt: Callable[[], T], limit: float) -> T:
    """Call ATTEMPT until it succeeds, for up to LIMIT seconds, and return its result.

    All retries are made here. The pause is a quarter of the time spent so far, but 0.05 to 1 s: the
    VM is ready soon after its network is, and a long outage costs little.
    """
    started = time.monotonic()
    attempts, reasons = 0, [""]
    while True:
        attempts += 1
        try:
            result = attempt()
            break
        except ProvisioningError as error:
            reason = str(error)
        spent = time.monotonic() - started
        if spent >= limit:
            raise ProvisioningError(f"{reason}; gave up after {attempts} attempts in {spent:.0f} s")
        if reason != reasons[-1] and len(reasons) <= MAX_REASONS:
            reasons.append(reason)
            more = "; further reasons are not logged" if len(reasons) > MAX_REASONS else ""
            log(WARNING, f"{reason}; retrying for up to {limit - spent:.0f} s{more}")
        time.sleep(min(max(spent / 4, 0.05), 1))
    if attempts > 1:
        log(INFO, f"Succeeded on attempt {attempts}, after {time.monotonic() - started:.1f} s")
    return result


def exchange(
    host: str, method: str, path: str, headers: Headers, accept: Sequence[int], body: bytes = b""
) -> Tuple[str, bytes]:
    """Send one request to HOST ("name:port"); return the status line ("200 OK") and the body.

    Fails if there is no response in time, if it is malformed, truncated or too large, or if its
    status is not in ACCEPT.
    """
    connection = http.client.HTTPConnection(host)
    # Not read(): for a chunk of size -1 it reads until the peer closes, without a limit.
    buffer = bytearray(MAX_BODY + 1)
    try:
        with time_limit(RESPONSE_TIMEOUT):
            connection.request(method, path, body or None, dict(headers, Connection="close"))
            with connection.getresponse() as response:
                status_line = f"{response.status} {response.reason}"
                if response.status not in accept:
                    raise ProvisioningError(status_line)
                lengths = response.headers.get_all("Content-Length", [])
                if len(lengths) > 1 or not all(length.strip().isdecimal() for length in lengths):
                    raise ProvisioningError("the Content-Length is not one number")
                size = response.readinto(buffer)
                if size > MAX_BODY:
                    raise ProvisioningError(f"the body has more than {MAX_BODY} bytes")
                if response.length:
                    raise ProvisioningError(f"the body lacks {response.length} bytes")
    except Exception as error:  # http.client raises more than HTTPException and OSError
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ProvisioningError(f"{host}: {method} {path}: {clean(reason)}") from None
    finally:
        connection.close()
    return clean(status_line), bytes(buffer[:size])


def other_platform() -> Optional[str]:
    """Return the chassis asset tag of a machine outside Azure; None on Azure, or without a tag."""
    try:
        with open(CHASSIS_ASSET_TAG_FILE, "rb") as file:
            tag = file.read().decode("latin-1").strip()
    except OSError:  # a container, or a machine without DMI
        return None
    return None if tag == AZURE_CHASSIS_ASSET_TAG else clean(tag)


def fetch_goal_state(wireserver: str) -> GoalState:
    """Ask the WireServer which VM this is.

    A DOCTYPE is refused before it is parsed: its entities can make a small document fill the
    memory. So is a NUL: in UTF-16, which expat would recognize, a DOCTYPE would not be seen here.
    """
    _, body = exchange(wireserver, "GET", "/machine?comp=goalstate", WIRESERVER_HEADERS, (200,))
    try:
        text = body.decode("utf-8-sig")  # parsing str ignores the declared encoding
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
    """Tell the WireServer that the VM is ready; a dry run only shows what it would be told.

    Each attempt fetches the goal state again: the report is refused (410) if it has moved on.
    """
    logged: List[Tuple[str, str]] = []

    def attempt() -> Tuple[str, str]:
        goal_state = fetch_goal_state(wireserver)
        ids = (goal_state.container_id, goal_state.instance_id)
        # before the report, which may be rejected: Azure support asks for them
        if ids not in logged[-1:] and len(logged) < MAX_REASONS:
            logged.append(ids)
            log(INFO, f"ContainerId: {clean(ids[0])}")
            log(INFO, f"InstanceId: {clean(ids[1])}")
        report = HEALTH_REPORT.format(*(html.escape(value, quote=False) for value in goal_state))
        if dry_run:
            return report, "none, because nothing is posted in a dry run"
        headers = dict(WIRESERVER_HEADERS, **{"Content-Type": "text/xml;charset=utf-8"})
        path, success, body = "/machine?comp=health", range(200, 300), report.encode("utf-8")
        return report, exchange(wireserver, "POST", path, headers, success, body)[0]

    log(INFO, f"Retrieving the goal state from the WireServer, {wireserver}")
    report, response = keep_trying(attempt, READY_LIMIT)
    log(INFO, f"Health report: {clean(report, 1000)}")
    log(INFO, f"Response: {response}")


def fetch_hostname(imds: str) -> str:
    """Return the hostname that the user gave this VM, from IMDS; it is valid, so safe to pass on.

    That is the computer name. The name of the VM resource, which in a scale set is not even a
    hostname ("myset_0"), is used only if the same response has no computer name.
    """

    def attempt() -> Tuple[str, str]:
        # Azure Stack Hub and sovereign clouds have an older IMDS, which rejects the api-version. It
        # is asked twice, since the older response has no computer name, and one 400 proves little.
        for version, accept in (("2021-02-01", (200, 400)),) * 2 + (("2019-06-01", (200,)),):
            path = f"/metadata/instance/compute?api-version={version}"
            status, body = exchange(imds, "GET", path, IMDS_HEADERS, accept)
            if status.startswith("200"):
                break
        try:
            # int() would take seconds for a million digits; no number is used here
            compute = json.loads(body.decode("utf-8-sig"), parse_int=float)
            profile = compute.get("osProfile")
            computer_name = None if profile is None else profile.get("computerName")
            for name, source in ((computer_name, "computerName"), (compute.get("name"), "name")):
                if name is not None and name.strip(" \t\r\n"):
                    return name.strip(" \t\r\n"), source
        except (ValueError, AttributeError, RecursionError):  # not JSON, or of another shape
            sent = clean(body[:100].decode("latin-1"))
            raise ProvisioningError(f"IMDS did not send compute metadata, but: {sent}") from None
        raise ProvisioningError("IMDS has neither a computer name nor a VM name")

    log(INFO, f"Retrieving the hostname from IMDS, {imds}")
    name, source = keep_trying(attempt, HOSTNAME_LIMIT)
    if not re.match(HOSTNAME, name):
        raise ProvisioningError(f"The {source} in IMDS is not a valid hostname: {clean(name)}")
    log(INFO, f"Hostname: {name} ({source})")
    return name


def run(*command: str, timeout: float) -> str:
    """Run COMMAND for at most TIMEOUT seconds, and return its output."""
    # not this process's environment: SYSTEMD_COLORS and the like change what a command prints
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        with Popen(
            command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env=env, start_new_session=True
        ) as process:
            assert process.stdout is not None
            try:
                with time_limit(timeout):
                    output = process.stdout.read(MAX_OUTPUT + 1)
                    if len(output) > MAX_OUTPUT:
                        raise ProvisioningError(f"printed more than {MAX_OUTPUT} bytes")
                    status = process.wait()
            except ProvisioningError:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)  # its children, too
                raise
        text = output.decode("latin-1").strip()  # no byte fails here
        if status != 0:
            raise ProvisioningError(clean(text, 200) or f"status {status}")
    except (OSError, ProvisioningError) as error:
        raise ProvisioningError(f"{command[0]}: {getattr(error, 'strerror', error)}") from None
    return text


def set_hostname(name: str) -> bool:
    """Make NAME the hostname, now and after a reboot; return whether it is stored for that.

    hostnamectl needs D-Bus and a writable root; without them the kernel is told directly.
    """
    try:
        run("hostnamectl", "set-hostname", name, timeout=COMMAND_TIMEOUT)
        log(INFO, "Hostname set by hostnamectl")
    except ProvisioningError as error:
        log(NOTICE, f"{error}; setting the hostname without hostnamectl")
        try:
            socket.sethostname(name)
        except OSError as error:
            raise ProvisioningError(f"The hostname cannot be set: {error.strerror}") from None
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
    """Have the DHCP client send its request again, with the new name, and wait for the network.

    Azure's DNS learns a VM's name from that request alone. The client drops the address for a
    moment, and what is ordered after the unit needs it back. Never fails: any client sends the name
    at the next boot. https://github.com/Azure/azure-init/issues/68
    """
    started = time.monotonic()
    deadline = started + PUBLISH_TIMEOUT
    try:
        interfaces = default_interfaces()
        if not interfaces:
            raise ProvisioningError("there is no default route")
        interface = interfaces[0]
        publish = publishing_command(interface, deadline)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
            events.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
            run(*publish.split(" "), timeout=deadline - time.monotonic())
            wait_for_network(interface, events, deadline)
        log(INFO, f"Hostname published by {clean(publish)}, in {time.monotonic() - started:.2f} s")
    except Exception as error:  # whatever it is, the VM is provisioned
        reason = clean(str(getattr(error, "strerror", None) or error), 200)
        log(NOTICE, f"Hostname not published: {reason}; DHCP clients send it at the next boot")


def default_interfaces() -> List[str]:
    """Return the interfaces that have an IPv4 default route, the best first: proc_net(5)."""
    with open(ROUTE_FILE, "rb") as file:
        routes = [line.split() for line in file][1:]
    # The destination and its mask are zero; the interface of a route that rejects is "*".
    zero = b"00000000"
    defaults = [(int(r[6]), r[0]) for r in routes if r[1] == r[7] == zero and r[0] != b"*"]
    return [os.fsdecode(interface) for _, interface in sorted(defaults)]  # by metric


def publishing_command(interface: str, deadline: float) -> str:
    """Return the command with which the DHCP client of INTERFACE sends its request again."""
    # each has a share of the time, in case one hangs
    share = (deadline - time.monotonic()) / (len(DHCP_CLIENTS) + 1)
    for show, managed, publish in DHCP_CLIENTS:
        with contextlib.suppress(ProvisioningError):  # not installed, or not running
            if re.search(managed, run(*show.format(interface).split(" "), timeout=share)):
                return publish.format(interface)
    raise ProvisioningError(
        f"{interface} is not managed by systemd-networkd, NetworkManager, ifupdown or dhcpcd "
        "(restart its DHCP client, or reboot)"
    )


def wait_for_network(interface: str, events: socket.socket, deadline: float) -> None:
    """Wait for EVENTS, of rtnetlink(7): a new address of INTERFACE, then its default route."""
    try:
        with time_limit(deadline - time.monotonic()):
            address_seen = False
            while not address_seen or interface not in default_interfaces():
                try:
                    # nlmsghdr: length (4 bytes), type (2), then 10; ifaddrmsg: 4, then index (4)
                    kind, index = struct.unpack_from("=4xH14xI", events.recv(65536))
                    ours = (index, interface) in socket.if_nameindex()
                    address_seen = address_seen or (kind == RTM_NEWADDR and ours)
                except OSError:  # ENOBUFS: more events than fit, so it may be among those lost
                    address_seen = True
    except ProvisioningError as error:
        raise ProvisioningError(f"the network of {interface} is not back: {error}") from None


def disable_unit() -> None:
    """Disable the unit. Never fails: the VM is provisioned all the same."""
    try:
        # Without --no-reload systemd reads every unit again, and this one waits for it.
        run("systemctl", "disable", "--no-reload", UNIT, timeout=COMMAND_TIMEOUT)
        log(INFO, f"{UNIT} disabled")
    except ProvisioningError as error:
        log(WARNING, f"{error}; {UNIT} will run again at the next boot")


def endpoint(text: str) -> str:
    """Return TEXT if it is HOST[:PORT]; raises argparse.ArgumentTypeError if it is not."""
    host, colon, port = text.partition(":")
    valid_port = re.match(r"[0-9]{1,5}\Z", port) and 0 < int(port) < 65536
    if not re.match(HOSTNAME, host) or (colon and not valid_port):
        raise argparse.ArgumentTypeError(f"not HOST[:PORT]: {clean(text)}")
    return text


def parse_command_line(arguments: List[str]) -> argparse.Namespace:
    """Parse ARGUMENTS; exits with status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="azure_provision.py",
        description="Tell Azure that this VM is ready, and set the hostname that IMDS gives it.",
        epilog="Exit status: 0 provisioned (or not on Azure, or a dry run), 1 failed, 2 refused.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--wireserver", metavar="HOST[:PORT]", type=endpoint, help=f"instead of {WIRESERVER}")
    option("--imds", metavar="HOST[:PORT]", type=endpoint, help=f"instead of {IMDS}")
    option("--dry-run", action="store_true", help="show what would be sent and set; do neither")
    option("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    if bool(options.wireserver) != bool(options.imds):
        parser.error("give both --wireserver and --imds, or neither")
    return options


def main(arguments: List[str]) -> int:
    """Run the steps; return the exit status."""
    started = time.monotonic()
    options = parse_command_line(arguments)
    if not options.wireserver:
        tag = other_platform()
        if tag is not None:
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
    except ProvisioningError as error:
        log(ERROR, f"Not provisioned: {error}; the next boot tries again")
        return 1
    log(INFO, f"Provisioned as {hostname} in {time.monotonic() - started:.2f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a trial without a traceback
    # What a parent other than systemd may have left would hide a timeout, or a failure.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
