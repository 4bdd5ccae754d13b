"""First boots, good and bad: the journal, the requests and the machine's state after each."""

from pathlib import Path
from typing import List

from azure_provision import IMDS, UNIT, WIRESERVER
from tests.boot.container import BootTest, add_service, write
from tests.fake_azure import Answer, Raw, Silence, Status

STEPS = [
    r"<6>Health report: <Health>.*<State>Ready</State>.*</Health>",
    r"<6>Response: 200 OK",
    r"<6>Hostname: web-prod-01 \(computerName\)",
    r"<6>Hostname set by hostnamectl",
    r"<5>DHCP request not sent again: no route to 168\.63\.129\.16; .*",
    r"<6>azure-provisioning\.service disabled",
    r"<6>Provisioned as web-prod-01 in \d\.\d\d s",
]

LOOPBACK_ADDRESS = "127.0.0.1"
ELSEWHERE = "168.0.0.2"  # in QEMU's network, the machine that runs it
# Runs instead of the script: tells where the unit can write, and what it can reach.
SANDBOX_PROBE = f"""\
for directory in / /* /run/* /run/systemd/system /sys/fs/cgroup /usr/local /var/*; do
    [ ! -d "$directory" ] || ! (: >"$directory/.probe") 2>/dev/null || echo "writable: $directory"
done
for address in {WIRESERVER} {IMDS} {LOOPBACK_ADDRESS} {ELSEWHERE}; do
    (echo >"/dev/udp/$address/9") 2>/dev/null && echo "reachable: $address"
done
(echo >/proc/sys/kernel/ostype) 2>/dev/null && echo "writable: /proc/sys"
true
"""
RUN_PROBE = """\
[Unit]
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=
ExecStart=/bin/bash /usr/local/probe
"""
SANDBOX_ALLOWS = [
    *("writable: /etc", "writable: /run/shm"),
    *(f"reachable: {address}" for address in (WIRESERVER, IMDS, LOOPBACK_ADDRESS)),
]


# What systemd needs for its IP filter, and a container lacks.
IP_FILTER = ["--system-call-filter=bpf", "--capability=all"]

ISOLATE = """\
systemctl isolate rescue.target
echo back from rescue.target
systemctl --no-block isolate multi-user.target
"""


def add_probe(root: Path) -> None:
    write(root, "usr/local/probe", SANDBOX_PROBE)
    write(root, f"etc/systemd/system/{UNIT}.d/probe.conf", RUN_PROBE)


class ContainerBootTest(BootTest):
    """The platform's addresses are there from the start, without DHCP."""

    def setUp(self) -> None:
        super().setUp()
        self.network.add_platform()

    def test_first_boot_provisions_and_the_second_does_nothing(self) -> None:
        self.azure.incarnation = "3"
        machine = self.machine()
        boot = machine.boot(self.network)
        self.assert_provisioned(boot)
        self.assertEqual(self.resources(), ["goalstate", "health", "instance"])
        self.assertIn(b"<GoalStateIncarnation>3<", self.azure.asked("health")[0].body)
        self.assertEqual(len(boot.lines), len(STEPS), boot)
        for step, line in zip(STEPS, boot.lines):
            self.assertRegex(line, f"^{step}$")
        self.assertIn("Provisioned as web-prod-01", boot.console)

        again = machine.boot(self.network)
        self.assertEqual(len(self.azure.requests), 3)
        self.assertEqual((again.hostname, again.enabled), ("web-prod-01", "disabled"))
        self.assertEqual((again.lines, again.unit["ActiveState"]), ([], "inactive"))

    def test_platform_that_refuses_then_fails_then_recovers(self) -> None:
        self.azure.__exit__()
        elsewhere = ("127.0.0.2", 0)
        flaws: List[Answer] = [Status(500), Status(429), Status(410), Raw(b"\x00garbage\r\n")]
        with self.machine().start(self.network) as boot:
            boot.wait_for_console("comp=goalstate: Connection refused; retrying")
            with self.network.azure(imds=elsewhere) as self.azure:
                self.azure.script("goalstate", flaws)
                self.azure.script("health", flaws)
                boot.wait_for_console("extended=true: Connection refused; retrying")
                with self.network.azure(wireserver=elsewhere) as metadata:
                    metadata.script("instance", flaws)
                    boot.finish()
        self.assert_provisioned(boot)
        self.assertEqual(self.resources(), ["goalstate"] * 4 + ["goalstate", "health"] * 5, boot)
        self.assertEqual(len(metadata.requests), 5)
        self.assertEqual(sum("retrying" in line for line in boot.lines), 14, boot)

    def test_image_without_dbus(self) -> None:
        boot = self.machine("no-dbus").boot(self.network)
        self.assert_provisioned(boot)
        self.assert_line(boot, "<5>hostnamectl: ")

    def test_what_cannot_be_stored_costs_one_warning_and_is_done_again_at_each_boot(self) -> None:
        for option in ("--read-only", "--bind-ro={}/hostname:/etc/hostname"):
            machine = self.machine()
            write(machine.directory, "hostname", "golden-image\n")
            machine.options.append(option.format(machine.directory))
            for number in (1, 2):
                with self.subTest(option=option, boot=number):
                    self.azure.ready.clear()
                    boot = machine.boot(self.network)
                    self.assert_provisioned(boot, stored=False)
                    self.assert_line(boot, "<5>hostnamectl: ")
                    (warning,) = [line for line in boot.lines if line.startswith("<4>")]
                    self.assertRegex(warning, "/etc/hostname: Read-only .*; .* stays enabled")

    def test_bad_name_changes_nothing_and_the_next_boot_mends_it(self) -> None:
        self.azure.computer_name = "myset_0"
        machine = self.machine()
        boot = machine.boot(self.network)
        self.assertTrue(self.azure.ready.is_set())
        self.assertEqual((boot.hostname, boot.etc_hostname), ("golden-image", "golden-image"), boot)
        self.assertEqual((boot.unit["Result"], boot.unit["ActiveState"]), ("exit-code", "failed"))
        self.assertEqual((boot.unit["ExecMainStatus"], boot.enabled), ("1", "enabled"))
        self.assertRegex(boot.lines[-1], "^<3>Not provisioned: .*not a valid hostname: myset_0; ")
        self.assertEqual(len(self.azure.requests), 3)

        self.azure.computer_name = "myset000000"
        self.assert_provisioned(machine.boot(self.network), "myset000000")

    def test_power_lost_between_ready_and_the_hostname(self) -> None:
        self.azure.script("instance", [Silence()])
        machine = self.machine()
        with machine.start(self.network):
            self.azure.wait_for("instance")
        asked = len(self.azure.requests)
        self.assertTrue(self.azure.ready.is_set())
        self.assertEqual((machine.root / "etc/hostname").read_text(), "golden-image\n")

        self.azure.ready.clear()
        self.assert_provisioned(machine.boot(self.network))
        self.assertEqual(self.resources()[asked:], ["goalstate", "health", "instance"])

    def test_another_platform_boots_at_once_and_nothing_is_sent(self) -> None:
        machine = self.machine()
        machine.asset_tag("Amazon EC2")
        boot = machine.boot(self.network)
        line = '<5>Not on Azure (the chassis asset tag is "Amazon EC2"): nothing to do'
        self.assertEqual(boot.lines, [line])
        self.assertEqual((boot.unit["Result"], boot.enabled), ("success", "enabled"))
        self.assertEqual((boot.hostname, self.azure.requests), ("golden-image", []))
        self.assertLess(boot.seconds("ActiveEnter") - boot.seconds("ExecMainStart"), 1)

    def test_sandbox_leaves_little_to_write_and_only_the_platform_to_reach(self) -> None:
        self.network.ip("address", "add", f"{ELSEWHERE}/32", "dev", "lo")
        machine = self.machine()
        add_probe(machine.root)
        machine.options += IP_FILTER
        boot = machine.boot(self.network)
        self.assertEqual(boot.lines, [f"<6>{line}" for line in SANDBOX_ALLOWS], boot)

    def test_guest_proxy_agent_on_the_loopback_can_be_reached_through_the_ip_filter(self) -> None:
        """It takes the connections to the platform's addresses, at 127.0.0.1."""
        proxy = self.network.azure((LOOPBACK_ADDRESS, 3080), (LOOPBACK_ADDRESS, 3081))
        machine = self.machine()
        arguments = "--wireserver 127.0.0.1:3080 --imds 127.0.0.1:3081"
        script = f"ExecStart=/usr/bin/python3 /usr/local/sbin/azure_provision.py {arguments}\n"
        machine.write(f"etc/systemd/system/{UNIT}.d/proxy.conf", f"[Service]\nExecStart=\n{script}")
        machine.options += IP_FILTER
        with proxy:
            boot = machine.boot(self.network)
            self.assertTrue(proxy.ready.is_set(), boot)
        self.assertEqual(boot.hostname, "web-prod-01", boot)

    def test_isolating_another_target_and_back_does_not_run_it_again(self) -> None:
        machine = self.machine()
        add_service(machine.root, "isolate", ISOLATE)
        settings = "[Unit]\nIgnoreOnIsolate=yes\n"
        machine.write("etc/systemd/system/isolate.service.d/stay.conf", settings)
        boot = machine.boot(self.network)
        self.assertIn("<6>back from rescue.target", boot.messages("isolate"), boot)
        self.assertEqual(len(self.azure.requests), 3, boot)
