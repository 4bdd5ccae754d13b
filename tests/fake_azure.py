"""A fake Azure: WireServer and IMDS as a VM sees them, on sockets of this machine.

It refuses what the platform refuses (headers, api-version, method, a health report that is not
this VM's), records every request, and plays a script of answers and faults for each resource:

    with FakeAzure() as azure:
        azure.script("goalstate", [Status(503), Reset()])
        ...point a client at azure.wireserver and azure.imds...
        azure.requests  # what it asked, in order

`python3 -m tests.fake_azure` serves until Ctrl-C and prints each request.
"""

import argparse
import contextlib
import http.server
import json
import os
import re
import socket
import socketserver
import struct
import threading
import time
import uuid
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union
from urllib.parse import parse_qsl, urlsplit
from xml.etree import ElementTree

Address = Tuple[str, int]

WIRESERVER_VERSIONS = ("2015-04-05", "2012-11-30")  # the preferred one first
IMDS_VERSIONS = ("2017-03-01", "2025-04-07")  # the oldest and the newest
METHODS = {"goalstate": "GET", "config": "GET", "health": "POST", "telemetrydata": "POST"}
MAX_BODY = 1024 * 1024  # bytes of a request

GOAL_STATE = """\
<?xml version="1.0" encoding="utf-8"?>
<GoalState xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" \
xsi:noNamespaceSchemaLocation="goalstate10.xsd">
  <Version>{version}</Version>
  <Incarnation>{incarnation}</Incarnation>
  <Machine><ExpectedState>Started</ExpectedState></Machine>
  <Container>
    <ContainerId>{container_id}</ContainerId>
    <RoleInstanceList><RoleInstance>
      <InstanceId>{instance_id}</InstanceId><State>Started</State>
      <Configuration>
        <HostingEnvironmentConfig>{config}&amp;type=hostingEnvironmentConfig\
</HostingEnvironmentConfig>
        <SharedConfig>{config}&amp;type=sharedConfig</SharedConfig>
        <ConfigName>role.1.xml</ConfigName>
      </Configuration>
    </RoleInstance></RoleInstanceList>
  </Container>
</GoalState>
"""
# What Azure's own agent fetches besides, of either type.
CONFIG_PATH = "/machine/role"
CONFIG = """\
<?xml version="1.0" encoding="utf-8"?>
<HostingEnvironmentConfig version="1.0.0.0" goalStateIncarnation="{incarnation}">
  <Deployment name="web"/><Incarnation number="{incarnation}" instance="MachineRole_IN_0"/>
  <Role name="MachineRole"/>
</HostingEnvironmentConfig>
"""


class Request(NamedTuple):
    """One request, as it arrived."""

    time: float  # of the monotonic clock
    resource: str  # "goalstate", "health", "provisioning", or of IMDS the last part of the path
    method: str
    path: str
    headers: Dict[str, str]
    body: bytes
    status: Optional[int]  # of the answer; None if it was a fault
    reason: str  # why the platform refused it; empty if it did not


# What a script consists of: each is called with the handler that has to answer.


class Status:
    """Answer with a status, a body and headers; the body of a refusal says why."""

    def __init__(
        self, status: int, body: Union[bytes, str] = b"", headers: Optional[Dict[str, str]] = None
    ) -> None:
        self.status = status
        self.body = body.encode("utf-8") if isinstance(body, str) else body
        self.headers = headers or {}
        self.reason = self.body.decode("utf-8", "replace") if status >= 400 else ""

    def __call__(self, handler: "Handler") -> None:
        handler.send_response(self.status)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(self.body)))
        handler.end_headers()
        handler.wfile.write(self.body)


class Text(Status):
    """Answer 200 with BODY."""

    def __init__(self, body: Union[bytes, str]) -> None:
        super().__init__(200, body)


class Chunked(Text):
    """Answer 200 with BODY in chunks of 100 bytes."""

    def __call__(self, handler: "Handler") -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(self.body), 100):
            chunk = self.body[start : start + 100]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        handler.wfile.write(b"0\r\n\r\n")


class Fault:
    """Something other than an answer, here nothing; the connection is closed after it."""

    status, reason = None, ""

    def __call__(self, handler: "Handler") -> None:
        """Send nothing."""


class Raw(Fault):
    """Send these very bytes: garbage, half an answer, a forged header."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def __call__(self, handler: "Handler") -> None:
        handler.wfile.write(self.answer)


class Reset(Fault):
    """Close the connection with a TCP reset."""

    def __call__(self, handler: "Handler") -> None:
        linger = struct.pack("ii", 1, 0)  # socket(7): on, for 0 s
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(handler.connection.detach())  # close() would wait for the handler's files


class Silence(Fault):
    """Never answer, and keep the connection open."""

    def __call__(self, handler: "Handler") -> None:
        handler.azure.closing.wait()


class Slow(Fault):
    """Answer after some seconds, as the platform does; without ANSWER as the platform would."""

    def __init__(self, seconds: float, answer: Optional[Status] = None) -> None:
        self.seconds, self.answer = seconds, answer


class Trickle(Raw):
    """Send START, then ENDLESS again and again, every INTERVAL seconds."""

    def __init__(self, start: bytes, endless: bytes = b"x", interval: float = 0.05) -> None:
        super().__init__(start)
        self.endless, self.interval = endless, interval

    def __call__(self, handler: "Handler") -> None:
        super().__call__(handler)
        while not handler.azure.closing.wait(self.interval):
            handler.wfile.write(self.endless)


class Flood(Trickle):
    """Send START, then BLOCK without end, as fast as the client takes it."""

    def __init__(self, start: bytes, block: bytes = b"x" * 65536) -> None:
        super().__init__(start, block, 0)


Answer = Union[Status, Fault]
OK_LINE = b"HTTP/1.1 200 OK\r\n"  # the beginning of many a Raw, Trickle or Flood


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection, at either address."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    azure: "FakeAzure"
    role: str

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: FakeAzure.requests has it all."""

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        if not re.match(r"[0-9]{1,7}\Z", length) or int(length) > MAX_BODY:
            self.send_error(413)
            return
        body = self.rfile.read(int(length))
        resource, answer = self.azure.answer(self, body)
        if isinstance(answer, Slow):
            self.azure.closing.wait(answer.seconds)
            answer = answer.answer or self.azure.platform_answer(self, resource, body)
        asked = (time.monotonic(), resource, self.command, self.path, dict(self.headers), body)
        self.azure.record(Request(*asked, answer.status, answer.reason))
        self.close_connection = self.close_connection or isinstance(answer, Fault)
        with contextlib.suppress(OSError):  # the client hung up
            answer(self)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Takes connections on a socket that is listening already."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, handler: type) -> None:
        socketserver.BaseServer.__init__(self, listening.getsockname(), handler)
        self.socket = listening
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up."""


def listen(address: Address) -> socket.socket:
    """Listen at ADDRESS, also where this machine does not have that address yet: ip(7)."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND, which socket does not name
    listening.bind(address)
    listening.listen(64)
    return listening


class FakeAzure:
    """WireServer and IMDS of one VM; a context manager that serves in threads of its own.

    LISTEN makes a listening socket for an address: a test in a network namespace has its own.
    """

    def __init__(
        self,
        wireserver: Address = ("127.0.0.1", 0),
        imds: Address = ("127.0.0.1", 0),
        listen: Callable[[Address], socket.socket] = listen,
    ) -> None:
        self.incarnation = "1"
        self.vm_id, self.container_id = str(uuid.uuid4()), str(uuid.uuid4())
        self.instance_id = f"{uuid.uuid4()}.MachineRole_IN_0"
        self.computer_name = "web-prod-01"
        self.vm_name = "web-prod-01-vm"
        self.newest_version = IMDS_VERSIONS[1]  # that IMDS knows
        self.partial = False  # IMDS leaves osProfile out, unless it is asked with extended=true
        self.rate_limit = 0  # requests a second that IMDS answers; 0: any number
        self.mac_address = "525400123456"
        self.ready = threading.Event()  # a valid health report has arrived
        self.closing = threading.Event()
        self.requests: List[Request] = []
        self.on_request: Callable[[Request], None] = lambda request: None
        self._scripts: Dict[str, Tuple[List[Answer], Optional[Answer]]] = {}
        self._arrived = threading.Condition()
        self._asked: List[float] = []  # when, in the last second
        self._servers = []
        for role, address in (("wireserver", wireserver), ("imds", imds)):
            handler = type("Handler", (Handler,), {"azure": self, "role": role})
            self._servers.append(Server(listen(address), handler))
        self.wireserver, self.imds = (
            "{}:{}".format(*server.server_address[:2]) for server in self._servers
        )

    def __enter__(self) -> "FakeAzure":
        for server in self._servers:
            server.thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        """Stop, and let go of every client that is still waiting."""
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.thread.join()

    def script(
        self, resource: str, answers: Sequence[Answer], forever: Optional[Answer] = None
    ) -> None:
        """Have the next requests for RESOURCE answered with ANSWERS, one each, then with FOREVER.

        Without FOREVER the platform's own answer follows.
        """
        self._scripts[resource] = (list(answers), forever)

    def asked(self, resource: str) -> List[Request]:
        """The requests for RESOURCE so far."""
        return [request for request in self.requests if request.resource == resource]

    def wait_for(self, resource: str, count: int = 1) -> None:
        """Wait, for at most 30 s, until RESOURCE has been asked for COUNT times."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.asked(resource)) >= count, 30), resource

    def goal_state(self, template: str = GOAL_STATE) -> str:
        config = f"http://{self.wireserver}{CONFIG_PATH}?comp=config"
        return template.format(
            version=WIRESERVER_VERSIONS[1],
            incarnation=self.incarnation,
            container_id=self.container_id,
            instance_id=self.instance_id,
            config=f"{config}&amp;incarnation={self.incarnation}",
        )

    def provisioning_dvd(self) -> bytes:
        """The DVD that a VM has, for agents that do not ask IMDS, such as waagent."""
        return make_dvd(b"OVF-ENV.XML;1", OVF_ENV % self.computer_name.encode("ascii"))

    def record(self, request: Request) -> None:
        """Add REQUEST to the record, and tell those who wait for it."""
        with self._arrived:
            self.requests.append(request)
            self.on_request(request)
            self._arrived.notify_all()

    def answer(self, handler: Handler, body: bytes) -> Tuple[str, Answer]:
        """The resource that a request asks for, and what it is to be answered."""
        url = urlsplit(handler.path)
        path, query = url.path.rstrip("/"), dict(parse_qsl(url.query))
        if handler.role == "imds":
            resource = path.rsplit("/", 1)[-1]
        elif path == "/provisioning/health":
            resource = "provisioning"
        else:
            known = path in ("", "/machine", CONFIG_PATH)
            resource = query.get("comp", "") if known else "unknown"
        answers, forever = self._scripts.get(resource, ([], None))
        answer = answers.pop(0) if answers else forever
        return resource, answer or self.platform_answer(handler, resource, body)

    def platform_answer(self, handler: Handler, resource: str, body: bytes) -> Status:
        """What the platform answers by itself."""
        if handler.role == "imds":
            return self._imds(handler)
        if resource == "versions":
            versions = [f"<Version>{version}</Version>" for version in WIRESERVER_VERSIONS]
            preferred, supported = versions[0], "".join(versions)
            lists = f"<Preferred>{preferred}</Preferred><Supported>{supported}</Supported>"
            return Text(f"<Versions>{lists}</Versions>")
        if resource == "provisioning":
            return self._provisioning(handler, body)
        method = METHODS.get(resource)
        if method is None:
            return Status(404, f"the fake WireServer does not have {handler.path}")
        if handler.command != method:
            return Status(405, f"not a {method}")
        if handler.headers.get("x-ms-version") not in WIRESERVER_VERSIONS:
            return Status(400, f"no header x-ms-version: {' or '.join(WIRESERVER_VERSIONS)}")
        if resource == "health":
            return self._health(handler, body)
        if resource == "telemetrydata":
            return Status(200)
        text = self.goal_state(CONFIG if resource == "config" else GOAL_STATE)
        return Status(200, text, {"Content-Type": "text/xml; charset=utf-8"})

    def _health(self, handler: Handler, body: bytes) -> Status:
        if not handler.headers.get("Content-Type", "").startswith("text/xml"):
            return Status(415, "the Content-Type is not text/xml")
        try:
            health = ElementTree.fromstring(body)
        except ElementTree.ParseError as error:
            return Status(400, f"the health report is not valid XML: {error}")
        role = "Container/RoleInstanceList/Role"
        state = health.findtext(f"{role}/Health/State")
        if state not in ("Ready", "NotReady"):
            return Status(400, "not a health report")
        for path, expected, status in (
            ("Container/ContainerId", self.container_id, 400),
            (f"{role}/InstanceId", self.instance_id, 400),
            ("GoalStateIncarnation", self.incarnation, 410),
        ):
            if health.findtext(path) != expected:
                return Status(status, f"not the {path.split('/')[-1]} of the goal state")
        if state == "Ready":
            self.ready.set()
        return Status(200)

    def _provisioning(self, handler: Handler, body: bytes) -> Status:
        """What azure-init asks for; the goal state has no part in it."""
        if handler.command != "POST":
            return Status(405, "not a POST")
        try:
            state = json.loads(body.decode("utf-8"))["state"]
        except (ValueError, LookupError, TypeError):
            return Status(400, "not a provisioning report in JSON")
        if state not in ("Ready", "NotReady"):
            return Status(400, f"not a state: {state!r}")
        if state == "Ready":
            self.ready.set()
        return Status(200)

    def _imds(self, handler: Handler) -> Status:
        url = urlsplit(handler.path)
        path, query = url.path.rstrip("/"), dict(parse_qsl(url.query))
        if self.rate_limit:
            now = time.monotonic()
            with self._arrived:
                self._asked = [at for at in self._asked if at > now - 1] + [now]
                if len(self._asked) > self.rate_limit:
                    return Status(429, f"over {self.rate_limit} requests in a second")
        if handler.command != "GET":
            return Status(405, "not a GET")
        if handler.headers.get("Metadata", "").lower() != "true":
            return Status(400, "Required metadata header not specified")
        version = query.get("api-version", "")
        if not IMDS_VERSIONS[0] <= version <= self.newest_version:
            error = "api-version is invalid or was not specified in the request"
            versions = [self.newest_version, IMDS_VERSIONS[0]]
            return Status(400, json.dumps({"error": error, "newest-versions": versions}))
        value: Any = self._metadata(version, query.get("extended") == "true")
        for name in path.strip("/").split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            return Status(404, "Not found")
        if query.get("format") == "text":
            text = value if isinstance(value, str) else "\n".join(value)
            return Status(200, text, {"Content-Type": "text/plain; charset=utf-8"})
        return Status(200, json.dumps(value), {"Content-Type": "application/json; charset=utf-8"})

    def _metadata(self, version: str, extended: bool) -> Dict[str, Any]:
        """The metadata tree of this VM as api-version VERSION has it."""
        compute: Dict[str, Any] = {
            "azEnvironment": "AzurePublicCloud",
            "location": "westeurope",
            "name": self.vm_name,
            "osType": "Linux",
            "publicKeys": [],
            "vmId": self.vm_id,
            "vmSize": "Standard_D2s_v5",
        }
        if version >= "2020-07-15" and (extended or not self.partial):
            compute["osProfile"] = {
                "adminUsername": "azureuser",
                "computerName": self.computer_name,
                "disablePasswordAuthentication": "true",
            }
        addresses = [{"privateIpAddress": "10.0.0.4", "publicIpAddress": ""}]
        ipv4 = {"ipAddress": addresses, "subnet": [{"address": "10.0.0.0", "prefix": "24"}]}
        interface = {"ipv4": ipv4, "ipv6": {"ipAddress": []}, "macAddress": self.mac_address}
        network = {"interface": [interface]}
        instance: Dict[str, Any] = {"compute": compute, "network": network}
        if extended:
            instance["extended"] = {"compute": {"hasCustomData": False, "ppsType": "None"}}
        return {"metadata": {"instance": instance}}


OVF_ENV = b"""\
<?xml version="1.0" encoding="utf-8"?>
<Environment xmlns="http://schemas.dmtf.org/ovf/environment/1" \
xmlns:wa="http://schemas.microsoft.com/windowsazure">
<wa:ProvisioningSection><wa:Version>1.0</wa:Version>
<wa:LinuxProvisioningConfigurationSet>
<wa:ConfigurationSetType>LinuxProvisioningConfiguration</wa:ConfigurationSetType>
<wa:HostName>%s</wa:HostName><wa:UserName>azureuser</wa:UserName>
<wa:DisableSshPasswordAuthentication>true</wa:DisableSshPasswordAuthentication>
</wa:LinuxProvisioningConfigurationSet></wa:ProvisioningSection>
<wa:PlatformSettingsSection><wa:Version>1.0</wa:Version><wa:PlatformSettings>
<wa:ProvisionGuestAgent>true</wa:ProvisionGuestAgent>
</wa:PlatformSettings></wa:PlatformSettingsSection>
</Environment>
"""


def make_dvd(name: bytes, content: bytes) -> bytes:
    """An ISO 9660 file system (ECMA-119) with one file, in sectors of 2,048 bytes."""

    def both(number: int, size: str) -> bytes:
        return struct.pack("<" + size, number) + struct.pack(">" + size, number)

    def entry(name: bytes, sector: int, size: int, flags: int) -> bytes:
        data = both(sector, "I") + both(size, "I") + bytes(7) + bytes([flags, 0, 0]) + both(1, "H")
        data += bytes([len(name)]) + name.ljust(len(name) | 1, b"\0")
        return bytes([len(data) + 2, 0]) + data

    root = entry(b"\0", 18, 2048, 2)
    volume = b"\1CD001\1\0" + b"provisioning".rjust(44).ljust(64) + bytes(8) + both(20, "I")
    volume += bytes(32) + both(1, "H") * 2 + both(2048, "H") + bytes(24) + root
    directory = root + entry(b"\1", 18, 2048, 2) + entry(name, 19, len(content), 0)
    sectors = (volume, b"\xffCD001\1", directory, content)
    return bytes(16 * 2048) + b"".join(sector.ljust(2048, b"\0") for sector in sectors)


def describe(request: Request) -> str:
    """One line on REQUEST, for people."""
    reason = f" ({request.reason})" if request.reason else ""
    return f"{request.method} {request.path} -> {request.status or 'no answer'}{reason}"


def address(text: str) -> Address:
    """The address of HOST:PORT; raises argparse.ArgumentTypeError if it is not one."""
    host, _, port = text.rpartition(":")
    if not host or not re.match(r"[0-9]{1,5}\Z", port) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"not HOST:PORT: {text!r}")
    return host, int(port)


def main() -> None:
    """Serve until Ctrl-C."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python3 -m tests.fake_azure", description=__doc__, formatter_class=raw
    )
    listening = []
    for name, default in (("wireserver", "127.0.0.1:8080"), ("imds", "127.0.0.1:8081")):
        usual = f"where it listens [{default}]"
        parser.add_argument(
            f"--{name}", default=default, metavar="HOST:PORT", type=address, help=usual
        )
    for name, (host, port) in vars(parser.parse_args()).items():
        try:
            listening.append(listen((host, port)))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            parser.error(f"cannot listen at {host}:{port} (--{name}): {reason}")
    with FakeAzure(listen=lambda _: listening.pop(0)) as azure:
        azure.on_request = lambda request: print(describe(request), flush=True)
        print(f"WireServer {azure.wireserver}, IMDS {azure.imds}; Ctrl-C stops it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            azure.closing.wait()


if __name__ == "__main__":
    main()
