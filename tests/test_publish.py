"""Which DHCP client is asked to publish the name, and that none of them can fail the run."""

import socket

from tests.harness import Machine, Run, ScriptTest

HEADER = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
WIRESERVER_ROUTE = "eth9\t10813FA8\t0104000A\t0007\t0\t0\t5\tFFFFFFFF\t0\t0\t0\n"
NETWORKD = "[ $1 = reconfigure ] || echo '  1 lo loopback carrier configured'"
NETWORK_MANAGER = '[ "$1" != -g ] || echo "100 (connected)"'
NOTICE = "(?m)^<5>The hostname will be published at the next boot: "


def default_route(interface: str, metric: int = 100) -> str:
    return f"{interface}\t00000000\t0104000A\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0\n"


class PublishTest(ScriptTest):
    """The loopback interface, whose index is 1, plays the one that leads to Azure."""

    routes = HEADER + WIRESERVER_ROUTE + default_route("lo")

    def publish(self, **tools: str) -> Machine:
        """Run the script on a machine with these tools beside hostnamectl and systemctl."""
        machine = self.machine(**dict({"hostnamectl": "", "systemctl": ""}, **tools))
        (machine.root / "route").write_text(self.routes)
        self.ran: Run = self.provision(
            machine=machine,
            environment={"JOURNAL_STREAM": "8:1"},
            ROUTE_FILE=str(machine.root / "route"),
            PUBLISH_TIMEOUT=1,
        )
        self.assertEqual(self.ran.status, 0, self.ran.output)
        self.assertIn("disabled", self.ran.lines[-2])
        return machine

    def test_networkd_is_asked_after_the_name_is_set_and_before_the_unit_is_disabled(self) -> None:
        machine = self.publish(networkctl=NETWORKD, nmcli=NETWORK_MANAGER)
        self.assertEqual(
            machine.calls,
            [
                "hostnamectl set-hostname web-prod-01",
                "networkctl --no-legend list lo",
                "networkctl reconfigure lo",
                "systemctl disable --no-reload azure-provisioning.service",
            ],
        )
        self.assertIn("<6>Hostname published by networkctl reconfigure lo", self.ran.output)

    def test_network_manager_is_asked_for_an_interface_of_its_own(self) -> None:
        for networkd in (
            {},
            {"networkctl": "echo '1 lo loopback carrier unmanaged'"},
            {"networkctl": "echo 'Failed to connect to bus' >&2; exit 1"},
        ):
            with self.subTest(networkd):
                machine = self.publish(nmcli=NETWORK_MANAGER, **networkd)
                self.assertEqual(
                    machine.calls[-3:-1],
                    ["nmcli -g GENERAL.STATE device show lo", "nmcli device connect lo"],
                )
                self.assertIn("<6>Hostname published by nmcli device connect lo", self.ran.output)

    def test_interface_of_another_client_is_left_alone(self) -> None:
        for state in ("10 (unmanaged)", "100 (connected (externally))", "30 (disconnected)", ""):
            with self.subTest(state):
                machine = self.publish(
                    nmcli=f"echo '{state}'", networkctl="echo '1 lo loopback routable unmanaged'"
                )
                calls = "\n".join(machine.calls)
                self.assertNotRegex(calls, "reconfigure|connect lo")
                self.assertRegex(self.ran.output, NOTICE + "lo has no DHCP client")

    def test_client_that_fails_costs_a_notice(self) -> None:
        self.publish(networkctl=NETWORKD + "; [ $1 != reconfigure ] || { echo no >&2; exit 1; }")
        self.assertRegex(self.ran.output, NOTICE + "networkctl: no$")

    def test_clients_that_hang_cost_a_notice_and_no_more_than_their_time(self) -> None:
        hang = "exec /bin/sleep 600"
        for tools, reason in (
            ({"networkctl": hang, "nmcli": hang}, "lo has no DHCP client"),
            ({"networkctl": NETWORKD + f"; [ $1 != reconfigure ] || {hang}"}, "networkctl: not do"),
        ):
            with self.subTest(reason):
                self.publish(**tools)
                self.assertRegex(self.ran.output, NOTICE + reason)
                self.assertLess(self.ran.seconds, 3)

    def test_machine_without_a_client_costs_a_notice(self) -> None:
        self.publish()
        self.assertRegex(self.ran.output, NOTICE + "lo has no DHCP client that is known here")

    def test_interface_is_the_one_of_the_best_default_route(self) -> None:
        self.routes = HEADER + default_route("eth8", 200) + default_route("lo", 100)
        self.assertEqual(self.publish(networkctl=NETWORKD).calls[2], "networkctl reconfigure lo")

    def test_odd_routing_tables_cost_a_notice(self) -> None:
        for routes, reason in (
            (HEADER + WIRESERVER_ROUTE, "there is no default route"),
            (HEADER, "there is no default route"),
            ("", "there is no default route"),
            (HEADER + default_route("*"), "there is no default route"),
        ):
            with self.subTest(reason):
                self.routes = routes
                machine = self.publish(networkctl=NETWORKD)
                self.assertEqual(len(machine.calls), 2)
                self.assertRegex(self.ran.output, NOTICE + reason)

    def test_name_that_did_not_change_is_not_published(self) -> None:
        self.azure.computer_name = socket.gethostname()
        machine = self.publish(networkctl=NETWORKD)
        self.assertEqual([c.split()[0] for c in machine.calls], ["hostnamectl", "systemctl"])
        self.assertNotIn("published", self.ran.output)
