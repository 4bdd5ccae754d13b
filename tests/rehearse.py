"""Boot a disk image as Azure would, against a fake Azure, and tell whether it provisions.

The image boots unchanged as two VMs, and one of them once more. It is judged from the platform's
side alone: by its DHCP requests, its HTTP requests and its serial console. So it may have any
provisioning agent. Only QEMU is needed: no privileges, no network.
"""

import argparse
import contextlib
import os
import queue
import re
import shlex
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, List, Optional, Tuple

from tests.fake_azure import FakeAzure, Request, Reset, Slow, Status
from tests.vm import (
    GPT,
    MIB,
    SIGNALS,
    VM,
    Image,
    Setup,
    VMBoot,
    VMError,
    efi_loaders,
    has_private_network,
    inspect,
    printable,
    run_tool,
)

# The code of EFI firmware without Secure Boot; it keeps its variables in memory.
FIRMWARE = {
    "x86_64": (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",  # Debian, Ubuntu
        "/usr/share/OVMF/OVMF_CODE.fd",  # Debian 11, Ubuntu 20.04
        "/usr/share/edk2/ovmf/OVMF_CODE.fd",  # Fedora, RHEL
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",  # Arch
        "/usr/share/qemu/ovmf-x86_64-code.bin",  # openSUSE
        "/usr/share/edk2-ovmf/OVMF_CODE.fd",  # Gentoo
        "/usr/share/qemu/edk2-x86_64-code.fd",  # QEMU itself, Alpine
    ),
    "aarch64": (
        "/usr/share/qemu-efi-aarch64/QEMU_EFI.fd",  # Debian, Ubuntu
        "/usr/share/edk2/aarch64/QEMU_EFI.fd",  # Fedora, RHEL
        "/usr/share/qemu/edk2-aarch64-code.fd",  # QEMU itself, Alpine
    ),
}
FIRMWARE_PACKAGE = {"x86_64": "ovmf", "aarch64": "qemu-efi-aarch64"}  # of Debian
CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}

# Programs that end at once. A boot sector: mov al, 0xfe; out 0x64, al; hlt. And code that calls
# PSCI's SYSTEM_OFF: movz w0, 8; movk w0, 0x8400, lsl 16; hvc 0.
SIGNATURE = b"\x55\xaa"
RESET_SECTOR = b"\xb0\xfe\xe6\x64\xf4".ljust(510, b"\0") + SIGNATURE
POWER_OFF_CODE = bytes.fromhex("00018052 0080b072 020000d4")
KVM_TIMEOUT = 1  # second; ten times what it takes where KVM works
TIMEOUTS = {"kvm": 180, "tcg": 600}  # seconds, for each boot

NAME_PREFIX = r"[A-Za-z0-9][A-Za-z0-9-]{0,56}\Z"  # six digits follow: hostname(7)
POWER_OFF_TIMEOUT = 20  # seconds; long enough for a journal of 5 s to reach the disk
LOADED = 16 * MIB  # has been read from the disk once a kernel is loaded
MAX_RESETS = 2  # the first boot of some images ends with one
CONSOLE_LINES = 6  # of trouble, and of the end, that are shown with a verdict
NO_ROOT = re.compile(
    r"Unable to mount root|Gave up waiting for root|ALERT! .* does not exist|emergency (mode|shell)"
    r"|dracut-initqueue.*timeout|Timed out waiting for device|Warning: /dev/.* does not exist"
)
TROUBLE = re.compile(
    rf"FAILED|Error\b|Kernel panic|Failed to|azure-provisioning\[|{NO_ROOT.pattern}"
)

# Resources of IMDS whose answer holds the computer name.
NAME_RESOURCES = ("computerName", "osProfile", "compute", "instance")

# Agents by their User-Agent or x-ms-agent-name; cloud-init calls itself WALinuxAgent in the latter.
AGENT_NAMES = ("cloud-init", "afterburn", "azure-init", "walinuxagent", "custom-provisioning")
DAEMONS = ("walinuxagent",)  # which talk to the WireServer for as long as the VM runs

TERMINAL = os.isatty(1)
CLEAR = "\r\x1b[K" if TERMINAL else ""  # the line that shows that we are alive


def tell(text: str) -> None:
    os.write(1, f"{CLEAR}{text}\n".encode("utf-8", "replace"))


# What the image is, and how its VMs can be run here.


def find_setup(image: Image, generation: int) -> Tuple[Setup, str]:
    """How to run the VMs, and a line that tells it; raises VMError if it cannot be done."""
    generation, architecture, why = choose_machine(image, generation)
    firmware = next(filter(os.path.exists, FIRMWARE[architecture]), "")
    if generation == 2 and not firmware:
        package = FIRMWARE_PACKAGE[architecture]
        raise VMError(f"there is no EFI firmware (in Debian: apt install {package})")
    run_tool(f"qemu-system-{architecture}", "--version")  # raises VMError if there is none
    setup = Setup(generation, "kvm", has_private_network(), firmware, architecture)
    how = "KVM"
    if not runs_guest(setup, KVM_TIMEOUT):
        setup, how = setup._replace(accelerator="tcg"), "emulated, as KVM does not run a guest here"
    network = "a private network" if setup.private else "the guest can reach this machine's network"
    return setup, f"generation {generation} ({why}); {how}, {network}"


def choose_machine(image: Image, generation: int) -> Tuple[int, str, str]:
    """The generation of the VM, unless it is given; the architecture; and how that is known."""
    found = efi_loaders(image)
    if found == ["aarch64"]:
        if generation == 1:
            raise VMError("Arm64 VMs are of generation 2")
        return 2, "aarch64", "it has EFI/BOOT/BOOTAA64.EFI: Arm64"
    bios = any(image.read(0, 512)[:440])
    if generation:
        return generation, "x86_64", "as you say"
    if found and bios:
        return 2, "x86_64", "Azure's default; it can boot as generation 1, too"
    if found:
        return 2, "x86_64", "it has EFI/BOOT/BOOTX64.EFI"
    if bios:
        return 1, "x86_64", "it has BIOS boot code, and no EFI/BOOT/BOOTX64.EFI"
    return 2, "x86_64", "Azure's default; it has neither EFI/BOOT/BOOTX64.EFI nor BIOS boot code"


def runs_guest(setup: Setup, timeout: float) -> bool:
    """Whether a guest runs, and ends within TIMEOUT s; that /dev/kvm opens would prove little."""
    arm = setup.architecture == "aarch64"
    with tempfile.NamedTemporaryFile(prefix="azure-vm-") as program:
        program.write(POWER_OFF_CODE if arm else RESET_SECTOR)
        program.flush()
        drive = ("-drive", f"file.filename={program.name},format=raw")
        how = ("-bios", program.name) if arm else drive
        with contextlib.suppress(VMError):
            run_tool(*setup._replace(generation=1).machine(), "-no-reboot", *how, timeout=timeout)
            return True
    return False


def amount(size: int) -> str:
    """A size, not rounded."""
    return f"{size:,} bytes" if size % MIB else f"{size // MIB:,} MiB"


def upload_commands(path: Path, image: Image) -> List[str]:
    """The commands that make of an image the VHD that Azure takes."""
    name, source = shlex.quote(printable(str(path))), f"-f {image.format} "
    if image.format == "vpc":
        name, source = shlex.quote(printable(image.options)), "--image-opts "
    commands = []
    if image.size % MIB:
        if image.format != "raw":
            commands.append(f"qemu-img convert {source}{name} -O raw disk.raw")
            name, source = "disk.raw", "-f raw "
        commands.append(f"truncate -s %1M {name}")
        if image.read(0, 512)[450] == GPT:
            commands.append(f"sfdisk --relocate gpt-bak-std {name}")
    fixed = "-O vpc -o subformat=fixed,force_size disk.vhd"
    return [*commands, f"qemu-img convert {source}{name} {fixed}"]


def add_faults(azure: FakeAzure) -> None:
    """Have the platform be absent, then slow, then reject, then recover; it stays strict."""
    resets = [Reset() for _ in range(8)]
    azure.script("goalstate", [*resets, Slow(15), Status(503), Status(429)])
    for resource in ("health", "provisioning"):
        azure.script(resource, [Status(410), Status(500), Status(503)])
    for resource in NAME_RESOURCES:
        azure.script(resource, [Reset(), Status(404), Status(410), Status(429), Status(503)])
    azure.partial, azure.rate_limit = True, 5


# The rehearsal.


class Rehearsal:
    """The boots of an image, as far as it got."""

    def __init__(
        self,
        options: argparse.Namespace,
        image: Image,
        setup: Setup = Setup(),  # noqa: B008
        console: Optional[IO[bytes]] = None,
    ) -> None:
        self.options, self.image, self.setup, self.console = options, image, setup, console
        self.boots: List[VMBoot] = []  # the first boot of each VM
        self.reboot: Optional[VMBoot] = None  # the second boot of the second VM
        self.fates: Dict[VMBoot, str] = {}  # why a VM ended early
        self._events: Any = queue.Queue()  # of a time, a source and a text, from any thread

    @property
    def last(self) -> VMBoot:
        return self.reboot or self.boots[-1]

    def run(self) -> None:
        """Boot two VMs, and the second one again; stop when nothing more can be learned."""
        image, name = self.options.image, self.options.name
        for number in range(2):
            with VM(image, self.setup, number, name, lambda *e: self._events.put(e)) as vm:
                if self.options.faults:
                    add_faults(vm.azure)
                with self.power_on(vm, f"VM {number + 1}, first boot") as boot:
                    self.boots.append(boot)
                    self.watch(boot, second=False)
                    if not ready_time(boot) or self.fates:
                        return
                    if number == 1:
                        self.shut_down(boot)
                if number == 1:
                    with self.power_on(vm, "VM 2, second boot") as self.reboot:
                        self.watch(self.reboot, second=True)

    @contextlib.contextmanager
    def power_on(self, vm: VM, title: str) -> Iterator[VMBoot]:
        tell(f"\n{title} (MAC address {vm.mac}, name {vm.azure.computer_name})")
        with vm.boot() as boot:
            self._started = boot.started
            yield boot
        while not self._events.empty():
            self.show_event(*self._events.get())

    def show_event(self, at: float, source: str, text: str) -> None:
        """Show an event; of the console only what our own script says, and a panic."""
        if source == "console":
            if self.console:
                self.console.write(text.encode("utf-8", "replace") + b"\n")
            said = re.search(r"azure-provisioning\[\d+\]: (.*)|(Kernel panic.*)", text)
            if not said:
                return
            text = said.group(1) or said.group(2)
        tell(f"{at - self._started:7.1f} s  {source:<7}  {text:.150}")

    def watch(self, boot: VMBoot, second: bool) -> None:
        """Watch BOOT until nothing more is to be expected of it."""
        latest = boot.started + self.options.timeout
        while not (boot.off.is_set() or boot.panic or boot.resets > MAX_RESETS):
            remaining = min(deadline(boot, second), latest) - time.monotonic()
            if remaining <= 0:
                break
            self.step(boot, min(remaining, 0.5))
        boot.check()
        if boot.panic:
            self.fates[boot] = boot.panic
        elif boot.off.is_set():
            self.fates[boot] = "the VM turned itself off"
        elif boot.resets > MAX_RESETS:
            self.fates[boot] = "the VM resets again and again"

    def step(self, boot: VMBoot, timeout: float) -> None:
        """Show the next event, if there is one within TIMEOUT s, or else that we are alive."""
        if SIGNALS:
            raise KeyboardInterrupt
        try:
            self.show_event(*self._events.get(timeout=timeout))
        except queue.Empty:
            boot.check()
            if TERMINAL:
                state = "Ready" if ready_time(boot) else "DHCP" if boot.dhcp else boot.stage
                spent = time.monotonic() - boot.started
                os.write(1, f"{CLEAR}{spent:7.0f} s  {state}".encode("ascii"))

    def shut_down(self, boot: VMBoot) -> None:
        """Turn the VM off by its power button, as Azure does, or else by a power cut."""
        for _ in range(4):  # at first nobody may be there to notice
            boot.press_power_button()
            until = time.monotonic() + POWER_OFF_TIMEOUT / 4
            while time.monotonic() < until:
                if boot.off.is_set():
                    return
                self.step(boot, 0.1)
        tell("           The VM ignores its power button: its power is cut.")


# What is awaited of a VM. Patience depends on the VM's own pace: emulation is ten times slower.


def metadata_requests(boot: VMBoot) -> List[Request]:
    return [request for request in boot.requests if request.path.startswith("/metadata/")]


def reports(boot: VMBoot, state: bytes) -> List[Request]:
    """The reports of STATE, Ready or NotReady, that Azure accepted, in XML or in JSON."""
    pattern = rb'(>|"state"\s*:\s*")\s*' + state + rb'\s*[<"]'
    health = [r for r in boot.requests if r.resource in ("health", "provisioning")]
    return [r for r in health if r.status in range(200, 300) and re.search(pattern, r.body)]


def ready_time(boot: VMBoot) -> float:
    """When Azure accepted that the VM is ready; 0 if it did not."""
    return next((report.time for report in reports(boot, b"Ready")), 0)


def named_time(boot: VMBoot) -> float:
    """When it asked DHCP with the computer name; 0 if it did not."""
    name = boot.vm.azure.computer_name.lower()
    return next((r.time for r in boot.dhcp if r.name.lower().split(".")[0] == name), 0)


def deadline(boot: VMBoot, second: bool) -> float:
    """Until when a VM's first or second boot is worth watching, on the clock.

    An agent may be done long before the boot is, and a VM that is still booting ignores its power
    button: hence the login prompt, and more patience if there is none.
    """
    ready, named, prompt = ready_time(boot), named_time(boot), boot.prompt_time
    done = ready or second  # but a daemon goes on asking
    asked = [request for request in boot.requests if not (done and agent(request) in DAEMONS)]
    times = [event.time for events in (asked, boot.dhcp) for event in events]
    last = max(boot.started, prompt, *times)
    if not prompt and not (named if second else ready):
        pace = boot.active_time - boot.started
        return boot.active_time + max(10 if lost(boot) else 120, pace / 2)
    pace = (last if second else ready or prompt) - boot.started
    finished = prompt and named and done
    return last + (max(8, pace / 3) if finished else max(10, pace))


def lost(boot: VMBoot) -> bool:
    """Whether it has no root file system, or another reason to wait for its administrator."""
    return not boot.prompt_time and not boot.dhcp and bool(NO_ROOT.search(boot.console))


def is_booting(boot: VMBoot) -> bool:
    """Whether it was still at work when the time ran out."""
    idle = boot.started + boot.seconds - boot.active_time
    return not boot.prompt_time and idle < max(30, boot.seconds / 4)


def is_silent(boot: VMBoot) -> bool:
    return boot.stage == "firmware"


def seconds(boot: VMBoot, at: float) -> str:
    return f"after {at - boot.started:.1f} s"


# The checks, in the order in which they are shown: each returns what it found, and a remark.

Outcome = Tuple[str, str]
PASS, FAIL, UNSURE = "ok", "FAIL", "?"
NOT_REACHED = ("-", "the rehearsal did not get that far")
VHD_HEADING = "The VHD that Azure takes:"
UNTOLD = "It could not be told whether it will provision."


def can_be_uploaded(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    image = rehearsal.image
    if image.obstacle:
        return FAIL, f"Azure refuses this VHD: {image.obstacle}"
    if image.format == "vpc":
        return PASS, "a VHD of fixed size, in whole MiB"
    size = f" of {amount(image.size)}, not whole MiB" if image.size % MIB else ""
    return PASS, f"once it is a VHD; now it is {image.format}{size}"


def asks_dhcp(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    setup, first = rehearsal.setup, rehearsal.boots[0]
    here = boot.interface or "unknown (its console does not tell it)"
    if boot.dhcp:
        remark = f", on {boot.interface}" if boot.interface else ""
        return PASS, f"{seconds(boot, boot.dhcp[0].time)}, by {boot.dhcp[0].client}{remark}"
    what = "no DHCP request"
    if lost(boot):
        reason = "the system does not find its root file system: see its console"
        if boot is not first and setup.generation == 2:
            reason = (
                "it is the disk driver: this VM's disk is NVMe, as on Azure's newer sizes; the "
                "initramfs lacks the driver nvme, or something names a disk by /dev/vda or the like"
            )
        return FAIL, f"{what} within {boot.seconds:.0f} s: {reason}"
    if is_silent(boot):
        if boot.read_bytes < LOADED:
            other = 3 - setup.generation
            reason = f"no kernel was loaded: is it a disk of generation {other}?"
            return absent(what, reason, boot, rehearsal)
        reason = f"its console says nothing: set console={CONSOLES[setup.architecture]}, try again"
        return absent(what, reason, boot, rehearsal, UNSURE)
    if boot is not first:
        reason = (
            "it is the interface name: the network configuration is bound to "
            f"{first.interface or 'it'}, as it was in VM 1. The interface is {here} here, and eth0 "
            "on Azure"
        )
        return absent(what, reason, boot, rehearsal)
    unbound = "there is no DHCP client, or its configuration is bound to another MAC address"
    if boot.interface == "eth0":
        reason = f"{unbound} or to another interface name than eth0"
        return absent(what, reason, boot, rehearsal)
    reason = (
        f"its configuration may name eth0, which is Azure's name and was {here} here: "
        f"add net.ifnames=0 and rehearse it again; or {unbound}"
    )
    return absent(what, reason, boot, rehearsal, UNSURE)


def absent(
    what: str, reason: str, boot: VMBoot, rehearsal: Rehearsal, state: str = FAIL
) -> Outcome:
    """That WHAT did not come: because the VM ended early or is not ready yet, or for REASON."""
    if boot in rehearsal.fates:
        state, reason = FAIL, rehearsal.fates[boot]
    elif is_booting(boot):
        state, reason = UNSURE, "it was still booting when the time ran out: raise --timeout"
    return state, f"{what} within {boot.seconds:.0f} s: {reason}"


def reaches_azure(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if boot.requests:
        return PASS, seconds(boot, boot.requests[0].time)
    if not boot.dhcp:
        return NOT_REACHED
    what = "it asks DHCP but sends no request"
    reason = "its unit is not enabled or cannot start, or a firewall blocks it: see its console"
    return absent(what, reason, boot, rehearsal)


def reports_ready(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if not boot.requests:
        return NOT_REACHED
    ready, not_ready = reports(boot, b"Ready"), reports(boot, b"NotReady")
    if ready:
        times = f", {len(ready)} times" if len(ready) > 1 else ""
        return PASS, seconds(boot, ready[0].time) + times
    if not_ready:
        return FAIL, f"it reported NotReady: {printable(not_ready[-1].body):.300}"
    for request in reversed(boot.requests):
        if request.reason and not request.path.startswith("/metadata/"):
            state = UNSURE if request.status == 404 else FAIL  # Azure may have it
            return state, f"refused with status {request.status}: {request.reason}"
    return absent("no Ready", "see its console", boot, rehearsal)


def takes_computer_name(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    azure, asked = boot.vm.azure, metadata_requests(boot)
    if not ready_time(boot) and not asked:
        return NOT_REACHED
    wanted = f"compute/osProfile/computerName, {azure.computer_name}"
    resource_names = {azure.vm_name, azure.vm_name.replace("_", "")}  # hostnamectl drops it
    taken = resource_names & {request.name for request in boot.dhcp}
    if taken:
        return FAIL, f"it took {taken.pop()}, after the name of the resource, not {wanted}"
    for request in asked:
        late = 0 < named_time(boot) < request.time  # for another purpose
        if request.resource in NAME_RESOURCES and request.status == 200 and not late:
            return PASS, f"{azure.computer_name}, from {printable(request.path.split('?')[0])}"
    if named_time(boot):
        return PASS, f"{azure.computer_name}, from the provisioning DVD"
    paths = sorted({printable(request.path.split("?")[0]) for request in asked})
    return FAIL, f"it asked IMDS for {', '.join(paths) or 'nothing'}, not for {wanted}"


def publishes_name(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if named_time(boot):
        return PASS, seconds(boot, named_time(boot))
    if not rehearsal.reboot or not boot.dhcp:
        return NOT_REACHED
    last = boot.dhcp[-1]
    return FAIL, f"not before a reboot; its client, {last.client}, sent the name {last.name!r}"


def speaks(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if not is_silent(boot):
        return PASS, f"{len(boot.lines)} lines"
    if boot.read_bytes < LOADED and not boot.requests:
        return NOT_REACHED
    console = CONSOLES[rehearsal.setup.architecture]
    return FAIL, f"Azure's boot diagnostics will be empty: the kernel needs console={console}"


def is_the_only_agent(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if not boot.requests:
        return NOT_REACHED
    agents = sorted(filter(None, {agent(request) for request in boot.requests}))
    if agents == ["cloud-init", "walinuxagent"]:
        return PASS, "cloud-init, and walinuxagent, which leaves provisioning to it"
    if len(agents) > 1:
        return FAIL, f"{len(agents)} agents talk to Azure: {', '.join(agents)}; leave one enabled"
    return PASS, agents[0] if agents else "it does not name itself"


def agent(request: Request) -> str:
    """The agent that sent REQUEST, by what it calls itself or by what no other agent asks for."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    for header in ("user-agent", "x-ms-agent-name", "x-ms-guest-agent-name"):
        for name in AGENT_NAMES:
            if name in headers.get(header, "").lower():
                return name
    if request.resource in ("versions", "telemetrydata"):
        return "walinuxagent"
    return printable(headers.get("x-ms-agent-name", ""))


def stays_up(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    for fate in rehearsal.fates.values():
        return FAIL, f"{fate}, {seconds(rehearsal.last, rehearsal.last.active_time)}"
    return PASS, ""


def second_vm_is_the_same(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if len(rehearsal.boots) < 2:
        return NOT_REACHED
    for title, check in VM_CHECKS:
        first, second = (check(each, rehearsal) for each in rehearsal.boots)
        if first[0] != second[0]:
            state = UNSURE if second[0] == UNSURE else FAIL
            return state, f"{title}: {second[1]}" if second[0] != PASS else f"{title}: only VM 2"
    return PASS, ""


def is_silent_after_a_reboot(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    reboot = rehearsal.reboot
    if not reboot:
        return NOT_REACHED
    asked = [request for request in reboot.requests if agent(request) not in DAEMONS]
    if any(report in asked for report in reports(reboot, b"Ready")):
        return FAIL, "it reported Ready again: the unit was not disabled (a read-only root?)"
    if not reboot.dhcp:
        return absent("no DHCP request", "see its console", reboot, rehearsal)
    if not named_time(reboot):
        name = reboot.vm.azure.computer_name
        return FAIL, f"it asks DHCP with the name {reboot.dhcp[-1].name!r}, not {name!r}"
    metadata = [request for request in asked if request in metadata_requests(reboot)]
    if len(metadata) < len(asked):
        return FAIL, "it asks the WireServer at each boot: the unit was not disabled"
    return PASS, f"but for requests to IMDS: {len(asked)}" if asked else ""


VM_CHECKS: List[Tuple[str, Callable[[VMBoot, Rehearsal], Outcome]]] = [
    ("asks DHCP", asks_dhcp),
    ("reaches Azure", reaches_azure),
    ("reports Ready", reports_ready),
    ("takes the computer name", takes_computer_name),
    ("publishes it in DHCP", publishes_name),
    ("speaks on the console", speaks),
    ("is the only agent", is_the_only_agent),
]
ALL_CHECKS = [
    *VM_CHECKS,
    ("stays up", stays_up),
    ("second VM is the same", second_vm_is_the_same),
    ("silent after a reboot", is_silent_after_a_reboot),
]


def excerpt(boot: VMBoot) -> List[str]:
    """The lines of a console that may tell what went wrong, and its last lines."""
    lines = [text for text in boot.console.splitlines() if text.strip()]
    trouble = [text for text in lines[:-CONSOLE_LINES] if TROUBLE.search(text)]
    shown = [f"  | {text:.150}" for text in trouble[-CONSOLE_LINES:] + lines[-CONSOLE_LINES:]]
    return ["", "From its console:", *shown] if shown else []


def verdict(rehearsal: Rehearsal) -> Tuple[int, List[str]]:
    """The exit status, and the lines that say what was found."""
    boots = rehearsal.boots
    first: Any = boots[0] if boots else None
    outcomes = [("can be uploaded", *can_be_uploaded(first, rehearsal))]
    for title, check in ALL_CHECKS:
        outcomes.append((title, *(check(first, rehearsal) if boots else NOT_REACHED)))
    lines = ["", *(f"  {state:<4}  {title:<23}  {remark}" for title, state, remark in outcomes)]
    states = [state for _, state, _ in outcomes]
    ready = bool(boots) and bool(ready_time(boots[-1]))
    if boots and (not ready or rehearsal.fates or UNSURE in states):
        lines += excerpt(rehearsal.last)
    if rehearsal.image.format != "vpc" or rehearsal.image.obstacle:
        commands = upload_commands(rehearsal.options.image, rehearsal.image)
        lines += ["", VHD_HEADING, *(f"  {command}" for command in commands)]
    if FAIL in states:
        unsure = ", or not correctly" if UNSURE in states else ""
        result = f"It will not provision{unsure}."
        if ready:
            result = "It will provision, but not correctly."
    elif UNSURE in states:
        result = UNTOLD
    else:
        result = "It will provision."
    status = 1 if FAIL in states else 3 if UNSURE in states else 0
    return status, [line.rstrip() for line in [*lines, "", result]]


# The command line.


def parse_command_line(arguments: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python3 -m tests.rehearse",
        description=__doc__,
        epilog="Exit status: 0 it will provision; 1 it will not, or not correctly; 2 usage, or "
        "this machine cannot rehearse it; 3 it could not be told.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("image", metavar="IMAGE", type=Path, help="a disk: raw, qcow2, vhd or vhdx")
    generation = "BIOS (1) or EFI (2) [what the disk has]"
    option("--generation", type=int, choices=(1, 2), default=0, help=generation)
    option("--name", default="rehearsal", help="of the scale set [rehearsal]")
    timeout = "for each boot [{kvm}; emulated {tcg}]".format(**TIMEOUTS)
    option("--timeout", type=int, default=0, metavar="S", help=timeout)
    option("--faults", action="store_true", help="Azure is absent, then rejects, then recovers")
    option("--console", type=Path, metavar="FILE", help="write what the VMs say there")
    options = parser.parse_args(arguments)
    if not re.match(NAME_PREFIX, options.name):
        parser.error(f"argument --name: not the beginning of a hostname: {options.name!r}")
    return options


def open_console(path: Path) -> IO[bytes]:
    """A new or empty file, or a terminal; raises VMError if PATH is anything else."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO is an error
    descriptor = os.open(str(path), flags, 0o666)
    state = os.fstat(descriptor)
    if not os.isatty(descriptor) and (state.st_size or not stat.S_ISREG(state.st_mode)):
        raise VMError(f"--console: {path}: neither an empty file nor a terminal")
    os.set_blocking(descriptor, True)
    return open(descriptor, "wb", buffering=0)


def main(arguments: List[str]) -> int:
    """Rehearse; return the exit status."""
    options = parse_command_line(arguments)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, frame: SIGNALS.append(number))
    rehearsal = None
    try:
        console = open_console(options.console) if options.console else None
        image = inspect(options.image)
        if image.read(0, 512)[510:] != SIGNATURE:
            reason = f"its first sector has no boot signature ({image.format})"
            raise VMError(f"{options.image}: nothing to boot: {reason}")
        what = f"{printable(str(options.image))}: {image.format}, {amount(image.size)}"
        rehearsal = Rehearsal(options, image, console=console)
        if image.obstacle:
            tell(what)
        else:
            rehearsal.setup, how = find_setup(image, options.generation)
            options.timeout = options.timeout or TIMEOUTS[rehearsal.setup.accelerator]
            tell(f"{what}, {how}")
            rehearsal.run()
        status, lines = verdict(rehearsal)
        tell("\n".join(lines))
        return status
    except KeyboardInterrupt:
        if rehearsal and rehearsal.boots:
            tell("\n".join(excerpt(rehearsal.last)))
        tell("Stopped.")
        return 128 + SIGNALS[0]
    except BrokenPipeError:  # nobody reads the output
        return 128 + signal.SIGPIPE
    except (OSError, VMError) as error:
        reason = printable(str(error)).partition("] ")[2] if isinstance(error, OSError) else ""
        reason = reason or printable(str(error))
        sys.stderr.write(f"{CLEAR}python3 -m tests.rehearse: error: {reason}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
