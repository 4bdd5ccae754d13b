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
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from azure_provision import AZURE_CHASSIS_ASSET_TAG, IMDS, WIRESERVER
from tests.fake_azure import Address, FakeAzure, Request, describe

# QEMU's user-mode network covers both of the platform's addresses. A connection to either starts a
# relay, which hands it over to the fake and ends.
NETWORK = "net=168.0.0.0/7,host=168.0.0.2,dhcpstart=168.0.0.15,dns=168.0.0.3,ipv6=off"
SERVICES = ((WIRESERVER, 80), (WIRESERVER, 32526), (IMDS, 80))  # with waagent's HostGAPlugin
RELAY = """\
import socket, sys
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendmsg(
    [b"connection"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(4))], 0, sys.argv[1]
)  # the file descriptor 0, in four bytes
"""

CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000  # unshare(2)
PR_SET_PDEATHSIG = 1  # prctl(2)
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # netdevice(7)


MIB = 1024 * 1024  # bytes
FIXED_VHD, EXTERNAL_DATA = 2, 4  # the kind in a VHD's footer; a feature in a qcow2's header
GPT = 0xEE  # the kind of a partition in an MBR
LOADERS = {"x86_64": b"BOOTX64 EFI", "aarch64": b"BOOTAA64EFI"}  # short names of EFI/BOOT/BOOT….EFI
MAX_SEARCH, SEARCH_STEP = 4 * 1024 * 1024, 128 * 1024  # sectors

KERNEL = re.compile(r"Linux version |^\[ *\d+\.\d{6}\] ")
PROMPT = re.compile(r"(?<!Last )\blogin:")
LONGEST_LINE = 4096  # bytes, of a console


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


# What Azure's server answers besides: option 245 is the WireServer, 121 the routes (RFC 3442).
ROUTER = socket.inet_aton("168.0.0.2")
ROUTES = (
    b"\0"
    + b"".join(ROUTER + b"\x20" + socket.inet_aton(address) for address in (WIRESERVER, IMDS))
    + ROUTER
)
AZURE_OPTIONS = b"\xf5\4" + socket.inet_aton(WIRESERVER) + bytes([121, len(ROUTES)]) + ROUTES


def as_azure_answers(frame: bytes) -> bytes:
    """FRAME, to the VM; an answer of QEMU's DHCP server with the options that Azure's has, too.

    They take the place of the padding, so that no length changes. UDP needs no checksum.
    """
    if frame[23:24] != b"\x11" or frame[34:36] != b"\0\x43":  # not UDP from port 67
        return frame
    options = frame[:40] + b"\0\0" + frame[42:].rstrip(b"\0")[:-1] + AZURE_OPTIONS + b"\xff"
    return options.ljust(len(frame), b"\0")


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
    format: str  # of QEMU: raw, qcow2, vhdx, vpc
    obstacle: str = ""  # why Azure does not take this VHD
    flat: Optional[Path] = None  # the file that has the disk's bytes as they are

    def read(self, start: int, size: int) -> bytes:
        """SIZE bytes of the disk, or as many as it has; both in whole sectors of 512."""
        size = min(-(-size // 512) * 512, (self.size - start) // 512 * 512)
        if size <= 0:
            return b""
        if self.flat:
            with self.flat.open("rb") as file:
                file.seek(start)
                return file.read(size)
        options = [f"file.{option}" for option in split_options(self.options)]
        part = ",".join(["driver=raw", f"offset={start}", f"size={size}", *options])
        with tempfile.NamedTemporaryFile(prefix="azure-vm-") as copy:
            words = ("--force-share", "--image-opts", "-O", "raw", part, copy.name)
            run_tool("qemu-img", "convert", *words)
            return Path(copy.name).read_bytes()


def inspect(path: Path) -> Image:
    """What the file at PATH is; raises VMError if it is not a disk, or not one file.

    QEMU is told the format, as it would open whatever files an image of its own choice names.
    """
    head, footer, size = read_ends(path)
    obstacle, options, kind = "", "", 0
    if footer.startswith(b"conectix"):
        # QEMU would go by the geometry, which is smaller; Azure goes by the size that is stated.
        driver, options = "vpc", "force_size_calc=current_size,"
        stated, kind = struct.unpack_from(">Q4xI", footer, 48)
        if kind != FIXED_VHD:
            obstacle = "its size is dynamic, not fixed"
        elif stated % MIB or stated != size - len(footer):
            obstacle = f"it has {size - len(footer):,} bytes, its footer says {stated:,}: Azure "
            obstacle += "wants both to be the same, and whole MiB"
    elif head.startswith(b"QFI\xfb"):
        driver = "qcow2"
        version, backing, features = struct.unpack_from(">IQ56xQ", head, 4)
        if backing or (version > 2 and features & EXTERNAL_DATA):
            command = "qemu-img convert -O qcow2 IMAGE FLAT"
            raise VMError(f"{path}: it has its data in another file: flatten it first: {command}")
    else:
        driver = "vhdx" if head.startswith(b"vhdxfile") else "raw"
    filename = str(path.resolve()).replace(",", ",,")
    options = f"driver={driver},{options}file.filename={filename}"
    words = ("--force-share", "--output=json", "--image-opts", options)
    found = json.loads(run_tool("qemu-img", "info", *words))
    flat = path if driver == "raw" or (driver == "vpc" and kind == FIXED_VHD) else None
    return Image(options, found["virtual-size"], driver, obstacle, flat)


def read_ends(path: Path) -> Tuple[bytes, bytes, int]:
    """The first and the last sector of the file at PATH, and its size."""
    if path.exists() and not path.is_file() and not path.is_block_device():
        raise VMError(f"{path}: not a disk: neither a file nor a block device")
    with path.open("rb", 0) as file:
        size = file.seek(0, os.SEEK_END)
        if size < 512:
            raise VMError(f"{path}: not a disk: it has {size} bytes")
        file.seek(size - 512)
        footer = file.read(512)
        file.seek(0)
        return file.read(512), footer, size


def efi_loaders(image: Image) -> List[str]:
    """The architectures for which a FAT partition of the disk has the loader in EFI/BOOT.

    Its short name is searched for, which only a directory has.
    """
    table, found = image.read(0, 512), set()
    if table[450] == GPT:
        first, count, size = struct.unpack_from("<QII", image.read(512, 512).ljust(512), 72)
        table = image.read(512 * first, min(count * size, 64 * 1024))
        ends = [struct.unpack_from("<QQ", entry) for entry in cut(table[32:], max(size, 128))]
        parts = [(start, end - start + 1) for start, end in ends if start]
    else:
        parts = [struct.unpack_from("<II", entry, 8) for entry in cut(table[446:510], 16)]
    for start, size in parts:
        if b"FAT" in image.read(512 * start, 512)[54:90]:
            for place in range(start, start + min(size, MAX_SEARCH), SEARCH_STEP):
                block = image.read(512 * place, 512 * min(SEARCH_STEP, start + size - place))
                found |= {loader for loader in LOADERS if LOADERS[loader] in block}
    return sorted(found)


def cut(data: bytes, size: int) -> List[bytes]:
    """The pieces of SIZE bytes of DATA, but for a last one of less than 16."""
    return [data[at : at + size] for at in range(0, len(data) - 15, size)]


def split_options(options: str) -> List[str]:
    """The single options in a list for QEMU, where a comma in a value is doubled."""
    return [option.replace("\0", ",,") for option in options.replace(",,", "\0").split(",")]


SIGNALS: List[int] = []  # that ask us to end: a handler that raised could interrupt the cleaning up


def run_tool(*command: str, timeout: float = 60) -> str:
    """The output of a command; raises VMError with its last line, or if it takes TIMEOUT s."""
    latest = time.monotonic() + timeout
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us alone
            preexec_fn=die_with_parent,
        )
    except FileNotFoundError:
        packages = "in Debian: apt install qemu-system-x86 qemu-utils, for Arm64 qemu-system-arm"
        raise VMError(f"{command[0]} is not installed ({packages})") from None
    with process:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, errors = (
                    text.decode("utf-8", "replace") for text in process.communicate(timeout=0.2)
                )
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

# What Azure's provisioning DVD has for those who do not ask IMDS, such as waagent.
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


MACHINES = {1: "pc", 2: "q35"}  # of a generation
# Units of agents have ConditionVirtualization=microsoft. systemd knows Azure by DMI, but believes
# QEMU's CPU first.
CPUS = {
    ("x86_64", "kvm"): "host,hypervisor=off",
    ("x86_64", "tcg"): "max,hypervisor=off",
    ("aarch64", "kvm"): "host",
    ("aarch64", "tcg"): "max,pauth-impdef=on",
}
DMI = (
    "type=1,manufacturer=Microsoft Corporation,product=Virtual Machine,version=Hyper-V UEFI Release"
)


class Setup(NamedTuple):
    """How this machine runs a VM."""

    generation: int = 1
    accelerator: str = "tcg"  # or "kvm"
    private: bool = True  # in a network of its own
    firmware: str = "/usr/share/OVMF/OVMF_CODE_4M.fd"  # of generation 2
    architecture: str = "x86_64"  # or "aarch64"

    def machine(self) -> List[str]:
        """The beginning of QEMU's command line."""
        arm = self.architecture == "aarch64"
        return [
            *(f"qemu-system-{self.architecture}", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-accel", self.accelerator),
            *("-machine", "virt,gic-version=max" if arm else MACHINES[self.generation]),
            *("-cpu", CPUS[self.architecture, self.accelerator]),
        ]


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
        self.setup, self.listener, self.number = setup, listener, number
        self.image = inspect(image)
        self.mac = f"00:0d:3a:00:00:{number + 1:02x}"  # one of Microsoft's
        self.names = (f"{name}_{number}", f"{name}{number:06}")  # as in a scale set

    def __enter__(self) -> "VM":
        self._directory = tempfile.TemporaryDirectory(prefix="azure-vm-")
        self.directory = Path(self._directory.name)
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", self.path("disk"), str(self.image.size))
        Path(self.path("relay.py")).write_text(RELAY)
        name = self.names[1].encode("ascii")
        Path(self.path("dvd")).write_bytes(make_dvd(b"OVF-ENV.XML;1", OVF_ENV % name))
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

    def command(self, console: int, *sockets: int) -> List[str]:
        """The command line of QEMU, which runs in the VM's directory.

        The SOCKETS are for frames that the VM sends, and for those to it before and after
        as_azure_answers().
        """
        setup = self.setup
        relay = f"{shlex.quote(sys.executable)} -I -S relay.py".replace(",", ",,")
        forward = "".join(
            f",guestfwd=tcp:{address}:{port}-cmd:{relay} {address}" for address, port in SERVICES
        )
        firmware = ["-drive", f"if=pflash,format=raw,readonly=on,file={setup.firmware}"]
        if setup.architecture == "aarch64":
            firmware = ["-bios", setup.firmware]
        backing = ",".join(f"backing.{option}" for option in split_options(self.image.options))
        disk = f"if=none,id=disk,cache=unsafe,driver=qcow2,file.filename=disk,{backing}"
        # The second VM is another size: of generation 2 those with NVMe disks only.
        slot, driver = ("0x12", "nvme,serial=1") if self.number else ("0x3", "virtio-blk-pci")
        if setup.generation == 1:
            driver = "virtio-blk-pci"
        return [
            *setup.machine(),
            *("-m", "1024", *(firmware if setup.generation == 2 else ())),
            *("-uuid", self.azure.vm_id, "-smbios", DMI),
            *("-smbios", f"type=3,asset={AZURE_CHASSIS_ASSET_TAG}"),
            *("-chardev", "stdio,id=monitor,signal=off", "-mon", "monitor,mode=control"),
            *("-chardev", f"file,id=console,path=/dev/fd/{console}", "-serial", "chardev:console"),
            *("-netdev", f"user,id=net,{NETWORK}{forward}"),
            *("-device", f"virtio-net-pci,netdev=net,mac={self.mac},romfile=,addr={slot}"),
            *(
                w
                for n, fd in zip(("sent", "old", "new"), sockets)
                for w in ("-chardev", f"socket,id={n},fd={fd}")
            ),
            *("-object", "filter-mirror,id=from,netdev=net,queue=rx,outdev=sent"),
            *("-object", "filter-redirector,id=to,netdev=net,queue=tx,outdev=old,indev=new"),
            *("-drive", f"{disk},werror=stop", "-device", f"{driver},drive=disk,bootindex=0"),
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
        self.requests: List[Request] = []  # to Azure
        self.dhcp: List[DhcpRequest] = []
        self.lines: List[str] = []  # of the console, without control characters
        self.stage = "firmware"  # then "kernel" and "system", as far as the console tells
        self.interface = ""  # the name of its NIC, if the console tells
        self.panic = ""  # the line of a kernel panic
        self.failure = ""  # of this machine, as QEMU reports it
        self.resets = 0  # by the guest itself
        self.read_bytes = 0  # of its disk
        self.active_time = time.monotonic()  # when it last did something
        self.prompt_time = 0.0  # when the console last asked for a login; 0 if it did not
        self.seconds = 0.0  # that the power was on, once it is off
        self.off = threading.Event()
        self._rest = b""  # of the console: the beginning of a line
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
                preexec_fn=self._before_qemu,
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
        """Raise VMError if this machine has failed the VM; have QEMU tell what it has read."""
        self._order("query-blockstats")
        if not self.failure and shutil.disk_usage(self.vm.path(".")).free < MIB:
            self.failure = "No space left on device"
        if self.failure:
            raise VMError(f"{self.failure}: {tempfile.gettempdir()} (TMPDIR chooses another)")
        if self._process.poll():
            errors = self._errors.read_text(encoding="utf-8", errors="replace").splitlines()
            raise VMError(errors[-1] if errors else f"QEMU: {self._process.returncode}")

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
        self.vm.listener(now, source, printable(text))
        with self._changed:
            self._changed.notify_all()

    def _read_console(self, descriptor: int) -> None:
        with open(descriptor, "rb", 0) as pipe:
            for block in iter(lambda: pipe.read(4096), b""):
                *lines, self._rest = (self._rest + block).split(b"\n")
                if len(self._rest) > LONGEST_LINE:
                    lines, self._rest = [*lines, self._rest], b""
                for line in lines:
                    self._add_line(line)
                self._look_at(printable(self._rest))

    def _add_line(self, line: bytes) -> None:
        text = printable(line.rstrip(b"\r"))
        self.lines.append(text)
        named = re.search(r" (\S+): renamed from eth0", text)
        if named or " net.ifnames=0" in text:  # the latter is the kernel's command line
            self.interface = named.group(1) if named else "eth0"
        if self.stage == "firmware" and KERNEL.search(text):
            self.stage = "kernel"
        if "Kernel panic" in text:
            self.panic = text[text.index("Kernel panic") :]
        self._look_at(text)
        self._tell("console", text)

    def _look_at(self, text: str) -> None:
        """Look for a login prompt; other lines may follow it at once."""
        prompt = PROMPT.search(text)
        if prompt and not self.prompt_time:
            self.prompt_time = time.monotonic()
        if prompt or "systemd" in text:
            self.stage = "system"

    def _read_frames(self) -> None:
        """Look for DHCP in what the VM sends."""
        for frame in frames(self._sent):
            request = parse_dhcp(frame, time.monotonic())
            if request:
                self.dhcp.append(request)
                name = request.name or "without a name"
                self._tell("DHCP", f"{request.kind} {name} ({request.client})")

    def _pass_frames(self) -> None:
        """Pass on what is sent to the VM."""
        with self._new, contextlib.suppress(OSError):  # QEMU is gone
            for frame in frames(self._old):
                frame = as_azure_answers(frame)
                self._new.sendall(struct.pack(">I", len(frame)) + frame)

    def _read_monitor(self) -> None:
        """Read QEMU's events; the stream ends with QEMU."""
        self._order("qmp_capabilities")
        for line in self._process.stdout:
            message = json.loads(line.decode("utf-8"))
            event, data = message.get("event"), message.get("data", {})
            if event == "RESET" and data.get("guest"):
                self.resets += 1
                self._tell("VM", "reset")
            elif event == "BLOCK_IO_ERROR" and data.get("operation") == "write":
                self.failure = str(data.get("reason"))
            for device in message.get("return") or ():
                if device["device"] == "disk" and device["stats"]["rd_bytes"] > self.read_bytes:
                    self.read_bytes = device["stats"]["rd_bytes"]
                    self.active_time = time.monotonic()
        self._process.wait()
        self.seconds = time.monotonic() - self.started
        self.off.set()
        self._tell("VM", "off")
