"""Watch a first boot against a fake Azure, on any machine, as any user: `python3 -m tests.demo`.

The real script runs twice, in a dry run and then for real, with stand-ins for the system's tools.
It changes nothing on this machine.
"""

import os
import sys
import threading

from tests.fake_azure import FakeAzure, Status, describe
from tests.plain.harness import StandIns, start_script

lock = threading.Lock()


def show_line(who: str, line: str) -> None:
    with lock:
        print(f"  {who:<8} | {line}", flush=True)


def run(title: str, azure: FakeAzure, machine: StandIns, *options: str) -> int:
    """Run the script and show what it says beside what Azure hears; return its exit status."""
    print(f"\n{title}\n", flush=True)
    endpoints = ("--wireserver", azure.wireserver, "--imds", azure.imds)
    with start_script(machine, *endpoints, *options) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                show_line("script", line.rstrip("\n"))
            sys.stderr.write(process.stderr.read())
        finally:
            process.kill()  # if it has not ended: whoever watched has gone
    return process.returncode


def demo(machine: StandIns) -> int:
    with FakeAzure() as azure:
        azure.on_request = lambda request: show_line("Azure", describe(request))
        azure.vm_name, azure.computer_name = "myset_0", "myset000000"
        statuses = [run("A dry run: nothing is posted.", azure, machine, "--dry-run")]
        azure.script("goalstate", [Status(503), Status(503)])
        title = "A first boot, of a VM in a scale set, while the WireServer is not quite there."
        statuses.append(run(title, azure, machine))
        ready = azure.ready.is_set()
    print("\nWhat the script called, stand-ins all of them:\n")
    for call in machine.calls:
        print(f"  {call}")
    print("\nNo DHCP client was asked for a new lease, as there is no route to Azure here.")
    print(f"Ready has {'arrived' if ready else 'NOT arrived'}; exit statuses: {statuses}.")
    return 0 if ready and statuses == [0, 0] else 1


if __name__ == "__main__":
    machine = StandIns(hostnamectl="", systemctl="")
    try:
        status = demo(machine)
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still flushes at its end
        status = 1
    finally:
        machine.remove()
    sys.exit(status)
