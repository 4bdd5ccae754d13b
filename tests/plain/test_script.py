"""The first boot as one run of the script: the steps, their order, and what each one logs."""

import html
import json
import os
import signal
import sys
from typing import Any, Dict, List, Tuple, Union
from unittest import mock
from xml.etree import ElementTree

from tests.fake_azure import OK_LINE, Answer, Chunked, Raw, Request, Status, Text
from tests.plain.harness import SCRIPT, ScriptTest, StandIns, popen, start_script

SET, FSYNC = "hostnamectl set-hostname web-prod-01", "fsync hostname: web-prod-01"
DISABLE = "systemctl disable --no-reload azure-provisioning.service"


def metadata(profile: Any, name: Any = "vm") -> str:
    """What IMDS says of a VM: its resource's NAME and its OS profile, or a computer name for it."""
    if isinstance(profile, str):
        profile = {"adminUsername": "me", "computerName": profile}
    return json.dumps({"compute": {"name": name, "osProfile": profile}, "network": {}})


class FirstBootTest(ScriptTest):
    def test_steps_run_in_order(self) -> None:
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual((run.status, run.errors, self.azure.ready.is_set()), (0, "", True))
        requests = [request.resource for request in self.azure.requests]
        self.assertEqual(requests, ["goalstate", "health", "instance"])
        self.assertEqual(machine.calls, [SET, FSYNC, DISABLE])
        steps = [
            f"Health report: .*{self.azure.container_id}.*{self.azure.instance_id}.*Ready",
            "Response: 200 OK$",
            r"Hostname: web-prod-01 \(computerName\)$",
            "Hostname set by hostnamectl$",
            "DHCP request not sent again: ",
            "azure-provisioning.service disabled$",
            r"Provisioned as web-prod-01 in \d+\.\d\d s$",
        ]
        self.assertEqual(len(run.lines), len(steps))
        for line, step in zip(run.lines, steps):
            self.assertRegex(line, f"^{step}")

    def test_health_report_has_the_ids_of_the_goal_state_in_the_order_of_the_platform(self) -> None:
        self.azure.incarnation, self.azure.container_id = " 7\n", " c&lt;&amp;amp;\u00e9 "
        self.azure.script("goalstate", [Text(self.azure.goal_state())])
        self.azure.incarnation, self.azure.container_id = "7", "c<&amp;\u00e9"
        self.assertEqual(self.provision().status, 0)
        _, post, _ = self.azure.requests
        self.assertEqual((post.status, post.headers["Content-Length"]), (200, str(len(post.body))))
        order = [element.tag for element in ElementTree.fromstring(post.body).iter()]
        role = ["RoleInstanceList", "Role", "InstanceId", "Health", "State"]
        first = ["Health", "GoalStateIncarnation", "Container", "ContainerId"]
        self.assertEqual(order, first + role)

    def test_unusual_answers_of_the_wireserver_are_understood_at_once(self) -> None:
        usual = self.azure.goal_state()
        incarnation = "<Incarnation>1</Incarnation>"  # the default, too
        second = "<RoleInstance><InstanceId>second</InstanceId></RoleInstance></RoleInstanceList>"
        cases: List[Tuple[str, Answer]] = [
            ("goalstate", Text(usual.replace(incarnation, ""))),
            ("goalstate", Text(usual.replace(incarnation, "<Incarnation> </Incarnation>"))),
            ("goalstate", Text(usual.replace("</RoleInstanceList>", second))),
            ("goalstate", Text(usual.replace('"utf-8"', '"utf-16"'))),
            ("goalstate", Chunked("\ufeff" + usual)),
            ("goalstate", Raw(OK_LINE + b"\r\n" + usual.encode())),
            *(("health", Status(status)) for status in (201, 204, 299)),
        ]
        for resource, answer in cases:
            with self.subTest(vars(answer)):
                self.azure.requests.clear()
                self.azure.script(resource, [answer])
                response = answer.status if resource == "health" else 200
                self.assertIn(f"Response: {response}", self.provision().output)
                self.assertEqual(len(self.azure.requests), 3)


class HostnameTest(ScriptTest):
    def assert_hostname(self, name: str, requests: int = 1) -> None:
        """A run sets NAME, after so many REQUESTS to IMDS."""
        self.azure.requests.clear()
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0, run.output)
        self.assertEqual(machine.calls[0], f"hostnamectl set-hostname {name}")
        self.assertEqual(len(self.azure.asked("instance")), requests)

    def test_imds_that_would_leave_the_profile_out_is_asked_for_all(self) -> None:
        self.azure.partial = True
        self.assert_hostname("web-prod-01")

    def test_older_imds_gives_the_name_of_the_resource(self) -> None:
        for newest in ("2017-12-01", "2019-06-01", "2021-05-01"):
            self.azure.newest_version = newest
            self.assert_hostname("web-prod-01-vm", requests=2)
            refused, old = self.azure.asked("instance")
            self.assertIn("newest-versions", refused.reason)
            self.assertEqual(old.status, 200)
        # Its second answer fails at first: the newer version is asked for again, too.
        answers = [Status(400), Status(503), Status(400), Text(""), Status(400), Status(410)]
        self.azure.script("instance", answers)
        self.assert_hostname("web-prod-01-vm", requests=8)

    def test_faults_are_retried_and_do_not_end_in_the_vm_name(self) -> None:
        bodies: List[Union[str, bytes]] = ["", "[]", "{}", "[" * 100000, '{"compute": {}}']
        bodies += ['{"compute": null}', '{"compute": "web"}', '{"name": "web"}', metadata(None, 1)]
        bodies += [metadata("web")[:-1], metadata("web").encode("utf-16"), metadata(["web"])]
        bodies += [metadata({"computerName": 7}), metadata({"adminUsername": "me"})]
        cases: List[List[Answer]] = [[Text(body)] for body in bodies]
        cases.append([Status(status) for status in (404, 404, 410, 429, 500, 503)])
        for answers in cases:
            with self.subTest(getattr(answers[0], "body", b"")[:60] or len(answers)):
                self.azure.script("instance", answers)
                self.assert_hostname("web-prod-01", requests=len(answers) + 1)

    def test_valid_metadata_is_understood_at_once(self) -> None:
        web = metadata("web")
        cases: List[Tuple[Answer, str]] = [
            (Text(metadata("myset000000", name="myset_0")), "myset000000"),  # in a scale set
            (Chunked("\ufeff" + web), "web"),
            (Raw(OK_LINE + b"Content-Length: %d \r\n\r\n" % len(web) + web.encode()), "web"),
            (Text(metadata("\r\n\t web \r\n")), "web"),
            (Text(web.ljust(1000000)), "web"),
        ]
        for profile in (None, {}, {"computerName": None}, {"computerName": ""}):
            cases.append((Text(metadata(profile)), "vm"))
        for name in ("7", "Web-PROD", "a--b", "web.example.com", "x" * 64, "x" * 32 + ".y" * 16):
            cases.append((Text(metadata(name)), name))
        for answer, name in cases:
            with self.subTest(name, answer=getattr(answer, "body", b"")[:90]):
                self.azure.script("instance", [answer])
                self.assert_hostname(name)

    def test_invalid_names_are_final_and_change_nothing(self) -> None:
        machine = self.machine()
        names = ["myset_0", "-web", "web-", ".web", "web.", "a..b", "a.-b", "a-.b", "web prod"]
        names += ["--help", "$(reboot)", "x" * 65, "x" * 32 + "." + "y" * 32, " ", "x" * 5000]
        names += ["web\r\n<3>forged", "w\u00e9b", "\u0663", "\ud800", "web\0"]
        for name in names:
            with self.subTest(name):
                self.azure.requests.clear()
                self.azure.computer_name = name
                run = self.provision(machine=machine)
                self.assertEqual((run.status, machine.calls), (1, []))
                requests = [request.resource for request in self.azure.requests]
                self.assertEqual(requests, ["goalstate", "health", "instance"])
                self.assertEqual(machine.hostname_file.read_text(), "localhost\n")
                self.assertRegex(run.lines[-1], "^Not provisioned: .*; the next boot tries again$")


class MachineTest(ScriptTest):
    def test_failing_hostnamectl_leaves_it_to_the_kernel_and_the_file(self) -> None:
        cases: List[Tuple[Dict[str, str], str]] = [
            ({}, "No such file or directory"),
            ({"hostnamectl": "echo Failed to connect to bus >&2; exit 1"}, "Failed to connect"),
            ({"hostnamectl": "kill $$"}, "status -15"),
            (
                {"hostnamectl": r"printf 'no\n<0>forged\033[2J\377'; exit 1"},
                r"no\n<0>forged\x1b[2J\xff;",
            ),
            ({"hostnamectl": "exec /bin/sleep 600"}, ""),
            # Variables that would change what a tool prints are not passed on.
            ({"hostnamectl": 'echo "$SYSTEMD_COLORS,$LC_ALL,$HOME"; exit 1'}, ",C,; "),
        ]
        for tools, reason in cases:
            with self.subTest(tools):
                machine = self.machine(systemctl="", **tools)
                environment = {"SYSTEMD_COLORS": "1", "LC_ALL": "de_DE.UTF-8", "HOME": "/"}
                options: Any = {"COMMAND_TIMEOUT": 30 if reason else 0.3}
                run = self.provision(machine=machine, environment=environment, **options)
                self.assertEqual(run.status, 0, run.output)
                self.assertIn(f"\nhostnamectl: {reason}", run.output)
                self.assertEqual(machine.hostname_file.read_text(), "web-prod-01\n")
                self.assertEqual(machine.calls[-3:], ["sethostname web-prod-01", FSYNC, DISABLE])

    def test_name_that_cannot_be_stored_leaves_the_unit_enabled(self) -> None:
        for file in ("/dev/full", self.machine().root):
            with self.subTest(file=file):
                machine = self.machine(hostnamectl="exit 1", systemctl="")
                run = self.provision(machine=machine, HOSTNAME_FILE=str(file), journal=True)
                self.assertEqual(run.status, 0, run.output)
                self.assertNotIn("systemctl", " ".join(machine.calls))
                self.assertRegex(run.output, f"(?m)^<4>{file}: .*; .* stays enabled")

    def test_long_old_name_is_replaced_whole_and_an_absent_file_is_made(self) -> None:
        machine = self.machine()
        machine.hostname_file.write_text("a-much-longer-name.example.com\n")
        for _ in ("long", "absent"):
            self.provision(machine=machine)
            self.assertEqual(machine.hostname_file.read_text(), "web-prod-01\n")
            self.assertEqual(machine.hostname_file.stat().st_mode & 0o777, 0o644)
            machine.hostname_file.unlink()

    def test_unit_that_stays_enabled_is_a_warning_and_not_a_failure(self) -> None:
        machine = self.machine(hostnamectl="", systemctl="echo Read-only file system >&2; exit 1")
        run = self.provision(machine=machine, journal=True)
        self.assertEqual(run.status, 0)
        self.assertRegex(run.output, "(?m)^<4>systemctl: .*will run again at the next boot")
        self.assertRegex(run.lines[-1], "^<6>Provisioned as web-prod-01 in ")

    def test_hostname_that_the_kernel_refuses_is_a_failure(self) -> None:
        machine = self.machine(hostnamectl="exit 1", systemctl="")
        refused = PermissionError(1, "Operation not permitted")
        with mock.patch.object(StandIns, "sethostname", side_effect=refused):
            run = self.provision(machine=machine)
        self.assertEqual((run.status, len(machine.calls)), (1, 1))
        self.assertRegex(run.lines[-1], "^Not provisioned: Operation not permitted; the next boot")


class OutputTest(ScriptTest):
    def test_lines_have_priorities_in_the_journal_alone(self) -> None:
        self.azure.script("goalstate", [Status(503)])
        self.azure.computer_name = "not_valid"
        run = self.provision(journal=True)
        for line in run.lines:
            self.assertRegex(line, r"^<[3-6]>\S")
        self.assertRegex(run.output, "(?m)^<6>Health report: ")
        self.assertRegex(run.output, "(?m)^<4>.*503 Service Unavailable; retrying for up to")
        self.assertRegex(run.output, "(?m)^<3>Not provisioned: ")
        run = self.provision(environment={"JOURNAL_STREAM": "8:12345"})  # inherited from elsewhere
        self.assertNotRegex(run.output, "(?m)^<[0-9]>")

    def test_goal_state_that_moves_on_is_logged_and_reported_anew(self) -> None:
        first = self.azure.container_id
        self.azure.script("health", [Status(500), Status(503), Status(410)])

        def move_on(request: Request) -> None:
            if request.status == 503:  # after a hibernation the incarnation begins again
                self.azure.container_id, self.azure.instance_id = "another", "another"
            if request.status == 410:
                self.azure.incarnation = "2"

        self.azure.on_request = move_on
        output = self.provision().output
        report = "^Health report: .*>{}</GoalStateIncarnation>.*{}"
        lines = [report.format(1, first), " 500 ", " 503 ", report.format(1, "another"), " 410 "]
        lines += [report.format(2, "another"), "^Response: 200 OK"]
        self.assertRegex(output, "(?ms)" + ".*".join(lines))
        self.assertEqual(output.count("Health report: "), 3)

    def test_long_and_hostile_ids_are_escaped_and_stay_one_line(self) -> None:
        hostile = "id\n&lt;3>forged&amp;\u2028\x85" + "x" * 100000
        self.azure.incarnation = self.azure.container_id = self.azure.instance_id = hostile
        self.azure.script("health", [Status(200)])
        run = self.provision()
        report = ElementTree.fromstring(self.azure.asked("health")[0].body.decode("utf-8"))
        self.assertEqual(report.findtext("Container/ContainerId"), html.unescape(hostile))
        self.assertEqual((run.status, len(run.lines)), (0, 7), run.output)
        self.assertLess(max(map(len, run.lines)), 2000)


class ProcessTest(ScriptTest):
    """What only a process of its own shows."""

    def test_script_runs_as_a_program_even_if_its_standard_output_is_closed(self) -> None:
        environment = {"PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"}
        dry_run = [str(SCRIPT), "--dry-run", *self.endpoints]
        for shell, shown in (('"$@"', "Hostname: web-prod-01"), ('"$@" >&-', "")):
            command = ["/bin/sh", "-c", shell, "sh", *dry_run]
            process = popen(command, self.machine(), environment)
            output, errors = process.communicate(timeout=30)
            self.assertEqual((process.returncode, errors), (0, ""), output)
            self.assertTrue(shown in output and bool(shown) == bool(output), output)
        self.assertEqual(len(self.azure.requests), 4)

    def test_each_line_is_flushed_and_a_reader_that_goes_away_does_not_stop_the_run(self) -> None:
        machine = self.machine()
        self.azure.script("instance", [], forever=Status(404))
        with start_script(machine, *self.endpoints) as process:
            assert process.stdout is not None and process.stderr is not None
            while not process.stdout.readline().startswith("Response: 200"):
                self.assertIsNone(process.poll())
            process.stdout.close()
            self.azure.script("instance", [])
            self.assertEqual((process.wait(30), process.stderr.read()), (0, ""))
        self.assertEqual(len(machine.calls), 3)

    def test_ctrl_c_is_a_line_and_no_traceback(self) -> None:
        self.azure.script("goalstate", [], forever=Status(503))
        # A shell that started the tests in the background has it ignored.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        process = popen([sys.executable, str(SCRIPT), *self.endpoints], self.machine())
        self.azure.wait_for("goalstate", 2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
        self.assertNotIn(process.returncode, (0, 1, 2))
        self.assertEqual((output.splitlines()[-1], errors), ("Interrupted", ""))


class CommandLineTest(ScriptTest):
    def test_dry_run_waits_and_shows_all_and_touches_nothing(self) -> None:
        machine = self.machine()
        self.azure.script("goalstate", [Status(500)])
        run = self.provision("--dry-run", machine=machine)
        self.assertEqual((run.status, machine.calls), (0, []))
        self.assertEqual([r.method for r in self.azure.requests], ["GET"] * 3)
        self.assertEqual(machine.hostname_file.read_text(), "localhost\n")
        self.assertIn(f"<ContainerId>{self.azure.container_id}</ContainerId>", run.output)
        self.assertIn("Hostname: web-prod-01 (", run.output)
        self.assertRegex(run.lines[-1], "^Dry run: nothing was posted, nothing was changed")
        self.azure.computer_name = "not_valid"
        failed = self.provision("--dry-run")
        self.assertRegex(failed.lines[-1], "^Not provisioned: .*not_valid")
        self.assertEqual((failed.status, "boot" in failed.output), (1, False))

    def test_version_is_that_of_the_script_and_help_names_every_option(self) -> None:
        version, usage = self.provision("--version"), self.provision("--help")
        self.assertRegex(version.output, r"^azure_provision.py \d+\.\d+\.\d+\n$")
        for option in ("--wireserver", "--imds", "--dry-run", "--version", "--help"):
            self.assertIn(option, usage.output)
        self.assertEqual((version.status, usage.status), (0, 0))

    def test_usage_errors_are_status_2_and_one_clear_line(self) -> None:
        cases = [([option, self.azure.imds], "both") for option in ("--wireserver", "--imds")]
        cases += [([option], option) for option in ("--no-such-option", "--dry", "--imds")]
        for arguments, reason in cases:
            with self.subTest(arguments):
                run = self.provision(*arguments, endpoints=False)
                self.assertEqual((run.status, run.output), (2, ""))
                self.assertIn(reason, run.errors.splitlines()[-1])
        self.assertEqual(self.azure.requests, [])


class PlatformTest(ScriptTest):
    def test_only_root_on_azure_is_provisioned_unless_the_endpoints_are_named(self) -> None:
        azure = "7783-7084-3265-9085-8269-3286-77\n"
        for tag, arguments, uid, status, requests, last in (
            ("Amazon EC2\n", [], 0, 0, 0, 'Not on Azure .*"Amazon EC2"'),
            ("", [], 0, 0, 0, 'Not on Azure .*""'),
            ("a\nb\x1b\xff", [], 0, 0, 0, r'Not on Azure .*"a\\nb\\x1b'),
            (azure, [], 0, 0, 3, "Provisioned as web-prod-01"),
            (None, [], 0, 0, 3, "Provisioned as web-prod-01"),
            (None, [], 1000, 2, 0, "Not root: nothing was sent"),
            (None, ["--dry-run"], 1000, 0, 2, "Dry run: nothing was posted"),
            ("Amazon EC2\n", self.endpoints, 1000, 0, 3, "Provisioned as web-prod-01"),
        ):
            with self.subTest(tag, arguments=arguments, uid=uid):
                self.azure.requests.clear()
                machine = self.machine()
                if tag is not None:
                    machine.tag_file.write_text(tag, encoding="latin-1")
                run = self.provision(*arguments, endpoints=False, machine=machine, uid=uid)
                self.assertEqual((run.status, len(self.azure.requests)), (status, requests))
                self.assertEqual(len(machine.calls), 3 if requests == 3 else 0)
                self.assertRegex(run.lines[-1], f"^{last}")
                self.assertTrue(requests or len(run.lines) == 1, run.output)
