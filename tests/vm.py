"""A whole VM under QEMU, run by any user, on a network with nothing but a fake Azure.

    with VM(Path("image.raw")) as vm, vm.boot() as boot:
        boot.wait(vm.azure.ready.is_set, timeout=60)
        boot.dhcp, boot.requests, boot.console  # what it has asked and said so far

The image is not changed: the VM writes to an overlay, which lasts from boot to boot.
Times are in seconds of the monotonic clock.
"""

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from azure_provision import AZURE_CHASSIS_ASSET_TAG, IMDS, WIRESERVER
from tests.fake_azure import Address, FakeAzure, Request, describe

# QEMU's user-mode network covers both of the platform's addresses. A connection to either starts a
# relay, which hands it over to the fake and ends.
NETWORK = "net=168.0.0.0/7,host=168.0.0.2,dhcpstart=168.0.0.15,dns=168.0.0.3,ipv6=off"
RELAY = """\
import socket, sys
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendmsg(
    [b"connection"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(4))], 0, sys.argv[1]
)  # the file descriptor 0, in four bytes
"""

CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000  # unshare(2)
PR_SET_PDEATHSIG = 1  # prctl(2)
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # netdevice(7)


class VMError(Exception):
    """The VM cannot be made or started; the message says why, in one line."""


# The network.


class Door(socket.socket):
    """Acts as a socket that listens at ADDRESS; the relays hand their connections over here."""

    def __init__(self, directory: Path, address: Address) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = address
        self.bind(str(directory / address[0]))

    def getsockname(self) -> Address:
        return self.address

    def accept(self) -> Tuple[socket.socket, Address]:
        _, ancillary, _, _ = self.recvmsg(16, socket.CMSG_SPACE(4))
        (descriptor,) = struct.unpack("i", ancillary[0][2])
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, descriptor), ("guest", 0)


def enter_private_network() -> None:
    """Move this process into a network namespace of its own, with only a loopback interface.

    Raises OSError if the kernel does not let this user have one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def has_private_network() -> bool:
    """Whether this user may have a network namespace."""
    with contextlib.suppress(subprocess.SubprocessError):
        return subprocess.call(["true"], preexec_fn=enter_private_network) == 0
    return False


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# DHCP.


class DhcpRequest(NamedTuple):
    """A message of a DHCP client: RFC 2131, RFC 2132, RFC 4702."""

    time: float
    kind: str  # "DISCOVER", "REQUEST" or "INFORM"
    name: str  # option 12, or else 81; empty if there is neither
    client: str  # as far as its options tell: "systemd-networkd"


KINDS = {b"\1": "DISCOVER", b"\3": "REQUEST", b"\x08": "INFORM"}  # option 53
PADDING, END = 0, 255


def parse_dhcp(frame: bytes, at: float = 0.0) -> Optional[DhcpRequest]:
    """The message of a DHCP client in an Ethernet frame; None if it is something else."""
    if frame[12:14] != b"\x08\x00" or frame[23:24] != b"\x11":  # not UDP over IPv4
        return None
    udp = 14 + 4 * (frame[14] & 15)
    message = frame[udp + 8 :]
    if frame[udp + 2 : udp + 4] != b"\x00\x43" or message[236:240] != b"\x63\x82\x53\x63":
        return None
    options = {}
    rest = iter(message[240:])
    for code in itertools.takewhile(lambda code: code != END, rest):
        if code != PADDING:
            options[code] = bytes(itertools.islice(rest, next(rest, 0)))
    kind = KINDS.get(options.get(53, b""))
    if not kind or options.get(60, b"").startswith(b"PXEClient"):  # the firmware, not the image
        return None
    name = options.get(12, b"") or fqdn(options.get(81, b""))
    return DhcpRequest(at, kind, printable(name), dhcp_client(options))


def fqdn(option: bytes) -> bytes:
    """The name in option 81, which is ASCII or in DNS's wire format: RFC 4702."""
    if not option[:1] or not option[0] & 4:
        return option[3:]
    rest = iter(option[3:])
    return b".".join(bytes(itertools.islice(rest, length)) for length in rest if length)


def dhcp_client(options: Dict[int, bytes]) -> str:
    """The DHCP client that sends such options; some send their own name, as option 60."""
    wanted = options.get(55, b"")
    if options.get(60):
        return printable(options[60])
    if options.get(61, b"")[5:11] == b"\0\2\0\0\xab\x11":  # systemd's enterprise number
        return "systemd-networkd"
    if 249 in wanted:
        return "NetworkManager"
    return "dhclient" if wanted.startswith(b"\x01\x1c\x02") else "an unknown client"


ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[PX^_].*?\x1b\\|.)")


def printable(text: Any) -> str:
    """TEXT (or bytes) without escape sequences, and "?" for any other unprintable character."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in ESCAPES.sub("", text))


# The disk.


class Image(NamedTuple):
    """A disk image, which is only ever read."""

    options: str  # for QEMU to open it
    size: int  # bytes, of the disk
    format: str


def inspect(path: Path) -> Image:
    """What QEMU makes of the file at PATH; raises VMError if it is not a disk."""

    def info(*words: str) -> Any:
        return json.loads(run_tool("qemu-img", "info", "--force-share", "--output=json", *words))

    if read_footer(path).startswith(b"conectix"):
        # qemu-img takes a VHD of fixed size for a raw image. Azure goes by the size that the
        # footer states, QEMU by its geometry, which is smaller.
        driver = "vpc,force_size_calc=current_size"
    else:
        driver = info(str(path.resolve()))["format"]
    filename = str(path.resolve()).replace(",", ",,")
    options = f"driver={driver},file.filename={filename}"
    found = info("--image-opts", options)
    return Image(options, found["virtual-size"], found["format"])


def read_footer(path: Path) -> bytes:
    """The last sector of the file at PATH; raises VMError if there is none."""
    if path.exists() and not path.is_file() and not path.is_block_device():
        raise VMError(f"{path}: not a disk: neither a file nor a block device")
    with path.open("rb", 0) as file:
        size = file.seek(0, os.SEEK_END)
        if size < 512:
            raise VMError(f"{path}: not a disk: it has {size} bytes")
        file.seek(size - 512)
        return file.read(512)


def split_options(options: str) -> List[str]:
    """The single options in a list for QEMU, where a comma in a value is doubled."""
    return [option.replace("\0", ",,") for option in options.replace(",,", "\0").split(",")]


def run_tool(*command: str, timeout: Optional[float] = None) -> str:
    """The output of a command; raises VMError with its last line, or TimeoutExpired."""
    try:
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us alone
            timeout=timeout,
        )
    except FileNotFoundError:
        packages = "in Debian: apt install qemu-system-x86 qemu-utils"
        raise VMError(f"{command[0]} is not installed ({packages})") from None
    if process.returncode:
        raise VMError(printable((process.stderr.strip() or command[0]).splitlines()[-1]))
    return process.stdout


# The VM.

CPU = {"kvm": ("-accel", "kvm", "-cpu", "host"), "tcg": ("-accel", "tcg", "-cpu", "max")}


class Setup(NamedTuple):
    """How this machine runs a VM."""

    generation: int = 1
    accelerator: str = "tcg"  # or "kvm"
    private: bool = True  # in a network of its own
    firmware: str = "/usr/share/OVMF/OVMF_CODE_4M.fd"  # of generation 2


class VM:
    """One of the VMs that Azure would create from an image: its identity, its Azure, its disk.

    A context manager, which leaves nothing behind. LISTENER is called, from any thread, with the
    time, the source ("Azure", "DHCP", "console", "VM") and the text of each event.
    """

    def __init__(
        self,
        image: Path,
        setup: Setup = Setup(),  # noqa: B008
        number: int = 0,
        name: str = "rehearsal",
        listener: Callable[[float, str, str], None] = lambda at, source, text: None,
    ) -> None:
        self.setup, self.listener = setup, listener
        self.image = inspect(image)
        self.mac = f"00:0d:3a:00:00:{number + 1:02x}"  # one of Microsoft's
        self.names = (f"{name}_{number}", f"{name}{number:06}")  # as in a scale set

    def __enter__(self) -> "VM":
        self._directory = tempfile.TemporaryDirectory(prefix="azure-vm-")
        self.directory = Path(self._directory.name)
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", self.path("disk"), str(self.image.size))
        Path(self.path("relay.py")).write_text(RELAY)
        addresses = ((WIRESERVER, 80), (IMDS, 80))
        self.azure = FakeAzure(*addresses, listen=lambda address: Door(self.directory, address))
        self.azure.vm_name, self.azure.computer_name = self.names
        self.azure.mac_address = self.mac.replace(":", "").upper()
        self.azure.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.azure.__exit__()
        self._directory.cleanup()

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def boot(self) -> "VMBoot":
        """Turn the power on; at the end of this context manager it is cut."""
        return VMBoot(self)

    def command(self, console: int, packets: int) -> List[str]:
        """The command line of QEMU, which runs in the VM's directory."""
        setup = self.setup
        relay = f"{shlex.quote(sys.executable)} -I -S relay.py".replace(",", ",,")
        forward = "".join(
            f",guestfwd=tcp:{address}:80-cmd:{relay} {address}" for address in (WIRESERVER, IMDS)
        )
        flash = f"if=pflash,format=raw,readonly=on,file={setup.firmware}"
        backing = ",".join(f"backing.{option}" for option in split_options(self.image.options))
        disk = f"if=none,id=disk,cache=unsafe,driver=qcow2,file.filename=disk,{backing}"
        return [
            "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-display", "none", "-device", "VGA"),
            *CPU[setup.accelerator],
            *("-machine", "pc" if setup.generation == 1 else "q35", "-m", "1024"),
            *(("-drive", flash) if setup.generation == 2 else ()),
            *("-uuid", self.azure.vm_id, "-smbios", f"type=3,asset={AZURE_CHASSIS_ASSET_TAG}"),
            *("-chardev", "stdio,id=monitor,signal=off", "-mon", "monitor,mode=control"),
            *("-chardev", f"file,id=console,path=/dev/fd/{console}", "-serial", "chardev:console"),
            *("-netdev", f"user,id=net,{NETWORK}{forward}"),
            *("-device", f"virtio-net-pci,netdev=net,mac={self.mac},romfile="),
            *("-object", f"filter-dump,id=dump,netdev=net,file=/dev/fd/{packets}"),
            *("-drive", disk, "-device", "virtio-blk-pci,drive=disk,bootindex=0"),
        ]


class VMBoot:
    """A VM from power-on to power-off, and what it has done so far."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.requests: List[Request] = []  # to Azure
        self.dhcp: List[DhcpRequest] = []
        self.lines: List[str] = []  # of the console, without control characters
        self.panic = ""  # the line of a kernel panic
        self.prompt_time = 0.0  # when the console last asked for a login; 0 if it did not
        self.seconds = 0.0  # that the power was on, once it is off
        self.off = threading.Event()
        self._rest = b""  # of the console: the beginning of a line
        self._changed = threading.Condition()
        self._errors = Path(vm.path("errors"))  # of QEMU
        vm.azure.on_request = self._record
        self.started = time.monotonic()
        outputs, inputs = zip(os.pipe(), os.pipe())
        with self._errors.open("wb") as errors:
            self._process: Any = subprocess.Popen(
                vm.command(*inputs),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=str(vm.directory),
                pass_fds=inputs,
                start_new_session=True,  # Ctrl-C is for us alone
                preexec_fn=self._before_qemu,
            )
        for descriptor in inputs:
            os.close(descriptor)
        self._threads = [
            threading.Thread(target=self._read_console, args=(outputs[0],)),
            threading.Thread(target=self._read_packets, args=(outputs[1],)),
            threading.Thread(target=self._read_monitor),
        ]
        for thread in self._threads:
            thread.start()

    def _before_qemu(self) -> None:
        if self.vm.setup.private:
            enter_private_network()
        die_with_parent()

    def __enter__(self) -> "VMBoot":
        return self

    def __exit__(self, *args: Any) -> None:
        """Cut the power; what the VM has written to its disk stays."""
        self._order("quit")
        if not self.off.wait(10):
            self._process.kill()
        for thread in self._threads:
            thread.join()
        self._process.communicate()  # closes its pipes

    @property
    def console(self) -> str:
        """What it has said on the serial port."""
        return "\n".join([*self.lines, printable(self._rest)])

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until CONDITION holds, at some event, or the VM is off; return whether it holds."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self.off.is_set(), timeout)
            return condition()

    def press_power_button(self) -> None:
        self._order("system_powerdown")

    def check(self) -> None:
        """Raise VMError if the VM is off because QEMU failed."""
        if self._process.returncode:
            errors = self._errors.read_text(encoding="utf-8", errors="replace").splitlines()
            raise VMError(printable(errors[-1] if errors else f"QEMU: {self._process.returncode}"))

    def _order(self, command: str) -> None:
        """Give QEMU a command; it may be gone already."""
        with contextlib.suppress(OSError):
            self._process.stdin.write(b'{"execute": "%s"}\n' % command.encode("ascii"))
            self._process.stdin.flush()

    def _record(self, request: Request) -> None:
        self.requests.append(request)
        self._tell("Azure", describe(request))

    def _tell(self, source: str, text: str) -> None:
        self.vm.listener(time.monotonic(), source, text)
        with self._changed:
            self._changed.notify_all()

    def _read_console(self, descriptor: int) -> None:
        with open(descriptor, "rb", 0) as pipe:
            for block in iter(lambda: pipe.read(4096), b""):
                *lines, self._rest = (self._rest + block).split(b"\n")
                for line in lines:
                    self._add_line(line)
                if self._rest.rstrip().endswith(b"login:"):
                    self.prompt_time = time.monotonic()

    def _add_line(self, line: bytes) -> None:
        text = printable(line.rstrip(b"\r"))
        self.lines.append(text)
        if "Kernel panic" in text:
            self.panic = text
        self._tell("console", text)

    def _read_packets(self, descriptor: int) -> None:
        """Read a packet capture as it grows: https://wiki.wireshark.org/Development/LibpcapFileFormat."""
        with open(descriptor, "rb") as capture:
            capture.read(24)
            for header in iter(lambda: capture.read(16), b""):
                frame = capture.read(struct.unpack("=IIII", header)[2])
                request = parse_dhcp(frame, time.monotonic())
                if request:
                    self.dhcp.append(request)
                    name = request.name or "without a name"
                    self._tell("DHCP", f"{request.kind} {name} ({request.client})")

    def _read_monitor(self) -> None:
        """Read QEMU's events; the stream ends with QEMU."""
        self._order("qmp_capabilities")
        for line in self._process.stdout:
            if json.loads(line.decode("utf-8")).get("event") == "RESET":
                self._tell("VM", "reset")
        self._process.wait()
        self.seconds = time.monotonic() - self.started
        self.off.set()
        self._tell("VM", "off")
