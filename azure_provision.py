#!/usr/bin/env python3
"""Provision an Azure VM whose image has no provisioning agent: once, at its first boot.

Report Ready to the WireServer, set the hostname that IMDS gives, publish it through DHCP, and
disable the unit that ran this. Whatever the platform answers is checked before it is used, what
fails is tried again until its limit, and each event is one line on standard output.

The steps stand below in the order in which they run; main() at the end lists them.
"""

import sys

# http.client does without ssl where there is none, and the platform speaks plain HTTP: importing
# it would take a sixth of the time to Ready.
sys.modules["ssl"] = None  # type: ignore[assignment]

import http.client
import os
import re
import socket
import time
from xml.etree import ElementTree

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes milliseconds, and only mypy needs it
    from typing import Any, Callable, Container, Dict, List, Optional, Tuple, TypeVar

    T = TypeVar("T")

__version__ = "1.0.0"

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
ANSWER_TIMEOUT = 10  # seconds, for one request and its whole answer
MAX_ANSWER = 1024 * 1024  # bytes, headers included; a goal state has some 3,000
MAX_REASONS = 10  # lines that one wait logs, however often the reason changes
COMMAND_TIMEOUT = 30  # seconds: hostnamectl, systemctl
PUBLISH_TIMEOUT = 15  # seconds: networkctl, or both calls of nmcli

# For each DHCP client: what tells whether an interface is its own (not "(externally)" another's),
# how that is said, and what publishes a name. Neither renew, forcerenew nor reapply does.
DHCP_CLIENTS = (
    ("networkctl --no-legend list", r"\sconfigured\Z", "networkctl reconfigure"),
    ("nmcli -g GENERAL.STATE device show", r"\A100 \(connected\)\Z", "nmcli device connect"),
)

# hostname(7), at most 64 characters on Linux: sethostname(2). No underscore, as in systemd's own
# rule: hostnamectl would drop it without a word.
LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
HOSTNAME = rf"(?=.{{1,64}}\Z){LABEL}(\.{LABEL})*\Z"

ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6  # sd-daemon(3)


class ProvisioningError(Exception):
    """A try or a step failed; the message says which one and why, in one line."""


def log(priority: int, message: str) -> None:
    """Print one line at once; the journal also gets its priority, as sd-daemon(3) has it."""
    if "JOURNAL_STREAM" in os.environ and not os.isatty(1):
        message = f"<{priority}>{message}"
    try:
        os.write(1, (message + "\n").encode("ascii", "backslashreplace"))
    except OSError:
        pass  # nobody reads any more: no reason to lose the VM


def clean(text: str, length: int = 100) -> str:
    """TEXT as printable ASCII on one line of at most LENGTH characters: it can forge no other."""
    line = text[: length + 1].encode("unicode_escape").decode("ascii")
    return line if len(line) <= length else line[: length - 3] + "..."


def keep_trying(attempt: "Callable[[], T]", limit: float) -> "T":
    """Call ATTEMPT until it returns, and return what it returned: all waiting is done here.

    The pause in between is a quarter of the time spent so far, within 0.05 to 1 s: the VM is
    ready soon after its network is, and a long outage costs little. A reason is logged when it
    is not the one before. Raises ProvisioningError with the last reason after LIMIT seconds.
    """
    started = time.monotonic()
    tries, logged, reason = 0, 0, ""
    while True:
        tries += 1
        try:
            result = attempt()
        except ProvisioningError as error:
            spent = time.monotonic() - started
            if spent >= limit:
                failure = f"{error}; gave up at try {tries}, after {spent:.1f} s"
                raise ProvisioningError(failure) from None
            if str(error) != reason and logged < MAX_REASONS:
                logged += 1
                more = "" if logged < MAX_REASONS else "; further reasons are not logged"
                log(WARNING, f"{error}; trying again for up to {limit - spent:.0f} s{more}")
            reason = str(error)
            time.sleep(min(max(spent / 4, 0.05), 1))
        else:
            if tries > 1:
                log(INFO, f"Answered at try {tries}, after {time.monotonic() - started:.1f} s")
            return result


class BoundedSocket(socket.socket):
    """A TCP socket that fails after ANSWER_TIMEOUT seconds or MAX_ANSWER bytes in all.

    A socket's own timeout starts anew with every byte that trickles in, and http.client bounds
    neither an endless header nor a chunk that claims to have -1 bytes.
    """

    def __init__(self) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as http.client's own have it
        self.settimeout(ANSWER_TIMEOUT)
        self.deadline = time.monotonic() + ANSWER_TIMEOUT
        self.budget = MAX_ANSWER

    def recv_into(self, buffer: "Any", nbytes: int = 0, flags: int = 0) -> int:
        """Receive; raises socket.timeout past the deadline, OSError past the last byte."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise socket.timeout
        if self.budget <= 0:
            raise OSError(f"the answer has more than {MAX_ANSWER} bytes")
        self.settimeout(remaining)
        size = super().recv_into(buffer, min(nbytes or len(buffer), self.budget), flags)
        self.budget -= size
        return size


def exchange(
    host: str, request: str, headers: "Dict[str, str]", accept: "Container[int]", body: str = ""
) -> "Tuple[int, str, bytes]":
    """Send one REQUEST ("GET /path") to HOST ("name" or "name:port"); return the answer.

    It is returned as its status code, its status line and its body. Raises ProvisioningError
    where none comes, where it is not whole or no HTTP, or where ACCEPT lacks its status code.
    """
    method, path = request.split(" ")
    connection = http.client.HTTPConnection(host)
    try:
        connection.sock = BoundedSocket()
        connection.sock.connect((connection.host, connection.port))
        connection.request(method, path, body.encode("utf-8") or None, headers)
        with connection.getresponse() as response:
            answer = response.read(MAX_ANSWER)
            if response.length:  # http.client takes a body cut short here for a whole one
                raise http.client.IncompleteRead(answer, response.length)
    except socket.timeout:
        raise ProvisioningError(f"{host}: {request}: no answer in {ANSWER_TIMEOUT} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ProvisioningError(f"{host}: {request}: {clean(reason)}") from None
    finally:
        connection.close()
    status = clean(f"{response.status} {response.reason}")
    if response.status not in accept:
        raise ProvisioningError(f"{host}: {request}: {status}")
    return response.status, status, answer


def other_platform() -> "Optional[str]":
    """The chassis asset tag of a machine outside Azure; None on Azure, or where it has no tag."""
    try:
        with open(CHASSIS_ASSET_TAG_FILE, "rb") as file:
            tag = file.read().decode("latin-1").strip()
    except OSError:  # a container, or a machine without DMI
        return None
    return None if tag == AZURE_CHASSIS_ASSET_TAG else clean(tag)


def fetch_goal_state(wireserver: str) -> "Tuple[str, str, str]":
    """Ask the WireServer who this VM is: its incarnation, its ContainerId, its InstanceId.

    Raises ProvisioningError where the answer is no goal state. A DOCTYPE is refused unparsed:
    its entities can make a small answer fill the memory.
    """
    answer = exchange(wireserver, "GET /machine?comp=goalstate", WIRESERVER_HEADERS, (200,))[2]
    try:
        text = answer.decode("utf-8-sig")  # a parser of text is not told another encoding
        if "<!DOCTYPE" in text:
            raise ProvisioningError("The goal state has a DOCTYPE")
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ProvisioningError(f"The goal state is no XML: {clean(str(error))}") from None
    container_id = root.findtext("Container/ContainerId", "").strip()
    instance_id = root.findtext("Container/RoleInstanceList/RoleInstance/InstanceId", "").strip()
    if not container_id or not instance_id:
        raise ProvisioningError("The goal state has no ContainerId or no InstanceId")
    return root.findtext("Incarnation", "").strip() or "1", container_id, instance_id


def health_report(incarnation: str, container_id: str, instance_id: str) -> str:
    """The XML that tells the WireServer that the VM of this goal state is ready."""
    health = ElementTree.Element("Health")
    ElementTree.SubElement(health, "GoalStateIncarnation").text = incarnation
    container = ElementTree.SubElement(health, "Container")
    ElementTree.SubElement(container, "ContainerId").text = container_id
    roles = ElementTree.SubElement(container, "RoleInstanceList")
    role = ElementTree.SubElement(roles, "Role")
    ElementTree.SubElement(role, "InstanceId").text = instance_id
    ElementTree.SubElement(ElementTree.SubElement(role, "Health"), "State").text = "Ready"
    return ElementTree.tostring(health, encoding="unicode")


def report_ready(wireserver: str, dry_run: bool) -> None:
    """Tell the WireServer that the VM is ready; a dry run only shows what it would be told.

    A try is both requests: a report may be refused because the goal state has moved on (410).
    Raises ProvisioningError after READY_LIMIT seconds.
    """

    def attempt() -> "Tuple[str, str, str, str]":
        incarnation, container_id, instance_id = fetch_goal_state(wireserver)
        report = health_report(incarnation, container_id, instance_id)
        response = "none, as nothing is posted in a dry run"
        if not dry_run:
            headers = dict(WIRESERVER_HEADERS, **{"Content-Type": "text/xml;charset=utf-8"})
            request, success = "POST /machine?comp=health", range(200, 300)
            response = exchange(wireserver, request, headers, success, report)[1]
        return container_id, instance_id, report, response

    log(INFO, f"Retrieving the goal state from the WireServer, {wireserver}")
    container_id, instance_id, report, response = keep_trying(attempt, READY_LIMIT)
    log(INFO, f"ContainerId: {clean(container_id)}")
    log(INFO, f"InstanceId: {clean(instance_id)}")
    log(INFO, f"Health report: {clean(report, 1000)}")
    log(INFO, f"Response: {response}")


def fetch_hostname(imds: str) -> str:
    """The hostname that the user gave this VM, from IMDS, and valid: it is safe to pass on.

    compute/name is the name of the VM resource, no hostname in a scale set ("myset_0"); an IMDS
    that does not know osProfile and a VM that has none leave nothing better. Raises
    ProvisioningError after HOSTNAME_LIMIT seconds, or at once where the name is not valid.
    """

    def attempt() -> "Tuple[str, str]":
        for source, version, accept in (
            ("compute/osProfile/computerName", "2021-02-01", (200, 400, 404)),
            ("compute/name", "2019-06-01", (200,)),
        ):
            request = f"GET /metadata/instance/{source}?api-version={version}&format=text"
            status, _, answer = exchange(imds, request, IMDS_HEADERS, accept)
            if status == 200 and answer.strip():
                return answer.strip().decode("latin-1"), source  # no byte fails here
        raise ProvisioningError("IMDS has neither a computer name nor a VM name")

    log(INFO, f"Retrieving the hostname from IMDS, {imds}")
    name, source = keep_trying(attempt, HOSTNAME_LIMIT)
    if not re.match(HOSTNAME, name):
        raise ProvisioningError(f"The {source} in IMDS is no valid hostname: {clean(name)}")
    log(INFO, f"Hostname: {name} ({source})")
    return name


def run(*command: str, timeout: float) -> str:
    """Run COMMAND; return its output.

    Raises ProvisioningError where it is missing, fails, or takes over TIMEOUT seconds.
    """
    import subprocess  # here, since Ready need not wait for it

    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(os.environ, LC_ALL="C"),
            start_new_session=True,
        ) as process:
            try:
                output = process.communicate(timeout=timeout)[0].decode("latin-1").strip()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # its children, too
                raise ProvisioningError(f"{command[0]}: not done in {timeout:.0f} s") from None
    except OSError as error:
        raise ProvisioningError(f"{command[0]}: {error.strerror}") from None
    if process.returncode != 0:
        reason = clean(output, 200) or f"status {process.returncode}"
        raise ProvisioningError(f"{command[0]}: {reason}")
    return output


def set_hostname(name: str) -> bool:
    """Make NAME the hostname, now and after a boot; return whether it was another one before.

    hostnamectl needs D-Bus and a writable root. Without them the kernel and hostname(5) are told
    directly; a read-only /etc costs a warning. Raises ProvisioningError where the kernel refuses.
    """
    before = socket.gethostname()
    try:
        run("hostnamectl", "set-hostname", name, timeout=COMMAND_TIMEOUT)
        log(INFO, "Hostname set by hostnamectl")
        return before != name
    except ProvisioningError as error:
        log(NOTICE, f"{error}; setting the hostname without hostnamectl")
    try:
        with open(HOSTNAME_FILE, "w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())  # a power cut after the unit is disabled must not lose it
    except OSError as error:
        log(WARNING, f"{HOSTNAME_FILE}: {error.strerror}; the hostname lasts until the next boot")
    try:
        socket.sethostname(name)
    except OSError as error:
        raise ProvisioningError(f"The hostname cannot be set: {error.strerror}") from None
    log(INFO, "Hostname set")
    return before != name


def publish_hostname() -> None:
    """Have the DHCP client ask again, with the new name: Azure's DNS learns it from that alone.

    The address may be away for a moment. Never fails: any client sends the name at the next boot.
    https://github.com/Azure/azure-init/issues/68
    """
    deadline = time.monotonic() + PUBLISH_TIMEOUT

    def ask(command: str) -> str:
        timeout = max(deadline - time.monotonic(), 0)
        return run(*command.split(), interface, timeout=timeout)

    try:
        interface = default_interface()
        for whose, own, publish in DHCP_CLIENTS:
            try:
                if not re.search(own, ask(whose)):
                    continue
            except ProvisioningError:  # not installed, or not running
                continue
            ask(publish)
            log(INFO, f"Hostname published by {publish} {interface}")
            return
        raise ProvisioningError(f"{interface} has no DHCP client that is known here")
    except (OSError, ProvisioningError) as error:
        log(NOTICE, f"The hostname will be published at the next boot: {clean(str(error), 200)}")


def default_interface() -> str:
    """The network interface of the IPv4 default route: proc_net(5).

    Raises ProvisioningError where there is none, OSError where the kernel does not tell.
    """
    with open(ROUTE_FILE) as file:
        routes = [line.split() for line in file][1:]
    # The destination and its mask are all zeros; the interface "*" is no interface but a refusal.
    defaults = [(int(r[6]), r[0]) for r in routes if r[1] == r[7] == "00000000" and r[0] != "*"]
    if not defaults:
        raise ProvisioningError("there is no default route")
    return min(defaults)[1]  # of the lowest metric


def disable_unit() -> None:
    """Have systemd run this no more. Never fails: the VM is provisioned all the same."""
    try:
        # without --no-reload systemd reads every unit again, and this one waits for it
        run("systemctl", "disable", "--no-reload", UNIT, timeout=COMMAND_TIMEOUT)
        log(INFO, f"{UNIT} disabled")
    except ProvisioningError as error:
        log(WARNING, f"{error}; {UNIT} will run again at the next boot")


def parse_command_line(arguments: "List[str]") -> "Tuple[Optional[str], Optional[str], bool]":
    """The --wireserver, --imds and --dry-run of ARGUMENTS; exits with status 2 if one is wrong."""
    if not arguments:  # a first boot, which is spared the import
        return None, None, False
    import argparse

    def endpoint(text: str) -> str:
        host, _, port = text.partition(":")
        valid = re.match(HOSTNAME, host) and (text == host or re.match(r"[0-9]{1,5}\Z", port))
        if not valid or not 0 < int(port or 80) < 65536:
            raise argparse.ArgumentTypeError(f"not HOST[:PORT]: {clean(text)}")
        return text

    parser = argparse.ArgumentParser(
        prog="azure_provision.py",
        description="Tell Azure that this VM is ready, and set the hostname that IMDS gives it.",
        epilog="Exit status: 0 provisioned (or not on Azure, or a dry run), 1 failed, 2 usage.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--wireserver", metavar="HOST[:PORT]", type=endpoint, help=f"instead of {WIRESERVER}")
    option("--imds", metavar="HOST[:PORT]", type=endpoint, help=f"instead of {IMDS}")
    option("--dry-run", action="store_true", help="show what would be sent and set; do neither")
    option("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    return options.wireserver, options.imds, options.dry_run


def main(arguments: "List[str]") -> int:
    """Run the steps; return the exit status."""
    started = time.monotonic()
    wireserver, imds, dry_run = parse_command_line(arguments)
    tag = None if wireserver or imds else other_platform()
    if tag is not None:
        log(NOTICE, f'Not on Azure (the chassis asset tag is "{tag}"): nothing to do')
        return 0
    try:
        report_ready(wireserver or WIRESERVER, dry_run)
        hostname = fetch_hostname(imds or IMDS)
        if dry_run:
            log(INFO, "Dry run: nothing was posted, nothing was changed")
            return 0
        if set_hostname(hostname):
            publish_hostname()
        disable_unit()
    except ProvisioningError as error:
        log(ERROR, f"Not provisioned: {error}; the next boot tries again")
        return 1
    log(INFO, f"Provisioned as {hostname} in {time.monotonic() - started:.2f} s")
    return 0


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a trial without a traceback
    sys.exit(main(sys.argv[1:]))
