"""Which DHCP client is asked to publish the name, and that none of them can fail the run."""

import socket
from typing import Dict, Tuple

from tests.harness import Machine, Run, ScriptTest

HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
WIRESERVER_ROUTE = "eth9\t10813FA8\t0104000A\t0007\t0\t0\t5\tFFFFFFFF\t0\t0\t0\n"
NOTICE = "(?m)^<5>The hostname will be published at the next boot: "


def default_route(interface: str, metric: int = 100) -> str:
    return f"{interface}\t00000000\t0104000A\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n"


class PublishTest(ScriptTest):
    """The loopback interface, whose index is 1, plays the one that leads to Azure."""

    routes = HEADER + WIRESERVER_ROUTE + default_route("lo")
    leased = True  # whether systemd-networkd has a lease for it

    def publish(self, **tools: str) -> Machine:
        """Run the script on a machine with these tools beside hostnamectl and systemctl."""
        machine = self.machine(**dict({"hostnamectl": "", "systemctl": ""}, **tools))
        leases = machine.root / "leases"
        leases.mkdir()
        if self.leased:
            (leases / "1").write_text("ADDRESS=10.0.0.4\n")
        (machine.root / "route").write_text(self.routes)
        self.ran: Run = self.provision(
            machine=machine,
            environment={"JOURNAL_STREAM": "8:1"},
            ROUTE_FILE=str(machine.root / "route"),
            NETWORKD_LEASES=str(leases),
            PUBLISH_TIMEOUT=2,
        )
        self.assertEqual(self.ran.status, 0, self.ran.output)
        self.assertIn("disabled", self.ran.lines[-2])
        return machine

    def test_networkd_is_asked_after_the_name_is_set_and_before_the_unit_is_disabled(self) -> None:
        machine = self.publish(networkctl="", nmcli="")
        self.assertEqual(
            [call.split()[0] for call in machine.calls], ["hostnamectl", "networkctl", "systemctl"]
        )
        self.assertEqual(machine.calls[1], "networkctl reconfigure lo")
        self.assertIn("<6>Hostname published by networkctl reconfigure lo", self.ran.output)

    def test_network_manager_is_asked_for_an_interface_of_its_own(self) -> None:
        self.leased = False
        machine = self.publish(networkctl="", nmcli='[ "$1" != -g ] || echo "100 (connected)"')
        self.assertEqual(
            machine.calls[1:3],
            ["nmcli -g GENERAL.STATE device show lo", "nmcli device connect lo"],
        )
        self.assertIn("<6>Hostname published by nmcli device connect lo", self.ran.output)

    def test_interface_of_another_client_is_left_alone(self) -> None:
        self.leased = False
        for state in ("10 (unmanaged)", "100 (connected (externally))", "30 (disconnected)", ""):
            with self.subTest(state):
                machine = self.publish(nmcli=f"echo '{state}'")
                self.assertEqual([c for c in machine.calls if "connect " in c], [])
                self.assertRegex(self.ran.output, NOTICE + "lo has no DHCP client")

    def test_client_that_fails_or_is_missing_or_hangs_costs_a_notice(self) -> None:
        clients: Tuple[Tuple[Dict[str, str], str], ...] = (
            (
                {"networkctl": "echo Failed to connect to bus >&2; exit 1"},
                "networkctl: Failed to c",
            ),
            ({}, "networkctl: No such file or directory"),
            ({"networkctl": "exec /bin/sleep 600"}, "networkctl: not done in "),
        )
        for tools, reason in clients:
            with self.subTest(reason):
                self.publish(**tools)
                self.assertRegex(self.ran.output, NOTICE + reason)
                self.assertLess(self.ran.seconds, 4)

    def test_machine_without_a_client_costs_a_notice(self) -> None:
        self.leased = False
        self.publish()
        self.assertRegex(self.ran.output, NOTICE + "nmcli: No such file or directory")

    def test_interface_is_the_one_of_the_best_default_route(self) -> None:
        self.routes = HEADER + default_route("eth8", 200) + default_route("lo", 100)
        self.assertEqual(self.publish(networkctl="").calls[1], "networkctl reconfigure lo")

    def test_odd_routing_tables_cost_a_notice(self) -> None:
        for routes, reason in (
            (HEADER + WIRESERVER_ROUTE, "there is no default route"),
            (HEADER, "there is no default route"),
            ("", "there is no default route"),
            (HEADER + default_route("*"), "there is no default route"),
            (HEADER + default_route("gone0"), ".*No such device|.*no interface"),
        ):
            with self.subTest(reason):
                self.routes = routes
                machine = self.publish(networkctl="")
                self.assertEqual(len(machine.calls), 2)
                self.assertRegex(self.ran.output, NOTICE + reason)

    def test_name_that_did_not_change_is_not_published(self) -> None:
        self.azure.computer_name = socket.gethostname()
        machine = self.publish(networkctl="")
        self.assertEqual([c.split()[0] for c in machine.calls], ["hostnamectl", "systemctl"])
        self.assertNotIn("published", self.ran.output)
