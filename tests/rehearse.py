"""VMBoot a disk image as Azure would, against a fake Azure, and tell whether it provisions.

The image boots unchanged as two VMs, and one of them once more. It is judged from the platform's
side alone: by its DHCP requests, its HTTP requests and its serial console. So it may have any
provisioning agent. Only QEMU is needed: no privileges, no network.
"""

import argparse
import contextlib
import math
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, List, Optional, Tuple

from tests.fake_azure import FakeAzure, Request, Reset, Status
from tests.vm import (
    CPU,
    VM,
    Setup,
    VMBoot,
    VMError,
    has_private_network,
    inspect,
    printable,
    run_tool,
)

# The code of EFI firmware without Secure VMBoot; it keeps its variables in memory.
FIRMWARE = (
    "/usr/share/OVMF/OVMF_CODE_4M.fd",  # Debian, Ubuntu
    "/usr/share/OVMF/OVMF_CODE.fd",  # Debian 11, Ubuntu 20.04
    "/usr/share/edk2/ovmf/OVMF_CODE.fd",  # Fedora, RHEL
    "/usr/share/edk2/x64/OVMF_CODE.4m.fd",  # Arch
    "/usr/share/qemu/ovmf-x86_64-code.bin",  # openSUSE
    "/usr/share/edk2-ovmf/OVMF_CODE.fd",  # Gentoo
    "/usr/share/qemu/edk2-x86_64-code.fd",  # QEMU itself, Alpine
)

# A boot sector that resets the machine: mov al, 0xfe; out 0x64, al; hlt.
RESET_SECTOR = b"\xb0\xfe\xe6\x64\xf4".ljust(510, b"\0") + b"\x55\xaa"
KVM_TIMEOUT = 3  # seconds

NAME_PREFIX = r"[A-Za-z0-9][A-Za-z0-9-]{0,56}\Z"  # six digits follow: hostname(7)
POWER_OFF_TIMEOUT = 20  # seconds; long enough for a journal of 5 s to reach the disk
CONSOLE_LINES = 6  # of trouble, and of the end, that are shown with a verdict
SYSTEM = re.compile(r"Linux version |\[ *\d+\.\d{6}\] |systemd|login:")
TROUBLE = re.compile(r"FAILED|Error\b|Kernel panic|Failed to|azure-provisioning\[")

# Resources of IMDS whose answer holds the computer name.
NAMES = ("computerName", "osProfile", "compute", "instance")

# Agents by their User-Agent or x-ms-agent-name; cloud-init calls itself WALinuxAgent in the latter.
AGENTS = ("cloud-init", "afterburn", "azure-init", "walinuxagent", "custom-provisioning")


def show(text: str) -> None:
    os.write(1, f"{text}\n".encode("utf-8", "replace"))


# How a VM can be run here.


def find_setup(generation: int) -> Tuple[Setup, str]:
    """How to run the VMs, and a line that tells it; raises VMError if it cannot be done."""
    firmware = next((path for path in FIRMWARE if os.path.exists(path)), "")
    if generation == 2 and not firmware:
        raise VMError("there is no EFI firmware (in Debian: apt install ovmf)")
    run_tool("qemu-system-x86_64", "--version")  # raises VMError if there is none
    kvm, private = runs_guest("kvm", KVM_TIMEOUT), has_private_network()
    how = "KVM" if kvm else "plain emulation, as KVM does not run a guest here"
    network = "a private network" if private else "the guest can reach this machine's network"
    return Setup(generation, "kvm" if kvm else "tcg", private, firmware), f"{how}, {network}"


def runs_guest(accelerator: str, timeout: float) -> bool:
    """Whether a guest runs, and ends within TIMEOUT s; that /dev/kvm opens would prove little."""
    with tempfile.NamedTemporaryFile(prefix="azure-vm-") as disk:
        disk.write(RESET_SECTOR)
        disk.flush()
        drive = ("-drive", f"file.filename={disk.name},format=raw")
        machine = ("-nodefaults", "-display", "none", "-no-reboot", *drive)
        with contextlib.suppress(VMError, subprocess.TimeoutExpired):
            run_tool("qemu-system-x86_64", *CPU[accelerator], *machine, timeout=timeout)
            return True
    return False


def check_bootable(path: Path) -> str:
    """What the image at PATH is, in words; raises VMError if nothing could boot it."""
    image = inspect(path)
    with tempfile.NamedTemporaryFile(prefix="azure-vm-") as sector:
        words = ("--force-share", "--image-opts", "-O", "raw", "bs=512", "count=1")
        run_tool("qemu-img", "dd", *words, f"if={image.options}", f"of={sector.name}")
        if Path(sector.name).read_bytes()[510:] != RESET_SECTOR[510:]:
            reason = f"no boot signature in its first sector ({image.format})"
            raise VMError(f"{path}: not a disk: {reason}")
    return f"{image.format}, {image.size / 2**20:,.0f} MiB"


def add_faults(azure: FakeAzure) -> None:
    """Have the platform be absent, then reject, then recover."""
    azure.script("goalstate", [*[Reset() for _ in range(8)], Status(503), Status(429)])
    azure.script("health", [Status(500), Status(503)])
    for resource in NAMES:
        azure.script(resource, [Reset(), Status(404), Status(429), Status(503)])


# The rehearsal.


class Rehearsal:
    """The boots of an image, as far as it got."""

    def __init__(
        self, options: argparse.Namespace, setup: Setup, console: IO[bytes], signals: List[int]
    ) -> None:
        self.options, self.setup, self.console, self.signals = options, setup, console, signals
        self.boots: List[VMBoot] = []  # the first boot of each VM
        self.reboot: Optional[VMBoot] = None  # the second boot of the second VM
        self.fates: Dict[VMBoot, str] = {}  # why a VM ended early
        self._events: Any = queue.Queue()  # of a time, a source and a text, from any thread

    def run(self) -> None:
        """VMBoot two VMs, and the second one again; stop when nothing more can be learned."""
        image, name = self.options.image, self.options.name
        for number in range(2):
            with VM(image, self.setup, number, name, lambda *e: self._events.put(e)) as vm:
                if self.options.faults:
                    add_faults(vm.azure)
                with self.power_on(vm, f"VM {number + 1}, first boot") as boot:
                    self.boots.append(boot)
                    self.watch(boot, second=False)
                    if ready_time(boot) and number == 1:
                        self.shut_down(boot)
                if not ready_time(boot):
                    return
                if number == 1:
                    with self.power_on(vm, "VM 2, second boot") as self.reboot:
                        self.watch(self.reboot, second=True)

    @contextlib.contextmanager
    def power_on(self, vm: VM, title: str) -> Iterator[VMBoot]:
        show(f"\n{title} (MAC address {vm.mac}, name {vm.azure.computer_name})")
        with vm.boot() as boot:
            self._started = boot.started
            yield boot
        while not self._events.empty():
            self.show_event(*self._events.get())

    def show_event(self, at: float, source: str, text: str) -> None:
        """Show an event; of the console only what our own script says, and a panic."""
        if source == "console":
            self.console.write(text.encode("utf-8", "replace") + b"\n")
            said = re.search(r"azure-provisioning\[\d+\]: (.*)|(Kernel panic.*)", text)
            if not said:
                return
            text = said.group(1) or said.group(2)
        show(f"{at - self._started:7.1f} s  {source:<7}  {text:.150}")

    def watch(self, boot: VMBoot, second: bool) -> None:
        """Watch BOOT until nothing more is to be expected of it."""
        latest = boot.started + self.options.timeout
        while not boot.off.is_set() and not boot.panic:
            if self.signals:
                raise KeyboardInterrupt
            remaining = min(deadline(boot, second), latest) - time.monotonic()
            if remaining <= 0:
                break
            with contextlib.suppress(queue.Empty):
                self.show_event(*self._events.get(timeout=min(remaining, 0.5)))
        if boot.panic:
            self.fates[boot] = boot.panic
        elif boot.off.is_set():
            boot.check()
            self.fates[boot] = f"the VM turned itself off {seconds(boot, time.monotonic())}"

    def shut_down(self, boot: VMBoot) -> None:
        """Turn the VM off by its power button, as Azure does, or else by a power cut."""
        for _ in range(4):  # at first nobody may be there to notice
            boot.press_power_button()
            if boot.wait(boot.off.is_set, POWER_OFF_TIMEOUT / 4):
                return
        show("           The VM ignores its power button: its power is cut.")


# What is awaited of a VM. Patience depends on the VM's own pace: emulation is ten times slower.


def requests(boot: VMBoot, resource: str) -> List[Request]:
    return [request for request in boot.requests if request.resource == resource]


def metadata_requests(boot: VMBoot) -> List[Request]:
    return [request for request in boot.requests if request.path.startswith("/metadata/")]


def ready_reports(boot: VMBoot) -> List[Request]:
    """The reports that the VM is ready which Azure accepted."""
    reports = requests(boot, "health")
    return [report for report in reports if report.status == 200 and b">Ready<" in report.body]


def ready_time(boot: VMBoot) -> float:
    """When Azure accepted that the VM is ready; 0 if it did not."""
    return next((report.time for report in ready_reports(boot)), 0)


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
    times = [event.time for events in (boot.requests, boot.dhcp) for event in events]
    last = max(boot.started, prompt, *times)
    if second and ready:
        return ready
    if not prompt and not (named if second else ready):
        return math.inf
    pace = (last if second else ready or prompt) - boot.started
    finished = prompt and named and (ready or second)
    return last + (max(5, pace / 4) if finished else max(10, pace))


def seconds(boot: VMBoot, at: float) -> str:
    return f"after {at - boot.started:.1f} s"


# The checks, in the order in which they are shown: each returns what it found, and a remark.

Outcome = Tuple[str, str]
PASS, FAIL, UNKNOWN = "ok", "FAIL", "?"
NOT_REACHED = (UNKNOWN, "the rehearsal did not get that far")


def asks_dhcp(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if boot.dhcp:
        return PASS, f"{seconds(boot, boot.dhcp[0].time)}, by {boot.dhcp[0].client}"
    reason = (
        "there is no DHCP client, or its configuration is bound to another MAC address or "
        "interface name (eth0 on Azure, not here)"
    )
    if not SYSTEM.search(boot.console):
        generation = 3 - rehearsal.setup.generation
        reason = f"no kernel on the console either: does it boot? try --generation {generation}"
    return absent("no DHCP request", reason, boot, rehearsal)


def absent(what: str, reason: str, boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    """The failure that WHAT did not come: because the VM ended early, or else for REASON."""
    reason = rehearsal.fates.get(boot, reason)
    return FAIL, f"{what} within {boot.seconds:.0f} s: {reason}"


def requests_goal_state(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if not boot.dhcp and not boot.requests:
        return NOT_REACHED
    asked = requests(boot, "goalstate")
    refused = [request.reason for request in asked if request.reason]
    if refused:
        return FAIL, f"refused: {refused[0]}"
    if asked:
        return PASS, seconds(boot, asked[0].time)
    reason = "its unit is not enabled or cannot start, or a firewall blocks it: see its console"
    return absent("it asks DHCP but sends no request", reason, boot, rehearsal)


def reports_ready(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if not boot.requests:
        return NOT_REACHED
    reports = requests(boot, "health")
    refused = [request for request in reports if request.reason]
    if refused:
        return FAIL, f"rejected with status {refused[0].status}: {refused[0].reason}"
    ready = ready_reports(boot)
    if len(ready) > 1:
        return FAIL, f"it reported Ready {len(ready)} times"
    if ready:
        return PASS, seconds(boot, ready[0].time)
    if reports and b">NotReady<" in reports[-1].body:
        return FAIL, f"it reported NotReady: {printable(reports[-1].body):.300}"
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
        if request.resource in NAMES and request.status == 200:
            return PASS, f"{azure.computer_name}, from {request.path.split('?')[0]}"
    paths = sorted({request.path.split("?")[0] for request in asked})
    return FAIL, f"it asked IMDS for {', '.join(paths) or 'nothing'}, not for {wanted}"


def publishes_name(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if named_time(boot):
        return PASS, seconds(boot, named_time(boot))
    if not rehearsal.reboot or not boot.dhcp:
        return NOT_REACHED
    last = boot.dhcp[-1]
    return FAIL, f"not before a reboot; its client, {last.client}, sent the name {last.name!r}"


def speaks(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if SYSTEM.search(boot.console):
        return PASS, f"{len(boot.lines)} lines"
    return FAIL, "Azure's boot diagnostics will be empty: the kernel needs console=ttyS0"


def is_the_only_agent(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if not boot.requests:
        return NOT_REACHED
    agents = sorted(filter(None, {agent(request) for request in boot.requests}))
    if len(agents) > 1:
        return FAIL, f"{len(agents)} agents talk to Azure: {', '.join(agents)}; leave one enabled"
    return PASS, agents[0] if agents else "it does not name itself"


def agent(request: Request) -> str:
    """The agent that sent REQUEST, by what it calls itself or by what no other agent asks for."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    for header in ("user-agent", "x-ms-agent-name"):
        for name in AGENTS:
            if name in headers.get(header, "").lower():
                return name
    if request.resource in ("versions", "telemetrydata"):
        return "walinuxagent"
    return printable(headers.get("x-ms-agent-name", ""))


def second_vm_is_the_same(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    if len(rehearsal.boots) < 2:
        return NOT_REACHED
    for title, check in VM_CHECKS:
        first, second = (check(each, rehearsal) for each in rehearsal.boots)
        if first[0] != second[0]:
            return FAIL, f"{title}: VM 1 {first[0]} {first[1]}; VM 2 {second[0]} {second[1]}"
    return PASS, ""


def is_silent_after_a_reboot(boot: VMBoot, rehearsal: Rehearsal) -> Outcome:
    reboot = rehearsal.reboot
    if not reboot:
        return NOT_REACHED
    if ready_time(reboot):
        return FAIL, "it reported Ready again: the unit was not disabled (a read-only root?)"
    if not reboot.dhcp:
        return absent("no DHCP request", "see its console", reboot, rehearsal)
    if not named_time(reboot):
        name = reboot.vm.azure.computer_name
        return FAIL, f"it asks DHCP with the name {reboot.dhcp[-1].name!r}, not {name!r}"
    asked = metadata_requests(reboot)
    if len(asked) < len(reboot.requests):
        return FAIL, "it asks the WireServer at each boot: the unit was not disabled"
    return PASS, f"but for requests to IMDS: {len(asked)}" if asked else ""


VM_CHECKS: List[Tuple[str, Callable[[VMBoot, Rehearsal], Outcome]]] = [
    ("asks DHCP", asks_dhcp),
    ("requests the goal state", requests_goal_state),
    ("reports Ready once", reports_ready),
    ("takes the computer name", takes_computer_name),
    ("publishes it in DHCP", publishes_name),
    ("speaks on the console", speaks),
    ("is the only agent", is_the_only_agent),
]
CHECKS = [
    *VM_CHECKS,
    ("second VM is the same", second_vm_is_the_same),
    ("silent after a reboot", is_silent_after_a_reboot),
]


def excerpt(console: str) -> List[str]:
    """The lines of a console that may tell what went wrong, and its last lines."""
    lines = [text for text in console.splitlines() if text.strip()]
    trouble = [text for text in lines[:-CONSOLE_LINES] if TROUBLE.search(text)]
    return trouble[-CONSOLE_LINES:] + lines[-CONSOLE_LINES:]


def verdict(rehearsal: Rehearsal) -> Tuple[int, List[str]]:
    """The exit status, and the lines that say what was found."""
    outcomes = [(title, *check(rehearsal.boots[0], rehearsal)) for title, check in CHECKS]
    lines = ["", *(f"  {state:<4}  {title:<23}  {remark}" for title, state, remark in outcomes)]
    last = rehearsal.boots[-1]
    if not ready_time(last) and last.console.strip():
        lines += ["", "From its console:", *(f"  | {text:.150}" for text in excerpt(last.console))]
    failed = any(state == FAIL for _, state, _ in outcomes)
    result = "It will provision, but not correctly." if failed else "It will provision."
    if not ready_time(last):
        result = "It will not provision."
    return int(failed), [line.rstrip() for line in [*lines, "", result]]


# The command line.


def parse_command_line(arguments: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python3 -m tests.rehearse",
        description=__doc__,
        epilog="Exit status: 0 it will provision; 1 it will not, or not correctly; 2 usage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("image", metavar="IMAGE", type=Path, help="a disk: raw, qcow2, vhd, vhdx and so on")
    option("--generation", type=int, choices=(1, 2), default=1, help="BIOS (1) or EFI (2); [1]")
    option("--name", default="rehearsal", help="of the scale set [rehearsal]")
    option("--timeout", type=int, default=180, metavar="S", help="for each boot [180]")
    option("--faults", action="store_true", help="Azure is absent, then rejects, then recovers")
    console = "write what the VMs say on ttyS0 there"
    option("--console", type=Path, metavar="FILE", default=Path(os.devnull), help=console)
    options = parser.parse_args(arguments)
    if not re.match(NAME_PREFIX, options.name):
        parser.error(f"argument --name: not the beginning of a hostname: {options.name!r}")
    if options.console.exists() and options.console.stat().st_size:
        parser.error("argument --console: the file is not empty, and would be overwritten")
    return options


def main(arguments: List[str]) -> int:
    """Rehearse; return the exit status."""
    options = parse_command_line(arguments)
    signals: List[int] = []  # a handler that raised could interrupt the cleaning up
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, frame: signals.append(number))
    try:
        found, (setup, how) = check_bootable(options.image), find_setup(options.generation)
        with options.console.open("wb", buffering=0) as console:
            image = printable(str(options.image))
            show(f"{image}: {found}, generation {options.generation}; {how}")
            rehearsal = Rehearsal(options, setup, console, signals)
            rehearsal.run()
        status, lines = verdict(rehearsal)
        show("\n".join(lines))
        return status
    except KeyboardInterrupt:
        show("Stopped.")
        return 128 + signals[0]
    except BrokenPipeError:  # nobody reads the output
        return 128 + signal.SIGPIPE
    except (OSError, VMError) as error:
        reason = printable(str(error))
        sys.stderr.write(f"python3 -m tests.rehearse: error: {reason}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
