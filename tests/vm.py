"""A whole VM under QEMU, as any user, in a network that is nothing but a fake Azure.

    with VM(Path("image.raw")) as vm, vm.boot() as boot:
        boot.wait(vm.azure.ready.is_set, timeout=60)
        boot.dhcp, boot.requests, boot.console  # what it asked and said so far

The image is not changed: the VM writes to an overlay of its own, which lasts from boot to boot.
Every time is in seconds of the monotonic clock.
"""

import codecs
import contextlib
import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from azure_provision import AZURE_CHASSIS_ASSET_TAG, IMDS, WIRESERVER
from tests.fake_azure import Address, FakeAzure, Request, describe

MAX_CONSOLE = 4 * 1024 * 1024  # characters that are kept of one boot

# The user-mode network of QEMU covers both of the platform's addresses; a connection to either one
# starts a relay, which hands the connection over to the fake and ends.
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

Listener = Callable[[float, str, str], None]


class VMError(Exception):
    """The VM cannot be made or started; the message says why, in one line."""


# The network.


class Door(socket.socket):
    """What looks like a listening socket at ADDRESS, and is where the relays hand over."""

    def __init__(self, directory: Path, address: Address) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = address
        opened = os.open(str(directory), os.O_RDONLY)
        try:  # a path of at most 107 bytes, whatever that of the directory: unix(7)
            self.bind(f"/proc/self/fd/{opened}/{address[0]}")
        finally:
            os.close(opened)

    def getsockname(self) -> Address:
        return self.address

    def accept(self) -> Tuple[socket.socket, Address]:
        _, ancillary, _, _ = self.recvmsg(16, socket.CMSG_SPACE(4))
        (descriptor,) = struct.unpack("i", ancillary[0][2])
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, descriptor), ("guest", 0)


def enter_private_network() -> None:
    """Move this process into a network of its own, which has a loopback interface alone.

    Raises OSError where the kernel does not let this user have one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWNET):
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")  # user_namespaces(7)
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def has_private_network() -> bool:
    """Whether this user may have a network namespace."""
    try:
        command = [sys.executable, "-I", "-S", "-c", ""]
        subprocess.check_call(command, preexec_fn=enter_private_network, start_new_session=True)
        return True
    except (OSError, subprocess.SubprocessError):
        return False


# DHCP.


class DhcpRequest(NamedTuple):
    """What a DHCP client asks: RFC 2131, RFC 2132, RFC 4702."""

    time: float
    kind: str  # "DISCOVER", "REQUEST" or "INFORM"
    mac: str
    name: str  # option 12, or else 81; empty if there is neither
    client: str  # what the options look like: "systemd-networkd"


KINDS = {b"\1": "DISCOVER", b"\3": "REQUEST", b"\x08": "INFORM"}  # option 53


def parse_dhcp(frame: bytes, at: float = 0.0) -> Optional[DhcpRequest]:
    """What a DHCP client asks in an Ethernet frame; None if it is something else."""
    if len(frame) < 34 or frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_UDP:
        return None
    udp = 14 + 4 * (frame[14] & 15)
    message = frame[udp + 8 :]
    if frame[udp + 2 : udp + 4] != b"\x00\x43" or message[236:240] != b"\x63\x82\x53\x63":
        return None
    options: Dict[int, bytes] = {}
    position = 240
    while position + 1 < len(message) and message[position] != 255:
        if message[position] == 0:  # padding
            position += 1
            continue
        length = message[position + 1]
        options[message[position]] = message[position + 2 : position + 2 + length]
        position += 2 + length
    kind = KINDS.get(options.get(53, b""))
    if not kind or options.get(60, b"").startswith(b"PXEClient"):  # the firmware: not the image
        return None
    mac = ":".join(f"{byte:02x}" for byte in message[28:34])
    name = options.get(12, b"") or fqdn(options.get(81, b""))
    return DhcpRequest(at, kind, mac, clean(name), dhcp_client(options))


def fqdn(option: bytes) -> bytes:
    """The name in option 81, which is ASCII or in DNS's wire format: RFC 4702."""
    if not option[:1] or not option[0] & 4:
        return option[3:]
    labels, position = [], 3
    while position < len(option) and option[position]:
        labels.append(option[position + 1 : position + 1 + option[position]])
        position += 1 + option[position]
    return b".".join(labels)


def dhcp_client(options: Dict[int, bytes]) -> str:
    """Which DHCP client sends such options, as far as they tell: some send their name (60)."""
    wanted = options.get(55, b"")
    if options.get(60):
        return clean(options[60])
    if options.get(61, b"")[5:11] == b"\0\2\0\0\xab\x11":  # systemd's enterprise number
        return "systemd-networkd"
    if 249 in wanted:
        return "NetworkManager"
    return "dhclient" if wanted.startswith(b"\x01\x1c\x02") else "an unknown client"


# The console.

ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[PX^_].*?\x1b\\|.)")


def clean(text: Any) -> str:
    """TEXT (or bytes) without escape sequences, and "?" for any other unprintable character."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in ESCAPES.sub("", text))


# The disk.


class Image(NamedTuple):
    """A disk image, which is only ever read."""

    options: str  # that have QEMU open it
    size: int  # bytes, of the disk
    format: str


def inspect(path: Path) -> Image:
    """What QEMU makes of the file at PATH; raises VMError if it is not a disk."""
    footer = read_footer(path)
    options = "file.filename=" + str(path.resolve()).replace(",", ",,")
    if footer.startswith(b"conectix"):  # qemu-img takes a VHD of fixed size for a raw image
        # Azure goes by the size that the footer states, QEMU by its geometry, which is smaller.
        options = f"driver=vpc,force_size_calc=current_size,{options}"
    else:
        found = run("qemu-img", "info", "--force-share", "--output=json", str(path.resolve()))
        options = f"driver={json.loads(found)['format']},{options}"
    found = run("qemu-img", "info", "--force-share", "--output=json", "--image-opts", options)
    return Image(options, json.loads(found)["virtual-size"], json.loads(found)["format"])


def read_footer(path: Path) -> bytes:
    """The last sector of the file at PATH; raises VMError if it is not a file with one."""
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise VMError(f"{path}: not a disk: neither a file nor a block device")
        with open(str(path), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 512, 0))
            footer = file.read(512)
    except OSError as error:
        raise VMError(f"{path}: {error.strerror}") from None
    if size < 512:
        raise VMError(f"{path}: not a disk: it has {size} bytes")
    return footer


def run(*command: str) -> str:
    """The output of a command that succeeds; raises VMError with its last line if it fails."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us alone
        )
    except OSError as error:
        raise VMError(f"{command[0]}: {error.strerror}") from None
    output, errors = process.communicate()
    if process.returncode:
        raise VMError(clean((errors.strip() or command[0]).splitlines()[-1]))
    return output


# The VM.

CPU = {"kvm": ("-accel", "kvm", "-cpu", "host"), "tcg": ("-accel", "tcg", "-cpu", "max")}
FLASH = "if=pflash,format=raw,readonly=on,file="


class Setup(NamedTuple):
    """How this machine is to run a VM."""

    generation: int = 1
    accelerator: str = "tcg"  # or "kvm"
    private: bool = True  # in a network of its own
    memory: int = 1024  # MiB
    firmware: str = "/usr/share/OVMF/OVMF_CODE_4M.fd"  # of generation 2


class VM:
    """One of the VMs that Azure would create from an image: its identity, its Azure, its disk.

    A context manager; at its end nothing of it is left. LISTENER is called, from any thread, with
    the time, the source ("Azure", "DHCP", "console", "VM") and the text of what happens.
    """

    def __init__(
        self,
        image: Path,
        setup: Setup = Setup(),  # noqa: B008
        number: int = 0,
        name: str = "rehearsal",
        listener: Listener = lambda at, source, text: None,
    ) -> None:
        self.setup, self.listener = setup, listener
        self.image = inspect(image)
        self.uuid = str(uuid.uuid4())
        self.mac = f"00:0d:3a:00:00:{number + 1:02x}"  # one of Microsoft's
        self._undo = contextlib.ExitStack()
        self.directory = Path(tempfile.mkdtemp(prefix="azure-vm-"))
        self._undo.callback(shutil.rmtree, str(self.directory), ignore_errors=True)
        with contextlib.ExitStack() as failed:
            failed.callback(self._undo.close)
            run("qemu-img", "create", "-q", "-f", "qcow2", self.path("disk"), str(self.image.size))
            Path(self.path("relay.py")).write_text(RELAY)
            self.azure = FakeAzure(
                (WIRESERVER, 80), (IMDS, 80), listen=lambda address: Door(self.directory, address)
            )
            failed.pop_all()
        # The names of an instance of a scale set.
        self.azure.vm_name, self.azure.computer_name = f"{name}_{number}", f"{name}{number:06}"
        self.azure.vm_id = self.uuid
        self.azure.mac_address = self.mac.replace(":", "").upper()
        self._undo.enter_context(self.azure)

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def __enter__(self) -> "VM":
        return self

    def __exit__(self, *args: Any) -> None:
        self._undo.close()

    def boot(self) -> "Boot":
        """Turn the power on; the block of this context manager ends with a power cut."""
        return Boot(self)

    def command(self, console: int, packets: int) -> List[str]:
        """The command line of QEMU, which runs in the VM's directory."""
        setup = self.setup
        relay = " ".join(shlex.quote(word) for word in (sys.executable, "-I", "-S", "relay.py"))
        relay = relay.replace(",", ",,")
        forward = "".join(
            f",guestfwd=tcp:{address}:80-cmd:{relay} {address}" for address in (WIRESERVER, IMDS)
        )
        machine = "pc" if setup.generation == 1 else "q35"
        return [
            "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-display", "none", "-device", "VGA"),
            *CPU[setup.accelerator],
            *("-machine", machine, "-m", str(setup.memory)),
            *(("-drive", FLASH + setup.firmware) if setup.generation == 2 else ()),
            *("-uuid", self.uuid, "-smbios", f"type=3,asset={AZURE_CHASSIS_ASSET_TAG}"),
            *("-chardev", "stdio,id=monitor,signal=off", "-mon", "monitor,mode=control"),
            *("-chardev", f"file,id=console,path=/dev/fd/{console}", "-serial", "chardev:console"),
            *("-netdev", f"user,id=net,{NETWORK}{forward}"),
            *("-device", f"virtio-net-pci,netdev=net,mac={self.mac},romfile="),
            *("-object", f"filter-dump,id=dump,netdev=net,file=/dev/fd/{packets}"),
            "-drive",
            "if=none,id=disk,cache=unsafe,driver=qcow2,file.filename=disk,"
            + ",".join(f"backing.{option}" for option in split_options(self.image.options)),
            *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
        ]


def split_options(options: str) -> List[str]:
    """The options of a list for QEMU, where a comma in a value is doubled."""
    return [option.replace("\0", ",,") for option in options.replace(",,", "\0").split(",")]


class Boot:
    """A VM from power-on to power-off, and what it did so far."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.errors = Path(vm.path("errors"))  # what QEMU complained of
        self.requests: List[Request] = []  # to Azure
        self.lines: List[str] = []  # of the console, without control characters
        self.prompt_time = 0.0  # when the console last asked for a login; 0 if it did not
        self.seconds = 0.0  # that the power was on, once it is off
        self.panic = ""  # the line of a kernel panic
        self.dhcp: List[DhcpRequest] = []
        self.off = threading.Event()
        self.resets = 0  # how often the guest rebooted itself
        self._rest = ""  # of the console: the beginning of a line
        self._changed = threading.Condition()
        vm.azure.on_request = self._record
        self.started = time.monotonic()
        pipes = [os.pipe(), os.pipe()]
        inner = [end for _, end in pipes]
        with contextlib.ExitStack() as started:
            for end in inner:
                started.callback(os.close, end)
            self.process = subprocess.Popen(
                vm.command(*inner),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=started.enter_context(open(str(self.errors), "wb")),
                cwd=str(vm.directory),
                pass_fds=inner,
                start_new_session=True,  # Ctrl-C is for us alone
                preexec_fn=self._before_qemu,
            )
        self._threads = [
            threading.Thread(target=self._read_console, args=(pipes[0][0],)),
            threading.Thread(target=self._read_packets, args=(pipes[1][0],)),
            threading.Thread(target=self._read_monitor),
        ]
        for thread in self._threads:
            thread.start()

    def _before_qemu(self) -> None:
        if self.vm.setup.private:
            enter_private_network()
        die_with_parent()

    def __enter__(self) -> "Boot":
        return self

    def __exit__(self, *args: Any) -> None:
        self.cut_power()

    # What it did.

    @property
    def console(self) -> str:
        """What it said on the serial port."""
        return "\n".join([*self.lines, clean(self._rest)])

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until CONDITION holds; return whether it does.

        It is looked at again whenever something happens. Waiting ends early when the VM is off.
        """
        with self._changed:
            self._changed.wait_for(lambda: condition() or self.off.is_set(), timeout)
            return condition()

    def wait_for_change(self, timeout: float) -> None:
        """Wait until something happens, for at most TIMEOUT seconds."""
        with self._changed:
            self._changed.wait(timeout)

    def wait_for_console(self, text: str, timeout: float) -> None:
        """Wait until the VM has said TEXT; raises AssertionError if it does not."""
        if not self.wait(lambda: text in self.console, timeout):
            raise AssertionError(f"the console does not say {text!r}:\n{self.console}")

    # The power.

    def press_power_button(self) -> None:
        """Ask the VM to turn itself off."""
        self._order("system_powerdown")

    def shut_down(self, timeout: float) -> bool:
        """Press the power button; return whether the VM turned itself off in TIMEOUT seconds."""
        self.press_power_button()
        return self.wait(self.off.is_set, timeout)

    def check(self) -> None:
        """Raise VMError if it was QEMU that failed, not the VM that turned itself off."""
        if self.process.returncode:
            errors = self.errors.read_text(encoding="utf-8", errors="replace").splitlines()
            raise VMError(clean(errors[-1] if errors else f"QEMU: {self.process.returncode}"))

    def cut_power(self) -> None:
        """Turn the VM off at once; what it has written to its disk stays."""
        self._order("quit")
        if not self.off.wait(10):
            self.process.kill()
        for thread in self._threads:
            thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # QEMU never read the last order
                pipe.close()

    def _order(self, command: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is off already
            self.process.stdin.write(b'{"execute": "%s"}\n' % command.encode("ascii"))
            self.process.stdin.flush()

    # What it says.

    def _record(self, request: Request) -> None:
        self.requests.append(request)
        self._tell("Azure", describe(request))

    def _tell(self, source: str, text: str) -> None:
        self.vm.listener(time.monotonic(), source, text)
        with self._changed:
            self._changed.notify_all()

    def _read_console(self, descriptor: int) -> None:
        size, decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")
        with open(descriptor, "rb", 0) as pipe:
            for block in iter(lambda: pipe.read(4096), b""):
                size += len(block)
                if size > MAX_CONSOLE:
                    continue
                *lines, self._rest = (self._rest + decoder.decode(block)).split("\n")
                for line in lines:
                    self.lines.append(clean(line.rstrip("\r")))
                    if "Kernel panic" in line:
                        self.panic = self.lines[-1]
                    self._tell("console", self.lines[-1])
                if self._rest.rstrip().endswith("login:"):
                    self.prompt_time = time.monotonic()

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
        assert self.process.stdout is not None
        self._order("qmp_capabilities")
        for line in self.process.stdout:
            event = json.loads(line.decode("utf-8")).get("event")
            if event == "RESET":
                self.resets += 1
                self._tell("VM", "reset")
        self.process.wait()
        self.seconds = time.monotonic() - self.started
        self.off.set()
        self._tell("VM", "off")
