"""A whole VM under QEMU, run by any user, on a network with nothing but a fake Azure.

    with VM(Path("image.raw")) as vm, vm.boot() as boot:
        boot.wait(vm.azure.ready.is_set, timeout=60)
        boot.dhcp, boot.requests, boot.console  # what it has asked and said so far

The image is not changed: the VM writes to an overlay, which lasts from boot to boot.
Times are in seconds of the monotonic clock.
"""

import contextlib
import ctypes
import errno
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from azure_provision import AZURE_CHASSIS_ASSET_TAG, IMDS, WIRESERVER
from tests.fake_azure import Address, FakeAzure, Request, describe

# QEMU's user-mode network covers both of the platform's addresses. A connection to either starts a
# relay, which hands it over to the fake and ends. Nothing else can be reached.
NETWORK = "net=168.0.0.0/7,host=168.0.0.2,dhcpstart=168.0.0.15,ipv6=off,restrict=on"
SERVICES = ((WIRESERVER, 80), (WIRESERVER, 32526), (IMDS, 80))  # with waagent's HostGAPlugin
RELAY = """\
import socket, sys
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendmsg(
    [b"connection"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(4))], 0, sys.argv[1]
)  # the file descriptor 0, in four bytes
"""

PR_SET_PDEATHSIG = 1  # prctl(2)

MIB = 1024 * 1024  # bytes
FIXED_VHD, EXTERNAL_DATA = 2, 4  # the kind in a VHD's footer; a feature in a qcow2's header
GPT = 0xEE  # the kind of a partition in an MBR
LOADERS = {"x86_64": b"BOOTX64 EFI", "aarch64": b"BOOTAA64EFI"}  # short names of EFI/BOOT/BOOT….EFI
MAX_SEARCH, SEARCH_STEP = 4 * 1024 * 1024, 128 * 1024  # sectors

KERNEL = re.compile(r"Linux version |^\[ *\d+\.\d{6}\] ")
PROMPT = re.compile(r"(?<!Last )\blogin:")
LONGEST_LINE = 4096  # bytes, of a console
MAX_RESETS = 2  # the first boot of some images ends with one


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


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# DHCP.


class DhcpRequest(NamedTuple):
    """A message of a DHCP client: RFC 2131, RFC 2132, RFC 4702."""

    time: float
    kind: str  # "DISCOVER", "REQUEST" or "INFORM"
    name: str  # option 12, or else the first label of 81; empty if there is neither


# What Azure's server answers besides: options 3 and 6 are the router and the DNS server, which QEMU
# leaves out as nothing can be reached, 245 the WireServer, 121 the routes (RFC 3442).
ROUTER = socket.inet_aton("168.0.0.2")
SERVER, METADATA = socket.inet_aton(WIRESERVER), socket.inet_aton(IMDS)
ROUTES = ROUTER.join([b"\0", b"\x20" + SERVER, b"\x20" + METADATA, b""])
AZURE_OPTIONS = b"\3\4" + ROUTER + b"\6\4" + SERVER + b"\xf5\4" + SERVER
AZURE_OPTIONS += bytes([121, len(ROUTES)]) + ROUTES


def as_azure_answers(frame: bytes) -> bytes:
    """FRAME, to the VM; an answer of QEMU's DHCP server with the options that Azure's has, too.

    They take the place of the padding, so that no length changes. UDP needs no checksum.
    """
    if frame[23:24] != b"\x11" or frame[34:36] != b"\0\x43":  # not UDP from port 67
        return frame
    options = frame[:40] + b"\0\0" + frame[42:].rstrip(b"\0")[:-1] + AZURE_OPTIONS + b"\xff"
    return options.ljust(len(frame), b"\0")


KINDS = {b"\1": "DISCOVER", b"\3": "REQUEST", b"\x08": "INFORM"}  # option 53, of a client
COOKIE = b"\x63\x82\x53\x63"  # the options follow it
PADDING, END = 0, 255


def parse_dhcp(frame: bytes, at: float = 0.0) -> Optional[DhcpRequest]:
    """The message of a DHCP client in an Ethernet frame; None if it is something else."""
    options = {}
    rest = iter(frame.partition(COOKIE)[2])
    for code in itertools.takewhile(lambda code: code != END, rest):
        if code != PADDING:
            options[code] = bytes(itertools.islice(rest, next(rest, 0)))
    kind = KINDS.get(options.get(53, b""))
    if not kind or options.get(60, b"").startswith(b"PXEClient"):  # the firmware, not the image
        return None
    name, full = options.get(12), options.get(81, b"").ljust(4, b"\0")
    if not name:  # the other is in DNS's wire format or in ASCII
        name = full[4 : 4 + full[3]] if full[0] & 4 else full[3:].rstrip(b"\0")
    return DhcpRequest(at, kind, printable(name.rstrip(b"\0")))


ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[PX^_].*?\x1b\\|.)")


def printable(text: Any) -> str:
    """TEXT (or bytes) without escape sequences, and "?" for any other unprintable character."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in ESCAPES.sub("", text))


# The disk.


class Image(NamedTuple):
    """A disk image, which is only ever read."""

    options: Sequence[str]  # for QEMU to open it; a comma in a value is doubled
    size: int  # bytes, of the disk
    format: str  # of QEMU: raw, qcow2, vhdx, vpc
    obstacle: str = ""  # why Azure does not take this VHD
    flat: Optional[Path] = None  # the file that has the disk's bytes as they are

    def read(self, start: int, size: int) -> bytes:
        """SIZE bytes of the disk, or as many as it has; START and SIZE are whole sectors."""
        size = min(size, self.size - start)
        if size <= 0:
            return b""
        if self.flat:
            with self.flat.open("rb") as file:
                file.seek(start)
                return file.read(size)
        options = [f"file.{option}" for option in self.options]
        part = ",".join(["driver=raw", f"offset={start}", f"size={size}", *options])
        with tempfile.NamedTemporaryFile(prefix="azure-vm-") as copy:
            words = ("--force-share", "--image-opts", "-O", "raw", part, copy.name)
            run_tool("qemu-img", "convert", *words)
            return copy.read()

    def upload_commands(self) -> List[str]:
        """The commands that make of an image the VHD that Azure takes."""
        source, commands = f"--image-opts {shlex.quote(','.join(self.options))}", []
        if self.size % MIB:
            commands = [f"qemu-img convert {source} -O raw disk.raw", "truncate -s %1M disk.raw"]
            if self.read(0, 512)[450] == GPT:
                commands.append("sfdisk --relocate gpt-bak-std disk.raw")
            source = "-f raw disk.raw"
        fixed = "-O vpc -o subformat=fixed,force_size disk.vhd"
        return [*commands, f"qemu-img convert {source} {fixed}"]


def inspect(path: Path) -> Image:
    """What the file at PATH is; raises VMError if it is not a disk, or not one file.

    QEMU is told the format, as it would open whatever files an image of its own choice names.
    """
    if path.exists() and not path.is_file() and not path.is_block_device():
        raise VMError(f"{path}: not a disk: neither a file nor a block device")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 512:
            raise VMError(f"{path}: not a disk: it has {size} bytes")
        head, footer = (os.pread(file.fileno(), 512, at) for at in (0, size - 512))
    driver, obstacle, filename = "raw", "", str(path.resolve()).replace(",", ",,")
    options = [f"file.filename={filename}"]
    if footer.startswith(b"conectix"):
        # QEMU would go by the geometry, which is smaller; Azure goes by the size that is stated.
        driver, options = "vpc", ["force_size_calc=current_size", *options]
        stated, kind = struct.unpack_from(">Q4xI", footer, 48)
        if kind != FIXED_VHD or stated % MIB or stated + len(footer) != size:
            what = "fixed" if kind == FIXED_VHD else "dynamic"
            obstacle = f"its size is {what}, {stated:,} bytes, in a file of {size:,}: Azure takes "
            obstacle += "a fixed size, in whole MiB, in a file of 512 bytes more"
    elif head.startswith(b"QFI\xfb"):
        driver = "qcow2"
        version, backing, features = struct.unpack_from(">IQ56xQ", head, 4)
        if backing or (version > 2 and features & EXTERNAL_DATA):
            command = "qemu-img convert -O qcow2 IMAGE FLAT"
            raise VMError(f"{path}: it has its data in another file: flatten it first: {command}")
    elif head.startswith(b"vhdxfile"):
        driver = "vhdx"
    options = [f"driver={driver}", *options]
    words = ("--force-share", "--output=json", "--image-opts", ",".join(options))
    found = json.loads(run_tool("qemu-img", "info", *words))
    flat = path if driver == "raw" or (driver == "vpc" and not obstacle) else None
    return Image(options, found["virtual-size"], driver, obstacle, flat)


def efi_loaders(image: Image) -> Set[str]:
    """The architectures for which a FAT partition of the disk has the loader in EFI/BOOT.

    Its short name is searched for, which only a directory has.
    """
    size = 34 * 512  # an MBR, and with it the usual place and size of a GPT
    table = image.read(0, size).ljust(size, b"\0")
    if table[450] == GPT:
        entries = (struct.unpack_from("<QQ", table, at) for at in range(1056, len(table), 128))
        parts = [(first, last - first + 1) for first, last in entries]
    else:
        parts = [struct.unpack_from("<II", table, at) for at in range(454, 510, 16)]
    found = set()
    for start, size in parts:
        if b"FAT" in image.read(512 * start, 512)[54:90]:
            for place in range(start, start + min(size, MAX_SEARCH), SEARCH_STEP):
                block = image.read(512 * place, 512 * min(SEARCH_STEP, start + size - place))
                found |= {loader for loader in LOADERS if LOADERS[loader] in block}
    return found


SIGNALS: List[int] = []  # that ask us to end: a handler that raised could interrupt the cleaning up
PACKAGES = "apt install qemu-system-x86 qemu-utils ovmf; Arm64: qemu-system-arm qemu-efi-aarch64"


def run_tool(*command: str, timeout: float = 60) -> str:
    """The output of a command; raises VMError with its last line, or if it takes TIMEOUT s."""
    latest = time.monotonic() + timeout
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us alone
            preexec_fn=die_with_parent,
        )
    except FileNotFoundError:
        raise VMError(f"{command[0]} is not installed; in Debian: {PACKAGES}") from None
    with process:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, errors = process.communicate(timeout=0.2)
                break
            if SIGNALS or time.monotonic() > latest:
                process.kill()
                if SIGNALS:
                    raise KeyboardInterrupt
                raise VMError(f"{command[0]} did not end within {timeout} s")
    if process.returncode:
        raise VMError((errors.strip() or command[0]).splitlines()[-1])
    return output


# The VM.

MACHINES = {("x86_64", 1): "pc", ("x86_64", 2): "q35", ("aarch64", 2): "virt,gic-version=max"}
# Units of agents have ConditionVirtualization=microsoft. systemd knows Azure by DMI, but believes
# QEMU's CPU first.
CPUS = {
    ("x86_64", "kvm"): "host,hypervisor=off",
    ("x86_64", "tcg"): "max,hypervisor=off",
    ("aarch64", "kvm"): "host",
    ("aarch64", "tcg"): "max,pauth-impdef=on",
}
DMI = "type=1,manufacturer=Microsoft Corporation,product=Virtual Machine,version=Hyper-V"
FIRMWARE = Path("/usr/share/qemu/firmware")  # docs/interop/firmware.json of QEMU

# Firmware that counts to a hundred million and ends: an instant with KVM, a minute where KVM itself
# is emulated. For x86, where its last 16 bytes are run first: mov ecx, N; dec ecx; jnz;
# mov al, 0xfe; out 0x64, al. For Arm: movz w1, N; subs w1, w1, 1; b.ne; and PSCI's SYSTEM_OFF:
# movz w0, 8; movk w0, 0x8400, lsl 16; hvc 0.
PROBES = {
    "x86_64": bytes.fromhex("66b900e1f505 6649 75fc b0fe e664 0000").rjust(65536, b"\0"),
    "aarch64": bytes.fromhex("a1bea052 21040071 e1ffff54 00018052 0080b072 020000d4"),
}
KVM_TIMEOUT = 2  # seconds


class Setup(NamedTuple):
    """How this machine runs a VM."""

    generation: int = 1
    accelerator: str = "tcg"  # or "kvm"
    architecture: str = "x86_64"  # or "aarch64"

    def machine(self) -> List[str]:
        """The beginning of QEMU's command line."""
        return [
            *(f"qemu-system-{self.architecture}", "-nodefaults", "-no-user-config"),
            *("-machine", MACHINES[self.architecture, self.generation], "-display", "none"),
            *("-accel", self.accelerator, "-cpu", CPUS[self.architecture, self.accelerator]),
        ]

    def firmware(self) -> List[str]:
        """QEMU's options for EFI without Secure Boot, and not for microvm.

        It keeps its variables in memory.
        """
        for path in sorted(FIRMWARE.glob("*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            file, features = found["mapping"].get("executable"), found["features"]
            kinds = str([kind for kind in found["targets"] if self.architecture in kind.values()])
            if file and "secure-boot" not in features and re.search("q35|virt", kinds):
                drive = "if=pflash,readonly=on,format={format},file={filename}".format(**file)
                return ["-drive", drive]
        raise VMError(f"there is no EFI firmware; in Debian: {PACKAGES}")


def find_setup(image: Image, generation: int, emulate: bool = False) -> Tuple[Setup, str]:
    """How to run the VMs, and a line that tells it; raises VMError if it cannot be done.

    If GENERATION is 0, the disk decides, or else it is 2, which is Azure's default.
    """
    loaders, bios = efi_loaders(image), any(image.read(0, 512)[:440])
    architecture = "aarch64" if loaders == {"aarch64"} else "x86_64"
    if architecture == "aarch64" and generation == 1:
        raise VMError("Arm64 VMs are of generation 2")
    generation = generation or (1 if bios and not loaders else 2)
    run_tool(f"qemu-system-{architecture}", "--version")  # raises VMError if there is none
    setup = Setup(generation, "kvm", architecture)
    how = "KVM"
    if emulate or not runs_guest(setup, KVM_TIMEOUT):
        setup, how = setup._replace(accelerator="tcg"), "emulated"
        how += "" if emulate else ", as /dev/kvm cannot be used here"
    ways = [f"EFI on {each}" for each in sorted(loaders)] + ["BIOS"] * bios
    can = f"can boot by {' and '.join(ways) or 'neither EFI nor BIOS'}"
    return setup, f"generation {generation} (it {can}); {how}"


def runs_guest(setup: Setup, timeout: float) -> bool:
    """Whether a guest does its work within TIMEOUT s; that /dev/kvm opens would prove little."""
    with tempfile.NamedTemporaryFile(prefix="azure-vm-") as firmware:
        firmware.write(PROBES[setup.architecture])
        firmware.flush()
        with contextlib.suppress(VMError):
            run_tool(*setup.machine(), "-no-reboot", "-bios", firmware.name, timeout=timeout)
            return True
    return False


class VM(contextlib.ExitStack):
    """One of the VMs that Azure would create from an image: its identity, its Azure, its disk.

    A context manager, which leaves nothing behind.
    """

    def __init__(
        self,
        image: Path,
        setup: Setup = Setup(),  # noqa: B008
        number: int = 0,
        name: str = "rehearsal",
    ) -> None:
        super().__init__()
        self.setup, self.number = setup, number
        self.image = inspect(image)
        self.mac = f"00:0d:3a:00:00:{number + 1:02x}"  # one of Microsoft's
        names = (f"{name}_{number}", f"{name}{number:06}")  # as in a scale set
        self.directory = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="azure-vm-")))
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", self.path("disk"), str(self.image.size))
        Path(self.path("relay.py")).write_text(RELAY)
        addresses = ((WIRESERVER, 80), (IMDS, 80))
        self.azure = FakeAzure(*addresses, listen=lambda address: Door(self.directory, address))
        self.azure.vm_name, self.azure.computer_name = names
        self.azure.mac_address = self.mac.replace(":", "").upper()
        Path(self.path("dvd")).write_bytes(self.azure.provisioning_dvd())
        self.enter_context(self.azure)

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def boot(self) -> "VMBoot":
        """Turn the power on; at the end of this context manager it is cut."""
        return VMBoot(self)

    def command(self, console: int, sent: int, old: int, new: int) -> List[str]:
        """The command line of QEMU, which runs in the VM's directory.

        Its sockets are for frames that the VM sends, and for those to it before and after
        as_azure_answers().
        """
        setup = self.setup
        relay = f"{shlex.quote(sys.executable)} -I -S relay.py".replace(",", ",,")
        forward = "".join(
            f",guestfwd=tcp:{address}:{port}-cmd:{relay} {address}" for address, port in SERVICES
        )
        backing = ",".join(f"backing.{option}" for option in self.image.options)
        disk = "if=none,id=disk,cache=unsafe,werror=stop,rerror=stop,driver=qcow2,"
        disk += f"file.filename=disk,{backing}"
        # The second VM is another size: of generation 2 one with NVMe disks only, of generation 1
        # one with another disk before it, as Azure's temporary disk can be.
        slot, driver, temporary = "0x3", "virtio-blk-pci", []
        if self.number:
            slot = "0x12"
        if self.number and setup.generation == 2:
            driver = "nvme,serial=1"
        elif self.number:
            drive = "if=none,id=temporary,driver=null-co,size=16M,read-zeroes=on"
            temporary = ["-drive", drive, "-device", "virtio-blk-pci,drive=temporary"]
        return [
            *setup.machine(),
            *("-m", "1024", *(setup.firmware() if setup.generation == 2 else ())),
            *("-uuid", self.azure.vm_id, "-smbios", DMI),
            *("-smbios", f"type=3,asset={AZURE_CHASSIS_ASSET_TAG}"),
            *("-chardev", "stdio,id=monitor,signal=off", "-mon", "monitor,mode=control"),
            *("-chardev", f"file,id=console,path=/dev/fd/{console}", "-serial", "chardev:console"),
            *("-netdev", f"user,id=net,{NETWORK}{forward}"),
            *("-device", f"virtio-net-pci,netdev=net,mac={self.mac},romfile=,addr={slot}"),
            *("-chardev", f"socket,id=sent,fd={sent}", "-chardev", f"socket,id=old,fd={old}"),
            *("-chardev", f"socket,id=new,fd={new}"),
            *("-object", "filter-mirror,id=from,netdev=net,queue=rx,outdev=sent"),
            *("-object", "filter-redirector,id=to,netdev=net,queue=tx,outdev=old,indev=new"),
            *temporary,
            *("-drive", disk, "-device", f"{driver},drive=disk,bootindex=0"),
            *("-drive", "if=none,id=dvd,media=cdrom,format=raw,readonly=on,file.filename=dvd"),
            *("-device", "virtio-scsi-pci", "-device", "scsi-cd,drive=dvd"),
            *(("-device", "VGA") if setup.architecture == "x86_64" else ()),
        ]


def frames(source: socket.socket) -> Iterator[bytes]:
    """The frames that QEMU's filters write, each after its length."""
    with source, source.makefile("rb") as stream:
        for header in iter(lambda: stream.read(4), b""):
            yield stream.read(struct.unpack(">I", header)[0])


class VMBoot:
    """A VM from power-on to power-off, and what it has done so far."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        # Each has a time, a source ("Azure", "DHCP", "console", "VM") and a text.
        self.events: Any = queue.Queue()
        self.requests: List[Request] = []  # to Azure
        self.dhcp: List[DhcpRequest] = []
        self.lines: List[str] = []  # of the console, without control characters
        self.stage = "firmware"  # then "kernel" and "system", as far as the console tells
        self.interface = ""  # the name of its NIC, if the console tells
        self.fate = ""  # why it has ended by itself, if it has
        self.failure = ""  # of this machine
        self.read_bytes = 0  # of its disk
        self.active_time = time.monotonic()  # when it last did something
        self.prompt_time = 0.0  # when the console first asked for a login; 0 if it did not
        self.seconds = 0.0  # that the power was on, once it is off
        self.off = threading.Event()
        self._rest = b""  # of the console: the beginning of a line
        self._order_to_end = ""  # as people are told of it
        self._turned_off = False  # by the guest
        self._changed = threading.Condition()
        self._errors = Path(vm.path("errors"))  # of QEMU
        vm.azure.on_request = self._record
        self.started = time.monotonic()
        output, console = os.pipe()
        ours, theirs = zip(*(socket.socketpair() for _ in range(3)))
        self._sent, self._old, self._new = ours
        inputs = (console, *(each.fileno() for each in theirs))
        with self._errors.open("wb") as errors:
            self._process: Any = subprocess.Popen(
                vm.command(*inputs),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=str(vm.directory),
                pass_fds=inputs,
                start_new_session=True,  # Ctrl-C is for us alone
                preexec_fn=die_with_parent,
            )
        os.close(console)
        for each in theirs:
            each.close()
        self._threads = [
            threading.Thread(target=self._read_console, args=(output,), daemon=True),
            threading.Thread(target=self._read_frames, daemon=True),
            threading.Thread(target=self._pass_frames, daemon=True),
            threading.Thread(target=self._read_monitor, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "VMBoot":
        return self

    def __exit__(self, *args: Any) -> None:
        """Cut the power; what the VM has written to its disk stays."""
        self._order_to_end = "power cut: nothing more is awaited"
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
        self._order_to_end = "off"
        self._order("system_powerdown")

    def check(self) -> None:
        """Raise VMError if this machine has failed the VM; have QEMU tell what it has read."""
        self._order("query-blockstats")
        # An NVMe disk does not tell that writing has failed.
        full = os.strerror(errno.ENOSPC)
        if self.failure == full or shutil.disk_usage(self.vm.path(".")).free < MIB:
            raise VMError(f"{full}: {tempfile.gettempdir()} (TMPDIR chooses another)")
        if self.failure:
            errors = printable(self._errors.read_bytes().partition(b"\n")[0])
            raise VMError(f"{self.failure}{errors and ': '}{errors}")

    def _order(self, command: str) -> None:
        """Give QEMU a command; it may be gone already."""
        with contextlib.suppress(OSError):
            self._process.stdin.write(b'{"execute": "%s"}\n' % command.encode("ascii"))
            self._process.stdin.flush()

    def _record(self, request: Request) -> None:
        self.requests.append(request)
        self._tell("Azure", describe(request))

    def _tell(self, source: str, text: str) -> None:
        now = time.monotonic()
        if source != "VM":
            self.active_time = now
        self.events.put((now, source, printable(text)))
        with self._changed:
            self._changed.notify_all()

    def _read_console(self, descriptor: int) -> None:
        with open(descriptor, "rb", 0) as pipe:
            for block in iter(lambda: pipe.read(4096), b""):
                *lines, self._rest = (self._rest + block).split(b"\n")
                if len(self._rest) > LONGEST_LINE:
                    lines, self._rest = [*lines, self._rest], b""
                for text in (printable(line.rstrip(b"\r").split(b"\r")[-1]) for line in lines):
                    self.lines.append(text)
                    self._look_at(text)
                    self._tell("console", text)
                self._look_at(printable(self._rest))

    def _look_at(self, text: str) -> None:
        """Learn from a line of the console, or from the beginning of one: a prompt has no end."""
        panic = re.search(r"(?:^|\] )(Kernel panic - not syncing.*)", text)
        if panic:
            self.fate = panic.group(1)
        named = re.search(r" (\S+): renamed from eth0| net\.ifnames=0", text)
        if named:  # the latter is on the kernel's command line
            self.interface = named.group(1) or "eth0"
        if PROMPT.search(text):
            self.prompt_time = self.prompt_time or time.monotonic()
        if "systemd" in text or self.prompt_time:
            self.stage = "system"
        elif self.stage == "firmware" and KERNEL.search(text):
            self.stage = "kernel"

    def _read_frames(self) -> None:
        """Look for DHCP in what the VM sends."""
        for frame in frames(self._sent):
            request = parse_dhcp(frame, time.monotonic())
            if request:
                self.dhcp.append(request)
                self._tell("DHCP", f"{request.kind} {request.name or 'without a name'}")

    def _pass_frames(self) -> None:
        """Pass on what is sent to the VM."""
        with self._new, contextlib.suppress(OSError):  # QEMU is gone
            for frame in frames(self._old):
                frame = as_azure_answers(frame)
                self._new.sendall(struct.pack(">I", len(frame)) + frame)

    def _read_monitor(self) -> None:
        """Read QEMU's events; the stream ends with QEMU."""
        self._order("qmp_capabilities")
        resets, last_reset = 0, 0.0
        for line in self._process.stdout:
            message = json.loads(line.decode("utf-8"))
            event, data = message.get("event"), message.get("data", {})
            now = time.monotonic()
            if event == "RESET" and data.get("guest") and now > last_reset + 1:  # one has several
                resets, last_reset = resets + 1, now
                if resets > MAX_RESETS:
                    self.fate = "the VM resets again and again"
                self._tell("VM", "reset")
            elif event == "BLOCK_IO_ERROR":
                self.failure = str(data.get("reason"))
            elif event == "STOP":  # by a failing disk, or by KVM
                self.failure = self.failure or "QEMU has stopped the VM"
            elif event == "SHUTDOWN" and data.get("guest"):
                self._turned_off = True
            for device in message.get("return") or ():
                if device["device"] == "disk" and device["stats"]["rd_bytes"] > self.read_bytes:
                    self.read_bytes = device["stats"]["rd_bytes"]
                    self.active_time = time.monotonic()
        self._process.wait()
        self.seconds = time.monotonic() - self.started
        if self._turned_off and not self._order_to_end:
            self.fate = self.fate or "the VM turned itself off"
        elif not self._order_to_end:
            self.failure = self.failure or f"QEMU ended with status {self._process.returncode}"
        self.off.set()
        self._tell("VM", self._order_to_end or "off")
