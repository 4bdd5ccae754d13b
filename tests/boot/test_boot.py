"""First boots, good and bad: the journal, the requests and the machine's state after each."""

import time
from typing import List

from azure_provision import UNIT
from tests.boot.machine import Boot, BootTest
from tests.fake_azure import Answer, Raw, Silence, Status

STEPS = [
    r"<6>ContainerId: [0-9a-f-]{36}",
    r"<6>InstanceId: [0-9a-f-]{36}\.MachineRole_IN_0",
    r"<6>Health report: <Health>.*<State>Ready</State>.*</Health>",
    r"<6>Response: 200 OK",
    r"<6>Hostname: web-prod-01 \(computerName\)",
    r"<6>Hostname set by hostnamectl",
    r"<5>Hostname not published: there is no default route; reboot, or restart the DHCP client",
    r"<6>azure-provisioning\.service disabled",
    r"<6>Provisioned as web-prod-01 in \d\.\d\d s",
]


class ProvisionedTest(BootTest):
    """Boots that provision."""

    def assert_provisioned(self, boot: Boot, name: str = "web-prod-01") -> None:
        self.assertEqual(boot.unit["Result"], "success", boot)
        self.assertEqual(boot.unit["ActiveState"], "active", boot)
        self.assertEqual(boot.hostname, name, boot)
        self.assertTrue(self.azure.ready.is_set())
        self.assertRegex(boot.lines[-1], f"^<6>Provisioned as {name} in ")

    def note(self, boot: Boot) -> None:
        started = boot.seconds("ExecMainStart")
        self.figure(
            f"Ready {1000 * (self.ready_time() - started):.0f} ms and the unit's end "
            f"{1000 * (boot.seconds('ActiveEnter') - started):.0f} ms after its start, "
            f"{len(self.azure.requests)} requests, {len(boot.lines)} lines"
        )

    def test_first_boot_provisions_and_the_second_does_nothing(self) -> None:
        self.network.add_platform()
        self.azure.incarnation = "3"
        machine = self.machine()
        boot = machine.boot(self.network)
        self.assert_provisioned(boot)
        self.assertEqual((boot.etc_hostname, boot.enabled), ("web-prod-01", "disabled"))
        self.assertEqual(self.resources(), ["goalstate", "health", "compute"])
        self.assertIn(b"<GoalStateIncarnation>3<", self.azure.asked("health")[0].body)
        self.assertEqual(len(boot.lines), len(STEPS), boot)
        for step, line in zip(STEPS, boot.lines):
            self.assertRegex(line, f"^{step}$")
        self.assertIn("Provisioned as web-prod-01", boot.console)
        self.note(boot)

        again = machine.boot(self.network)
        self.assertEqual(len(self.azure.requests), 3)
        self.assertEqual((again.hostname, again.enabled), ("web-prod-01", "disabled"))
        self.assertEqual((again.lines, again.unit["ActiveState"]), ([], "inactive"))

    def late_network(self, wait: float) -> None:
        """Add the platform's addresses WAIT seconds after the script first missed them."""
        machine = self.machine()
        with machine.start(self.network) as console:
            console.wait_for("Network is unreachable; retrying")
            time.sleep(wait)
            self.network.add_platform()
            there = time.monotonic()
            boot = console.finish()
        self.assert_provisioned(boot)
        waited = there - boot.seconds("ExecMainStart")
        lag = self.ready_time() - there
        self.figure(f"the network came after {waited:.2f} s, Ready {lag:.2f} s later")
        self.assertLess(lag, waited / 4 + 0.5)
        self.assertEqual(sum("retrying" in line for line in boot.lines), 1, boot)

    def test_network_that_comes_1_s_late(self) -> None:
        self.late_network(1)

    def test_network_that_comes_4_s_late(self) -> None:
        self.late_network(4)

    def test_platform_that_refuses_then_fails_then_recovers(self) -> None:
        self.azure.__exit__()
        self.network.add_platform()
        elsewhere = ("127.0.0.2", 0)
        flaws: List[Answer] = [Status(500), Status(429), Status(410), Raw(b"\x00garbage\r\n")]
        machine = self.machine()
        with machine.start(self.network) as console:
            console.wait_for("comp=goalstate: Connection refused; retrying")
            with self.network.azure(imds=elsewhere) as self.azure:
                self.azure.script("goalstate", flaws)
                self.azure.script("health", flaws)
                console.wait_for("2021-02-01: Connection refused; retrying")
                with self.network.azure(wireserver=elsewhere) as metadata:
                    metadata.script("compute", flaws)
                    boot = console.finish()
        self.assert_provisioned(boot)
        self.assertEqual(boot.enabled, "disabled")
        self.assertEqual(self.resources(), ["goalstate"] * 4 + ["goalstate", "health"] * 5, boot)
        self.assertEqual(len(metadata.requests), 5)
        self.assertEqual(sum("retrying" in line for line in boot.lines), 14, boot)
        self.azure.requests += metadata.requests
        self.note(boot)

    def assert_set_without_hostnamectl(self, boot: Boot) -> None:
        self.assert_provisioned(boot)
        self.assertEqual(sum("setting the hostname without" in line for line in boot.lines), 1)
        self.note(boot)

    def test_image_without_dbus(self) -> None:
        self.network.add_platform()
        boot = self.machine("no-dbus").boot(self.network)
        self.assert_set_without_hostnamectl(boot)
        self.assertEqual((boot.etc_hostname, boot.enabled), ("web-prod-01", "disabled"), boot)

    def assert_runs_again(self, boot: Boot) -> None:
        """What cannot be stored costs one warning, and is done again at the next boot."""
        self.assert_set_without_hostnamectl(boot)
        self.assertEqual((boot.etc_hostname, boot.enabled), ("golden-image", "enabled"), boot)
        warnings = [line for line in boot.lines if line.startswith("<4>")]
        self.assertEqual(len(warnings), 1, boot)
        self.assertRegex(warnings[0], "/etc/hostname: Read-only file system; .* stays enabled")

    def read_only(self, variant: str) -> None:
        self.network.add_platform()
        machine = self.machine(variant)
        machine.options.append("--read-only")
        self.assert_runs_again(machine.boot(self.network))

    def test_read_only_root(self) -> None:
        self.read_only("plain")

    def test_read_only_root_without_dbus(self) -> None:
        self.read_only("no-dbus")

    def test_hostname_file_that_is_mounted_read_only(self) -> None:
        self.network.add_platform()
        machine = self.machine()
        file = machine.directory / "hostname"
        file.write_text("golden-image\n")
        machine.options.append(f"--bind-ro={file}:/etc/hostname")
        for _ in range(2):
            self.assert_runs_again(machine.boot(self.network))

    def test_scale_set_vm_gets_its_computer_name(self) -> None:
        self.network.add_platform()
        self.azure.vm_name, self.azure.computer_name = "myset_0", "myset000000"
        boot = self.machine().boot(self.network)
        self.assert_provisioned(boot, "myset000000")
        self.assertEqual(boot.etc_hostname, "myset000000")
        self.note(boot)

    def test_imds_that_knows_only_the_vm_name(self) -> None:
        self.network.add_platform()
        self.azure.newest_version = "2019-06-01"
        boot = self.machine().boot(self.network)
        self.assert_provisioned(boot, "web-prod-01-vm")
        self.note(boot)

    def test_bad_name_changes_nothing_and_the_next_boot_mends_it(self) -> None:
        self.network.add_platform()
        self.azure.computer_name = "myset_0"
        machine = self.machine()
        boot = machine.boot(self.network)
        self.assertTrue(self.azure.ready.is_set())
        self.assertEqual((boot.hostname, boot.etc_hostname), ("golden-image", "golden-image"), boot)
        self.assertEqual((boot.unit["Result"], boot.unit["ActiveState"]), ("exit-code", "failed"))
        self.assertEqual((boot.unit["ExecMainStatus"], boot.enabled), ("1", "enabled"))
        self.assertRegex(
            boot.lines[-1], "^<3>Not provisioned: .*not a valid hostname: myset_0; the"
        )
        self.assertEqual(len(self.azure.requests), 3)

        self.azure.computer_name = "myset000000"
        mended = machine.boot(self.network)
        self.assert_provisioned(mended, "myset000000")
        self.assertEqual(mended.enabled, "disabled")

    def test_power_lost_between_ready_and_the_hostname(self) -> None:
        self.network.add_platform()
        self.azure.script("compute", [Silence()])
        machine = self.machine()
        with machine.start(self.network):
            self.azure.wait_for("compute")
        asked = len(self.azure.requests)
        self.assertTrue(self.azure.ready.is_set())
        self.assertEqual((machine.root / "etc/hostname").read_text(), "golden-image\n")

        self.azure.ready.clear()
        boot = machine.boot(self.network)
        self.assert_provisioned(boot)
        self.assertEqual(self.resources()[asked:], ["goalstate", "health", "compute"])
        self.assertEqual((boot.etc_hostname, boot.enabled), ("web-prod-01", "disabled"), boot)
        self.note(boot)


class OtherPlatformTest(BootTest):
    def test_another_platform_boots_at_once_and_nothing_is_sent(self) -> None:
        self.network.add_platform()
        machine = self.machine()
        machine.asset_tag("Amazon EC2")
        boot = machine.boot(self.network)
        self.assertEqual(
            boot.lines, ['<5>Not on Azure (the chassis asset tag is "Amazon EC2"): nothing to do']
        )
        self.assertEqual((boot.unit["Result"], boot.enabled), ("success", "enabled"))
        self.assertEqual((boot.hostname, self.azure.requests), ("golden-image", []))
        seconds = boot.seconds("ActiveEnter") - boot.seconds("ExecMainStart")
        self.figure(f"the unit took {1000 * seconds:.0f} ms")
        self.assertLess(seconds, 1)


# Tells where the unit can write, and what it can reach.
PROBE = """\
for directory in / /* /run/* /run/systemd/system /sys/fs/cgroup /usr/local /var/*; do
    [ ! -d "$directory" ] || ! (: >"$directory/.probe") 2>/dev/null || echo "writable: $directory"
done
for address in 168.63.129.16 169.254.169.254 10.0.0.1; do
    (echo >"/dev/udp/$address/9") 2>/dev/null && echo "reachable: $address"
done
(echo >/proc/sys/kernel/ostype) 2>/dev/null && echo "writable: /proc/sys"
true
"""


class SandboxTest(BootTest):
    def test_sandbox_leaves_little_to_write_and_only_the_platform_to_reach(self) -> None:
        self.network.add_platform()
        self.network.ip("address", "add", "10.0.0.1/32", "dev", "lo")
        machine = self.machine()
        machine.write("usr/local/probe", PROBE)
        probe = "[Service]\nExecStart=\nExecStart=/bin/bash /usr/local/probe\n"
        machine.write(f"etc/systemd/system/{UNIT}.d/probe.conf", probe)
        # What systemd needs for its IP filter, and a container lacks.
        machine.options += ["--system-call-filter=bpf", "--capability=all"]
        boot = machine.boot(self.network)
        self.assertEqual(
            [entry["MESSAGE"] for entry in boot.entries],
            [
                *("writable: /etc", "writable: /tmp", "writable: /run/shm", "writable: /var/tmp"),
                *("reachable: 168.63.129.16", "reachable: 169.254.169.254"),
            ],
            boot,
        )
