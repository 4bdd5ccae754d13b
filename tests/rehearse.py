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
import signal
import stat
import sys
import time
from pathlib import Path
from typing import IO, Any, Callable, List, Tuple

from tests.fake_azure import FakeAzure, Request, Reset, Slow, Status
from tests.vm import MIB, SIGNALS, VM, Image, Setup, VMBoot, VMError, find_setup, inspect, printable

CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}
TIMEOUTS = {"kvm": 180, "tcg": 600}  # seconds, for each boot

NAME_PREFIX = r"[A-Za-z0-9][A-Za-z0-9-]{0,56}\Z"  # six digits follow: hostname(7)
# Seconds without a word from which something is taken to be missing; systemd-networkd-wait-online,
# after which an agent may start, waits 120.
SILENCE = 150
POWER_OFF_TIMEOUT = 20  # seconds; ext4 writes its journal every 5 s
LOADED = 16 * MIB  # has been read from the disk once a kernel is loaded
CONSOLE_LINES = 6  # of trouble, and of the end, that are shown with a verdict
STRANDED = re.compile(  # it waits for its administrator
    r"Unable to mount root|Gave up waiting for root|ALERT! .* does not exist|emergency (mode|shell)"
    r"|dracut-initqueue.*timeout|Timed out waiting for device|Warning: /dev/.* does not exist"
)
TROUBLE = re.compile(
    r"FAILED|Error\b|Kernel panic|Failed to (?!access perfctr)|azure-prov\S+\[|" + STRANDED.pattern
)

# Resources of IMDS whose answer holds the computer name.
NAME_RESOURCES = ("computerName", "osProfile", "compute", "instance")

# Agents by their User-Agent or x-ms-agent-name; cloud-init calls itself WALinuxAgent in the latter.
DAEMON = "walinuxagent"  # which talks to the WireServer for as long as the VM runs
AGENT_NAMES = ("cloud-init", "afterburn", "azure-init", DAEMON, "custom-provisioning")

CLEAR = "\r\x1b[K" if os.isatty(1) else ""  # the line that shows that we are alive


def tell(*lines: str, file: int = 1) -> None:
    text = "\n".join(map(printable, lines))
    os.write(file, f"{CLEAR}{text}\n".encode("utf-8", "replace"))


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


def boot_image(options: argparse.Namespace, setup: Setup, boots: List[VMBoot]) -> None:
    """Boot two VMs, and the second one again, as long as that tells more; fill BOOTS."""
    for number in range(2):
        with VM(options.image, setup, number, options.name) as vm:
            if options.faults:
                add_faults(vm.azure)
            for title in ("first boot", "second boot")[: number + 1]:
                identity = f"MAC address {vm.mac}, name {vm.azure.computer_name}"
                tell("", f"VM {number + 1}, {title} ({identity})")
                with vm.boot() as boot:
                    boots.append(boot)
                    watch(boots, options)
                    in_vain = boot.fate or not ready_time(boot)
                    if len(boots) == 2 and not in_vain:
                        shut_down(boots, options)
                while not boot.events.empty():
                    show_event(boot, options.console, *boot.events.get())
                if in_vain:
                    return


def show_event(boot: VMBoot, console: Any, at: float, source: str, text: str) -> None:
    """Show an event; of the console only what our own script says, and a panic."""
    if source == "console":
        if console:
            console.write(text.encode("utf-8", "replace") + b"\n")
        said = re.search(r"azure-provisioning\[\d+\]: (.*)|(Kernel panic.*)", text)
        if not said:
            return
        text = said.group(1) or said.group(2)
    tell(f"{at - boot.started:7.1f} s  {source:<7}  {text:.150}")


def watch(boots: List[VMBoot], options: argparse.Namespace, latest: float = 0) -> None:
    """Show what the last boot does, or that we are alive, until it ends, LATEST or its deadline."""
    boot = boots[-1]
    while True:
        remaining = (latest or deadline(boots, options.timeout)) - time.monotonic()
        if SIGNALS:  # QEMU may have got one, too
            raise KeyboardInterrupt
        if boot.fate or boot.off.is_set() or remaining <= 0:
            break
        try:
            show_event(boot, options.console, *boot.events.get(timeout=min(remaining, 0.5)))
        except queue.Empty:
            boot.check()
            if CLEAR:
                state = "Ready" if ready_time(boot) else "DHCP" if boot.dhcp else boot.stage
                spent = time.monotonic() - boot.started
                os.write(1, f"{CLEAR}{spent:7.0f} s  {state}".encode("ascii"))
    boot.check()


def shut_down(boots: List[VMBoot], options: argparse.Namespace) -> None:
    """Turn the last VM off by its power button, as Azure does, or else by a power cut."""
    for _ in range(4):  # at first nobody may be there to notice
        boots[-1].press_power_button()
        watch(boots, options, time.monotonic() + POWER_OFF_TIMEOUT / 4)
        if boots[-1].off.is_set():
            return
    tell("           The VM ignores its power button: its power is cut.")


# What is awaited of a VM. Patience depends on the VM's own pace: emulation is ten times slower.


def reports(boot: VMBoot, state: bytes) -> List[Request]:
    """The reports of STATE, Ready or NotReady, that Azure accepted, in XML or in JSON."""
    pattern = rb'(State>|"state"\s*:\s*")\s*' + state + rb'\s*[<"]'
    health = [r for r in boot.requests if r.resource in ("health", "provisioning")]
    return [r for r in health if r.status in range(200, 300) and re.search(pattern, r.body)]


def ready_time(boot: VMBoot) -> float:
    """When Azure accepted that the VM is ready; 0 if it did not."""
    return next((report.time for report in reports(boot, b"Ready")), 0)


def named_time(boot: VMBoot) -> float:
    """When it asked DHCP with the computer name; 0 if it did not."""
    name = boot.vm.azure.computer_name.lower()
    return next((r.time for r in boot.dhcp if r.name.lower().split(".")[0] == name), 0)


def deadline(boots: List[VMBoot], timeout: float) -> float:
    """Until when the last of BOOTS is worth watching, on the clock; the third is a reboot.

    An agent may be done long before the boot is, and a VM that is still booting ignores its power
    button: hence the login prompt, and more patience if there is none.
    """
    boot, reboot = boots[-1], len(boots) == 3
    ready, named, prompt = ready_time(boot), named_time(boot), boot.prompt_time
    if not prompt and not (named if reboot else ready):
        last = boot.active_time
        patience = max(10 if stranded(boot) else SILENCE, (last - boot.started) / 2)
    else:
        done = ready or reboot  # but a daemon goes on asking
        asked = [each for each in boot.requests if not done or agent(each) != DAEMON]
        times = [event.time for events in (asked, boot.dhcp) for event in events]
        last = max([prompt, *times])
        pace = (last if reboot else ready or prompt) - boot.started
        if not boot.dhcp or not done:
            patience = max(SILENCE, pace)
        elif prompt and named and not awaits_waagent(boot):
            patience = max(8, pace / 3)
        else:
            patience = max(10, pace)
    return min(last + patience, boot.started + timeout)


def stranded(boot: VMBoot) -> bool:
    """Whether it waits for its administrator: a disk is not there, under the name it looks for."""
    return not boot.prompt_time and bool(STRANDED.search(boot.console))


def seconds(boot: VMBoot, at: float) -> str:
    return f"after {at - boot.started:.1f} s"


# The checks of a boot, or of all: each returns what it found, and a remark.

Outcome = Tuple[str, str]
PASS, FAIL, UNSURE = "ok", "FAIL", "?"
NOT_REACHED = ("-", "the rehearsal did not get that far")
VHD_HEADING = "The VHD that Azure takes:"
UNTOLD = "It could not be told whether it will provision."


def can_be_uploaded(image: Image) -> Outcome:
    if image.obstacle:
        return FAIL, f"Azure refuses this VHD: {image.obstacle}"
    if image.format == "vpc":
        return PASS, "a VHD of fixed size, in whole MiB"
    return PASS, f"once it is a VHD of fixed size, in whole MiB; now it is {image.format}"


def asks_dhcp(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    setup, first, what = boot.vm.setup, boots[0], "no DHCP request"
    here, state = boot.interface or "unknown (its console tells it if it is not `quiet`)", FAIL
    if boot.dhcp:
        on = f", on {boot.interface}" if boot.interface else ""
        return PASS, seconds(boot, boot.dhcp[0].time) + on
    if boot.stage == "firmware" and not boot.read_bytes:
        state, reason = UNSURE, "the firmware has not read the disk: is this machine too busy?"
    elif boot.stage == "firmware" and boot.read_bytes < LOADED:
        reason = f"no kernel was loaded: is it a disk of generation {3 - setup.generation}?"
    elif boot.stage == "firmware":
        reason = f"its console says nothing: set console={CONSOLES[setup.architecture]}, try again"
        state = UNSURE
    elif boot is not first:
        bound = f"VM 1's, {first.interface or 'unknown'}, by name or slot; here it is {here}"
        if first.interface == boot.interface != "":
            bound = "the PCI slot of VM 1's (by Path=, or as enp0s3)"
        reason = f"it is the interface: the configuration is bound to {bound}, and eth0 on Azure"
    else:
        reason = "there is no DHCP client, or its configuration is bound to another MAC address"
        if boot.interface == "eth0":
            reason += " or to another interface name than eth0"
        else:
            eth0 = f"its configuration may name eth0, Azure's name, which was {here} here: add "
            state, reason = UNSURE, f"{eth0}net.ifnames=0 and rehearse it again; or {reason}"
    return absent(what, reason, boot, state)


def absent(what: str, reason: str, boot: VMBoot, state: str = FAIL) -> Outcome:
    """That WHAT did not come: because the VM ended early or is not ready yet, or for REASON."""
    idle = boot.started + boot.seconds - boot.active_time
    if stranded(boot) and not boot.vm.number:  # Azure's disk has another driver and another name
        state, reason = UNSURE, "the system does not find its root file system, or another disk: "
        reason += "see its console; QEMU's disk is virtio, /dev/vda"
    elif stranded(boot) and boot.vm.setup.generation == 1:
        state, reason = FAIL, "something names a disk by /dev/vda, which is another one in VM 2, "
        reason += "and /dev/sda or /dev/sdb on Azure: name it by its UUID"
    elif stranded(boot):
        state, reason = FAIL, "it is the disk driver: VM 2 has an NVMe disk, as Azure's newer "
        reason += "sizes; the initramfs lacks nvme, or something names a disk by /dev/vda"
    elif boot.fate:
        state, reason = FAIL, boot.fate
    elif not boot.prompt_time and idle < max(30, boot.seconds / 4):
        state, reason = UNSURE, "it was still booting when the time ran out: raise --timeout"
    return state, f"{what} within {boot.seconds:.0f} s: {reason}"


def reaches_azure(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    if boot.requests:
        return PASS, seconds(boot, boot.requests[0].time)
    if not boot.dhcp:
        return NOT_REACHED
    what = "it asks DHCP but sends no request"
    reason = "its unit is not enabled or cannot start, or a firewall blocks it: see its console, "
    return absent(what, f"{reason}or what tests.check says of its tree", boot)


def reports_ready(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    if not boot.requests:
        return NOT_REACHED
    ready, not_ready = reports(boot, b"Ready"), reports(boot, b"NotReady")
    if ready:  # waagent reports NotReady, too, when it begins; a failure is final
        not_ready = [report for report in not_ready if b"ProvisioningFailed" in report.body]
    if not_ready:
        return FAIL, f"it reported NotReady: {printable(not_ready[-1].body):.300}"
    if ready:
        times = f", {len(ready)} times" if len(ready) > 1 else ""
        return PASS, seconds(boot, ready[0].time) + times
    for request in reversed(boot.requests):
        if request.reason and not request.path.startswith("/metadata/"):
            state = UNSURE if request.status == 404 else FAIL  # Azure may have it
            return state, f"refused with status {request.status}: {request.reason}"
    return absent("no Ready", "see its console", boot)


def takes_computer_name(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    azure, name = boot.vm.azure, boot.vm.azure.computer_name
    asked = [request for request in boot.requests if request.path.startswith("/metadata/")]
    if not ready_time(boot) and not asked:
        return NOT_REACHED
    wanted = f"compute/osProfile/computerName, {name}"
    resource_names = {azure.vm_name, azure.vm_name.replace("_", "")}  # hostnamectl drops it
    taken = resource_names & {request.name for request in boot.dhcp}
    if taken:
        return FAIL, f"it took {taken.pop()}, after the name of the resource, not {wanted}"
    for request in asked:
        late = 0 < named_time(boot) < request.time  # for another purpose
        if request.resource in NAME_RESOURCES and request.status == 200 and not late:
            return PASS, f"{name}, from {request.path.split('?')[0]}"
    if named_time(boot):
        return PASS, f"{name}, from the provisioning DVD"
    paths = ", ".join(sorted({request.path.split("?")[0] for request in asked}))
    return FAIL, f"it asked IMDS for {paths or 'nothing'}, not for {wanted}"


def publishes_name(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    if named_time(boot):
        return PASS, seconds(boot, named_time(boot))
    if len(boots) < 3 or not boot.dhcp:
        return NOT_REACHED
    return FAIL, f"not before a reboot; its DHCP client sent the name {boot.dhcp[-1].name!r}"


def speaks(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    if boot.stage != "firmware":
        return PASS, f"{len(boot.lines)} lines"
    if boot.read_bytes < LOADED and not boot.requests:
        return NOT_REACHED
    console = CONSOLES[boot.vm.setup.architecture]
    needs = f"the kernel needs console={console}, and not `quiet`"
    return FAIL, f"Azure's boot diagnostics will be empty: {needs}"


def is_the_only_agent(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    if not boot.requests:
        return NOT_REACHED
    # One may begin late: the other boots count, too.
    agents = sorted(filter(None, {agent(r) for each in boots for r in each.requests}))
    # waagent provisions if it says so first; or it waits for cloud-init, or leaves it to another.
    starts = any(agent(r) == DAEMON for each in boots for r in reports(each, b"NotReady"))
    if DAEMON in agents and len(agents) == 2 and ("cloud-init" in agents or not starts):
        return PASS, f"{agents[0]}; walinuxagent leaves provisioning to it"
    if DAEMON not in agents and "cloud-init" not in agents and any(map(awaits_waagent, boots)):
        return UNSURE, "walinuxagent runs, too, and has not said yet what it will do"
    if len(agents) > 1:
        return FAIL, f"{len(agents)} agents talk to Azure: {', '.join(agents)}; leave one enabled"
    return PASS, agents[0] if agents else "it does not name itself"


def awaits_waagent(boot: VMBoot) -> bool:
    """Whether waagent runs, as its console tells, and has not sent a request yet."""
    return "INFO Daemon" in boot.console and DAEMON not in map(agent, boot.requests)


def agent(request: Request) -> str:
    """The agent that sent REQUEST, by what it calls itself or by what no other agent asks for."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    names = ("user-agent", "x-ms-agent-name", "x-ms-guest-agent-name")
    said = " ".join(headers.get(name, "") for name in names).lower()
    for name in AGENT_NAMES:
        if name in said:
            return name
    if request.resource in ("versions", "telemetrydata"):
        return DAEMON
    return printable(headers.get("x-ms-agent-name", ""))


def stays_up(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    for each in boots:
        if each.fate:
            state = UNSURE if stranded(each) and each is boots[0] else FAIL
            return state, f"{each.fate}, {seconds(each, each.active_time)}"
    return PASS, ""


def second_vm_is_the_same(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    if len(boots) < 2:
        return NOT_REACHED
    for title, check in VM_CHECKS:
        if check is speaks:  # only VM 2 is turned off by its power button, and says so
            continue
        first, second = (check(each, boots) for each in boots[:2])
        if first[0] != second[0]:
            state = UNSURE if second[0] == UNSURE else FAIL
            return state, f"{title}: {second[1]}" if second[0] != PASS else f"{title}: only VM 2"
    return PASS, ""


def is_silent_after_a_reboot(boot: VMBoot, boots: List[VMBoot]) -> Outcome:
    if len(boots) < 3:
        return NOT_REACHED
    reboot = boots[2]
    asked = [request for request in reboot.requests if agent(request) != DAEMON]
    if any(report in asked for report in reports(reboot, b"Ready")):
        return FAIL, "it reported Ready again: the unit was not disabled (a read-only root?)"
    if not reboot.dhcp:
        return absent("no DHCP request", "see its console", reboot)
    if not named_time(reboot):
        name = reboot.vm.azure.computer_name
        return FAIL, f"it asks DHCP with the name {reboot.dhcp[-1].name!r}, not {name!r}"
    if not all(request.path.startswith("/metadata/") for request in asked):
        return FAIL, "it asks the WireServer at each boot: the unit was not disabled"
    return PASS, f"but for requests to IMDS: {len(asked)}" if asked else ""


VM_CHECKS: List[Tuple[str, Callable[[VMBoot, List[VMBoot]], Outcome]]] = [
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


def verdict(image: Image, boots: List[VMBoot]) -> Tuple[int, List[str]]:
    """The exit status, and the lines that say what was found."""
    outcomes = [("can be uploaded", *can_be_uploaded(image))]
    for title, check in ALL_CHECKS:
        outcomes.append((title, *(check(boots[0], boots) if boots else NOT_REACHED)))
    lines = ["", *(f"  {state:<4}  {title:<23}  {remark}" for title, state, remark in outcomes)]
    states = [state for _, state, _ in outcomes]
    ready = bool(boots) and all(map(ready_time, boots[:2]))
    ended = [boot for boot in boots if boot.fate]
    if boots and (not ready or ended or UNSURE in states):
        lines += excerpt((ended or boots)[-1])
    if image.format != "vpc" or image.obstacle:
        lines += ["", VHD_HEADING, *(f"  {command}" for command in image.upload_commands())]
    failed, unsure = FAIL in states, UNSURE in states
    if failed and ready:
        result = "It will provision, but not correctly."
    elif failed:
        result = f"It will not provision{', or not correctly' if unsure else ''}."
    else:
        result = UNTOLD if unsure else "It will provision."
    status = 1 if failed else 3 if unsure else 0
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
    option("--emulate", action="store_true", help="do without KVM")
    option("--timeout", type=int, default=0, metavar="S", help=timeout)
    option("--faults", action="store_true", help="Azure is absent, then rejects, then recovers")
    says = "write what the VMs say there, to a new or empty file or a terminal"
    option("--console", type=Path, metavar="FILE", help=says)
    options = parser.parse_args(arguments)
    if not re.match(NAME_PREFIX, options.name):
        parser.error(f"argument --name: not the beginning of a hostname: {options.name!r}")
    if options.timeout < 0:
        parser.error("argument --timeout: less than nothing")
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
        if stop != signal.SIGHUP or signal.getsignal(stop) != signal.SIG_IGN:  # by nohup
            signal.signal(stop, lambda number, frame: SIGNALS.append(number))
    boots: List[VMBoot] = []
    try:
        if options.console:
            options.console = open_console(options.console)
        image = inspect(options.image)
        if image.read(0, 512)[510:] != b"\x55\xaa":
            reason = f"the first sector of this {image.format} has no boot signature; expected a "
            reason += "disk: raw, qcow2, vhd or vhdx"
            raise VMError(f"{options.image}: nothing to boot: {reason}")
        tell(f"{options.image}: {image.format}, {image.size / MIB:,} MiB")
        if not image.obstacle:
            setup, how = find_setup(image, options.generation, options.emulate)
            tell(how)
            options.timeout = options.timeout or TIMEOUTS[setup.accelerator]
            boot_image(options, setup, boots)
        status, lines = verdict(image, boots)
        tell(*lines)
        return status
    except KeyboardInterrupt:
        tell(*(excerpt(boots[-1]) if boots else ()), "Stopped.")
        return 128 + SIGNALS[0]
    except BrokenPipeError:  # nobody reads the output
        return 128 + signal.SIGPIPE
    except (OSError, ValueError, VMError) as error:
        reason = re.sub(r"\A\[Errno \d+\] ", "", str(error))
        with contextlib.suppress(OSError):  # it may be closed, or its disk be full
            tell(f"python3 -m tests.rehearse: error: {reason}", file=2)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
