"""The first boot as one run of the script: the steps, their order, what each one tells."""

import json
import os
import re
import signal
import sys
import time
from typing import Dict, Optional
from xml.etree import ElementTree

from tests.fake_azure import GOAL_STATE, OK, Chunked, Raw, Request, Silence, Status, Text
from tests.harness import ROOT, SCRIPT, Run, ScriptTest, popen

PATH = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"


def compute(computer_name: str) -> str:
    """The compute metadata of a VM."""
    return json.dumps({"name": "vm", "osProfile": {"computerName": computer_name}})


class FirstBootTest(ScriptTest):
    def test_steps_run_in_order(self) -> None:
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual((run.status, run.errors), (0, ""))
        self.assertEqual(
            [(request.method, request.resource) for request in self.azure.requests],
            [("GET", "goalstate"), ("POST", "health"), ("GET", "compute")],
        )
        self.assertTrue(self.azure.ready.is_set())
        self.assertEqual(
            machine.calls,
            [
                "hostnamectl set-hostname web-prod-01",
                "fsync hostname",
                "systemctl disable --no-reload azure-provisioning.service",
            ],
        )

    def test_script_runs_as_a_program(self) -> None:
        machine = self.machine()
        process = popen([str(SCRIPT), "--dry-run", *self.endpoints], machine, {"PATH": PATH})
        output, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors), (0, ""), output)
        self.assertIn("Hostname: web-prod-01", output)

    def test_output_keeps_the_landmarks(self) -> None:
        lines = self.provision().lines
        self.assert_in_order(
            [
                r"^Retrieving the goal state from the WireServer",
                f"^ContainerId: {self.azure.container_id}$",
                f"^InstanceId: {re.escape(self.azure.instance_id)}$",
                r"<Health><GoalStateIncarnation>1<.*<State>Ready</State>.*</Health>$",
                r"^Response: 200 OK$",
                r"^Hostname: web-prod-01 \(computerName\)$",
                r"^Hostname set by hostnamectl$",
                r"^Hostname not published: ",
                r"^azure-provisioning.service disabled$",
                r"^Provisioned as web-prod-01 in \d+\.\d\d s$",
            ],
            lines,
        )
        self.assertLessEqual(len(lines), 12)

    def test_requests_carry_the_headers_of_the_platform(self) -> None:
        self.provision()
        goal_state, health, name = self.azure.requests
        self.assertEqual(goal_state.path, "/machine?comp=goalstate")
        self.assertEqual(health.path, "/machine?comp=health")
        for request in (goal_state, health):
            self.assertEqual(request.headers["x-ms-version"], "2012-11-30")
            self.assertEqual(request.headers["x-ms-agent-name"], "custom-provisioning")
        self.assertEqual(health.headers["Content-Type"], "text/xml;charset=utf-8")
        self.assertEqual(name.headers["Metadata"], "true")
        self.assertEqual(name.path, "/metadata/instance/compute?api-version=2021-02-01")

    def test_health_report_names_this_vm_and_its_own_incarnation(self) -> None:
        self.azure.incarnation = "7"
        self.provision()
        body = self.azure.asked("health")[0].body
        self.assertEqual(
            body.decode(),
            "<Health><GoalStateIncarnation>7</GoalStateIncarnation><Container>"
            f"<ContainerId>{self.azure.container_id}</ContainerId><RoleInstanceList><Role>"
            f"<InstanceId>{self.azure.instance_id}</InstanceId>"
            "<Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>",
        )

    def test_ids_are_escaped_in_the_health_report(self) -> None:
        self.azure.container_id = "a&amp;b&lt;c\u00e9"
        self.azure.script("health", [Status(200)])
        run = self.provision()
        self.assertEqual(run.status, 0)
        report = ElementTree.fromstring(self.azure.asked("health")[0].body.decode("utf-8"))
        self.assertEqual(report.findtext("Container/ContainerId"), "a&b<c\u00e9")

    def test_incarnation_is_1_if_it_is_absent(self) -> None:
        for empty in ("", "<Incarnation/>", "<Incarnation> </Incarnation>"):
            with self.subTest(empty):
                goal_state = self.azure.goal_state().replace("<Incarnation>1</Incarnation>", empty)
                self.azure.script("goalstate", [Text(goal_state)])
                self.assertEqual(self.provision().status, 0)
                self.assertIn(b"<GoalStateIncarnation>1<", self.azure.asked("health")[-1].body)

    def test_first_of_several_instances_is_reported(self) -> None:
        second = "<RoleInstance><InstanceId>second</InstanceId></RoleInstance></RoleInstanceList>"
        goal_state = self.azure.goal_state().replace("</RoleInstanceList>", second)
        self.assertIn("second", goal_state)
        self.azure.script("goalstate", [Text(goal_state)])
        self.assertEqual(self.provision().status, 0)
        self.assertTrue(self.azure.ready.is_set())

    def test_byte_order_mark_and_chunks_are_accepted(self) -> None:
        self.azure.script("goalstate", [Chunked("\ufeff" + self.azure.goal_state())])
        self.azure.script("compute", [Chunked("\ufeff" + compute("web-prod-02"))])
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0, run.output)
        self.assertEqual(len(self.azure.requests), 3)
        self.assertEqual(machine.calls[0], "hostnamectl set-hostname web-prod-02")

    def test_response_without_a_length_is_read_to_its_end(self) -> None:
        self.azure.script("goalstate", [Raw(OK + b"\r\n" + self.azure.goal_state().encode())])
        spaced = b"Content-Length: %d \r\n\r\n" % len(compute("web-prod-02"))
        self.azure.script("compute", [Raw(OK + spaced + compute("web-prod-02").encode())])
        run = self.provision()
        self.assertEqual((run.status, len(self.azure.requests)), (0, 3), run.output)
        for request in self.azure.requests:
            self.assertEqual(request.headers["Connection"], "close")

    def test_any_2xx_accepts_the_health_report(self) -> None:
        for status in (200, 201, 202, 204, 299):
            with self.subTest(status):
                self.azure.script("health", [Status(status)])
                run = self.provision()
                self.assertEqual(run.status, 0)
                self.assertIn(f"Response: {status}", run.output)
        self.assertEqual(len(self.azure.asked("health")), 5)


class HostnameTest(ScriptTest):
    def hostname(self) -> str:
        """The name that hostnamectl was given, in a run that succeeds."""
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0, run.output)
        words = machine.calls[0].split(" ", 2)
        self.assertEqual(words[:2], ["hostnamectl", "set-hostname"])
        return words[2]

    def test_scale_set_vm_gets_its_computer_name(self) -> None:
        self.azure.vm_name, self.azure.computer_name = "myset_0", "myset000000"
        self.assertEqual(self.hostname(), "myset000000")

    def test_old_imds_gives_the_vm_name(self) -> None:
        self.azure.newest_version = "2019-06-01"
        self.assertEqual(self.hostname(), "web-prod-01-vm")
        self.assertEqual(
            [request.path for request in self.azure.asked("compute")],
            [
                f"/metadata/instance/compute?api-version={version}"
                for version in ("2021-02-01", "2021-02-01", "2019-06-01")
            ],
        )

    def test_one_stray_400_does_not_end_in_the_vm_name(self) -> None:
        self.azure.script("compute", [Status(400)])
        self.assertEqual(self.hostname(), "web-prod-01")

    def test_vm_name_is_used_if_the_snapshot_has_no_computer_name(self) -> None:
        for profile in (None, {}, {"computerName": None}, {"computerName": " \r\n\t"}):
            with self.subTest(profile):
                self.azure.script(
                    "compute", [Text(json.dumps({"name": "vm", "osProfile": profile}))]
                )
                self.assertEqual(self.hostname(), "vm")

    def test_failures_do_not_fall_back_to_the_vm_name(self) -> None:
        self.azure.script("compute", [Status(s) for s in (404, 404, 404, 410, 429, 500, 503)])
        self.assertEqual(self.hostname(), "web-prod-01")

    def test_answers_of_another_shape_are_retried(self) -> None:
        for answer in (
            "",
            "web-prod-02",
            "<html><body>502 Bad Gateway</body></html>",
            compute("web-prod-02")[:-1],
            '"web-prod-02"',
            "[]",
            "null",
            '{"osProfile": {"computerName": 7}, "name": "web-prod-02"}',
            '{"osProfile": "web-prod-02"}',
            '{"osProfile": {"computerName": ["web-prod-02"]}}',
            '{"name": {"web-prod-02": 1}}',
            "{}",
            "[" * 100000,
            b"\xff\xfe",
            compute("web-prod-02").encode("utf-16"),
        ):
            with self.subTest(str(answer)[:60]):
                self.azure.requests.clear()
                self.azure.script("compute", [Text(answer)])
                self.assertEqual(self.hostname(), "web-prod-01")
                self.assertEqual(len(self.azure.asked("compute")), 2)

    def test_long_numbers_cost_no_time(self) -> None:
        body = '{"name": "web", "x": %s}' % ("9" * 1000000)
        self.azure.script("compute", [Text(body)])
        self.assertEqual(self.hostname(), "web")
        self.assertLess(time.monotonic() - self.azure.asked("compute")[0].time, 3)

    def test_surrounding_white_space_is_dropped(self) -> None:
        self.azure.computer_name = "\r\n\t web-prod-03 \r\n"
        self.assertEqual(self.hostname(), "web-prod-03")

    def test_valid_names_are_taken_as_they_are(self) -> None:
        for name in (
            "a",
            "7",
            "Web-PROD",
            "a--b",
            "web.example.com",
            "x" * 63,
            "x" * 31 + "." + "y" * 32,
        ):
            with self.subTest(name):
                self.azure.computer_name = name
                self.assertEqual(self.hostname(), name)

    def test_invalid_names_are_final_and_change_nothing(self) -> None:
        machine = self.machine()
        names: Dict[str, str] = {
            "myset_0": "myset_0",
            "-web": "-web",
            "web-": "web-",
            "a.-b": "a.-b",
            "a-.b": "a-.b",
            "web prod": "web prod",
            "web\nprod": r"web\\nprod",
            "web\r\n<3>forged": r"web\\r\\n<3>forged",
            "web\x1b[2J": r"web\\x1b\[2J",
            "web\x00": r"web\\x00",
            "--help": "--help",
            "$(reboot)": r"\$\(reboot\)",
            ".web": r"\.web",
            "web.": r"web\.",
            "a..b": r"a\.\.b",
            "x" * 64: "x{64}",
            "x" * 32 + "." + "y" * 32: r"x{32}\.y{32}",
            "x" * 5000: r"x{97}\.\.\.",
            "w\u00e9b": r"w\\xe9b",
            "\u2028": r"\\u2028",
            "\ud800": r"\\ud800",
        }
        for name, shown in names.items():
            with self.subTest(name):
                self.azure.ready.clear()
                asked = len(self.azure.asked("compute"))
                self.azure.computer_name = name
                run = self.provision(machine=machine)
                self.assertEqual(run.status, 1)
                self.assertTrue(self.azure.ready.is_set(), "Ready was not posted before")
                self.assertEqual(len(self.azure.asked("compute")), asked + 1, "tried again")
                self.assertEqual(machine.calls, [])
                self.assertEqual(machine.hostname_file.read_text(), "localhost\n")
                self.assertRegex(
                    run.lines[-1], f"^Not provisioned: .*hostname: {shown}.*; the next"
                )
                self.assertLess(len(run.lines[-1]), 220)
                self.assertEqual(len(run.lines), 7)
                self.assertRegex(run.output, r"\A[\x20-\x7e\n]*\Z")


class SetHostnameTest(ScriptTest):
    def test_missing_or_failing_hostnamectl_leaves_it_to_the_kernel_and_the_file(self) -> None:
        for hostnamectl in (
            {},
            {"hostnamectl": "echo Failed to connect to bus: No such file >&2; exit 1"},
            {"hostnamectl": "kill $$"},
        ):
            with self.subTest(hostnamectl):
                machine = self.machine(systemctl="", **hostnamectl)
                run = self.provision(machine=machine)
                self.assertEqual(run.status, 0, run.output)
                self.assertEqual(machine.hostname_file.read_text(), "web-prod-01\n")
                self.assertRegex(run.output, "hostnamectl: .*; setting the hostname without")
                self.assertEqual(
                    [call.split()[0] for call in machine.calls][-3:],
                    ["sethostname", "fsync", "systemctl"],
                )

    def test_hostnamectl_that_hangs_is_killed_with_all_its_children(self) -> None:
        for hang in ("sleep 600 & sleep 600", "sleep 600 & exit 0", "setsid sleep 8 & sleep 600"):
            with self.subTest(hang):
                machine = self.machine(hostnamectl=hang, systemctl="")
                path = f"{machine.bin}:/usr/bin:/bin"
                run = self.provision(
                    machine=machine, COMMAND_TIMEOUT=0.3, environment={"PATH": path}
                )
                self.assertEqual(run.status, 0, run.output)
                self.assertLess(run.seconds, 5)
                self.assertIn("hostnamectl: timed out after 0 s; setting", run.output)
                self.assertEqual(machine.hostname_file.read_text(), "web-prod-01\n")

    def test_hostnamectl_that_never_stops_printing_is_killed_at_once(self) -> None:
        machine = self.machine(hostnamectl="while :; do echo no end of it; done", systemctl="")
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0, run.output)
        self.assertLess(run.seconds, 5)
        self.assertIn("hostnamectl: printed more than 65536 bytes; setting", run.output)

    def test_name_that_cannot_be_stored_leaves_the_unit_enabled_and_the_old_name_stored(
        self,
    ) -> None:
        directory, fifo = self.machine().root / "directory", self.machine().root / "fifo"
        directory.mkdir()
        os.mkfifo(str(fifo))
        for file in ("/proc/sys/kernel/ostype", "/dev/null", "/dev/full", directory, fifo):
            for hostnamectl in ("", "echo Read-only file system; exit 1"):
                with self.subTest(file=file, hostnamectl=hostnamectl):
                    machine = self.machine(hostnamectl=hostnamectl, systemctl="")
                    run = self.provision(machine=machine, HOSTNAME_FILE=str(file), journal=True)
                    self.assertEqual(run.status, 0, run.output)
                    self.assertNotIn("systemctl", " ".join(machine.calls))
                    self.assertRegex(run.output, f"(?m)^<4>{file}: .*; .* stays enabled")

    def test_full_disk_keeps_the_old_name(self) -> None:
        machine = self.machine()
        machine.hostname_file.write_text("golden-image.example.com\n")
        run = self.provision(machine=machine, environment={"FULL_DISK": "1"})
        self.assertEqual(machine.hostname_file.read_text(), "golden-image.example.com\n")
        self.assertRegex(run.output, "hostname: No space left on device; .* stays enabled")

    def test_long_old_name_is_replaced_whole_and_an_absent_file_is_made(self) -> None:
        machine = self.machine()
        for content in ("a-much-longer-name.example.com\n", None):
            if content is None:
                machine.hostname_file.unlink()
            else:
                machine.hostname_file.write_text(content)
            self.provision(machine=machine)
            self.assertEqual(machine.hostname_file.read_text(), "web-prod-01\n")
            self.assertEqual(machine.hostname_file.stat().st_mode & 0o777, 0o644)

    def test_hostname_that_cannot_be_set_fails_the_run(self) -> None:
        machine = self.machine(hostnamectl="echo REFUSED; exit 1", systemctl="")
        machine.record.write_text("REFUSED\n")
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 1)
        self.assertRegex(run.lines[-1], "cannot be set: Operation not permitted; the next boot")
        self.assertNotIn("systemctl", " ".join(machine.calls))

    def test_tools_cannot_forge_a_line(self) -> None:
        machine = self.machine(
            hostnamectl=r"printf 'no\n<0>forged\033[2J\377'; exit 1", systemctl=""
        )
        run = self.provision(machine=machine)
        self.assertEqual(run.status, 0)
        self.assertIn(r"hostnamectl: no\n<0>forged\x1b[2J\xff; setting", run.output)

    def test_tools_do_not_see_what_would_change_their_output(self) -> None:
        machine = self.machine(hostnamectl='echo "$SYSTEMD_COLORS,$LC_ALL,$HOME"; exit 1')
        hostile = {"SYSTEMD_COLORS": "1", "SYSTEMD_LOG_LEVEL": "debug", "LC_ALL": "de_DE.UTF-8"}
        self.assertIn(
            "hostnamectl: ,C,; ", self.provision(machine=machine, environment=hostile).output
        )


class DisableTest(ScriptTest):
    def test_unit_that_stays_enabled_is_a_warning_and_not_a_failure(self) -> None:
        for systemctl in ({}, {"systemctl": "echo Read-only file system >&2; exit 1"}):
            with self.subTest(systemctl):
                machine = self.machine(hostnamectl="", **systemctl)
                run = self.provision(machine=machine, journal=True)
                self.assertEqual(run.status, 0)
                self.assertRegex(run.output, "(?m)^<4>systemctl: .*will run again at the next boot")
                self.assertRegex(run.lines[-1], "^<6>Provisioned as web-prod-01 in ")


class OutputTest(ScriptTest):
    def test_priorities_in_the_journal(self) -> None:
        self.azure.script("goalstate", [Status(503)])
        self.azure.computer_name = "not_valid"
        run = self.provision(journal=True)
        for line in run.lines:
            self.assertRegex(line, r"^<[3-6]>\S")
        self.assertRegex(run.output, "(?m)^<6>Retrieving the goal state")
        self.assertRegex(run.output, "(?m)^<4>.*503 Service Unavailable; retrying for up to")
        self.assertRegex(run.output, "(?m)^<3>Not provisioned: ")

    def test_no_priorities_elsewhere_even_if_the_variable_is_there(self) -> None:
        for stream in ("8:12345", "", "journal", "8"):
            run = self.provision("--dry-run", environment={"JOURNAL_STREAM": stream})
            self.assertNotRegex(run.output, "(?m)^<[0-9]>")

    def test_blocked_and_ignored_signals_of_the_parent_hide_nothing(self) -> None:
        self.azure.script("goalstate", [Silence()])
        machine = self.machine()
        impatient = (
            "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); "
            "text = open(sys.argv[1]).read(); "
            "text = text.replace('RESPONSE_TIMEOUT = 10', 'RESPONSE_TIMEOUT = 1'); "
            "sys.argv[:2] = ['script']; exec(compile(text, 'script', 'exec'))"
        )
        command = [sys.executable, "-I", "-c", impatient, str(SCRIPT), "--dry-run", *self.endpoints]
        process = popen(command, machine)
        output, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors), (0, ""), output)
        self.assertIn("timed out after 1 s", output)

    def test_closed_standard_output_is_not_a_failure(self) -> None:
        machine = self.machine()
        command = [sys.executable, "-I", str(SCRIPT), "--dry-run", *self.endpoints]
        process = popen(["/bin/sh", "-c", '"$@" >&-', "sh", *command], machine)
        self.assertEqual(process.communicate(timeout=30), ("", ""))
        self.assertEqual(process.returncode, 0)

    def test_ids_are_logged_before_the_report_and_again_if_they_change(self) -> None:
        first = self.azure.container_id
        self.azure.script("health", [Status(500), Status(503), Status(410)])

        def change(request: Request) -> None:
            if request.status == 503:
                self.azure.container_id = "another"

        self.azure.on_request = change
        run = self.provision()
        self.assert_in_order(
            [f"^ContainerId: {first}$", "^InstanceId:", " 500 ", " 503 ", "^ContainerId: another$"],
            run.lines,
        )
        self.assertEqual(run.output.count("ContainerId: "), 2)

    def test_ids_that_always_change_are_logged_ten_times_at_most(self) -> None:
        def change(request: Request) -> None:
            self.azure.container_id = str(len(self.azure.requests))

        self.azure.on_request = change
        self.azure.script("health", [Status(500)] * 20)
        self.assertEqual(self.provision(READY_LIMIT=3).output.count("ContainerId: "), 10)

    def test_each_line_is_flushed_at_once(self) -> None:
        self.azure.computer_name = None
        self.azure.vm_name = None
        with self.start(machine=self.machine()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("Response: 200"):
                    break
            self.assertIsNone(process.poll())
            process.kill()

    def test_output_that_nobody_reads_does_not_stop_the_run(self) -> None:
        machine = self.machine()
        self.azure.script("goalstate", [Status(503)])
        with self.start(machine=machine) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            self.assertEqual(process.wait(30), 0)
            self.assertEqual(len(machine.calls), 3)
            self.assertEqual(process.stderr.read(), "")

    def test_long_and_hostile_ids_stay_one_short_line_each(self) -> None:
        hostile = "id\n&lt;3>forged\u2028\x85" + "x" * 100000
        goal_state = GOAL_STATE.format(
            version="", incarnation=hostile, container_id=hostile, instance_id=hostile
        )
        self.azure.script("goalstate", [Text(goal_state)])
        self.azure.script("health", [Status(200)])
        run = self.provision()
        self.assertEqual(run.status, 0)
        self.assertLess(max(len(line) for line in run.lines), 1100)
        self.assertRegex(run.output, r"\A[\x20-\x7e\n]*\Z")
        self.assertNotRegex(run.output, "(?m)^<3>")
        self.assertEqual(len(run.lines), 11, run.output)


class CommandLineTest(ScriptTest):
    def test_dry_run_shows_all_and_touches_nothing(self) -> None:
        machine = self.machine()
        run = self.provision("--dry-run", machine=machine)
        self.assertEqual(run.status, 0)
        self.assertEqual([r.method for r in self.azure.requests], ["GET", "GET"])
        self.assertEqual(machine.calls, [])
        self.assertIn(f"<ContainerId>{self.azure.container_id}</ContainerId>", run.output)
        self.assertIn("Hostname: web-prod-01 (", run.output)
        self.assertRegex(run.lines[-1], "^Dry run: nothing was posted, nothing was changed")

    def test_dry_run_waits_and_checks_as_the_real_one_does(self) -> None:
        self.azure.script("goalstate", [Status(500)])
        self.azure.computer_name = "not_valid"
        run = self.provision("--dry-run")
        self.assertEqual(run.status, 1)
        self.assertEqual(len(self.azure.asked("goalstate")), 2)

    def test_version_is_the_only_one(self) -> None:
        run = self.provision("--version")
        self.assertEqual((run.status, run.errors), (0, ""))
        self.assertRegex(run.output, r"^azure_provision.py \d+\.\d+\.\d+\n$")
        version = run.output.split()[1]
        self.assertNotIn(version, (ROOT / "pyproject.toml").read_text())

    def test_help_names_every_option(self) -> None:
        run = self.provision("--help")
        self.assertEqual((run.status, run.errors), (0, ""))
        for option in ("--wireserver", "--imds", "--dry-run", "--version", "--help"):
            self.assertIn(option, run.output)

    def test_usage_errors_are_status_2_and_one_clear_line(self) -> None:
        for arguments in (
            ["--no-such-option"],
            ["argument"],
            ["--dry"],
            ["--wireserver"],
            ["--wireserver", ""],
            ["--wireserver", "host:"],
            ["--wireserver", "host:http"],
            ["--wireserver", "host:0"],
            ["--wireserver", "host:65536"],
            ["--wireserver", os.fsdecode("host:\u0661".encode("utf-8"))],
            ["--imds", "a b"],
            ["--imds", "a\nb"],
            ["--imds", "http://169.254.169.254"],
            ["--imds", "x" * 64],
            ["--imds", "::1"],
        ):
            with self.subTest(arguments):
                environment = {"PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8"}
                run = self.provision(*arguments, endpoints=False, environment=environment)
                self.assertEqual((run.status, run.output), (2, ""))
                self.assertRegex(run.errors.splitlines()[-1], "^azure_provision.py: error: .")
        self.assertEqual(self.azure.requests, [])

    def test_one_endpoint_alone_is_a_usage_error(self) -> None:
        for option in ("--wireserver", "--imds"):
            run = self.provision(option, self.azure.wireserver, endpoints=False)
            self.assertEqual((run.status, run.output), (2, ""))
            last = run.errors.splitlines()[-1]
            self.assertTrue(last.endswith("give both --wireserver and --imds, or neither"), last)
        self.assertEqual(self.azure.requests, [])

    def test_ctrl_c_leaves_no_traceback(self) -> None:
        self.azure.script("goalstate", [], forever=Status(503))
        process = popen([sys.executable, str(SCRIPT), *self.endpoints], self.machine())
        self.azure.wait_for("goalstate", 2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors), (-signal.SIGINT, ""))


class PlatformTest(ScriptTest):
    def on_platform(self, *arguments: str, tag: Optional[str], uid: int = 0) -> Run:
        """Run the script as UID on a machine with a chassis asset TAG, against the platform."""
        self.ran_on = self.machine()
        file = self.ran_on.root / "tag"
        if tag is not None:
            file.write_text(tag)
        return self.provision(
            *arguments,
            machine=self.ran_on,
            endpoints=False,
            uid=uid,
            CHASSIS_ASSET_TAG_FILE=str(file),
            WIRESERVER=self.azure.wireserver,
            IMDS=self.azure.imds,
        )

    def test_another_platform_is_left_alone(self) -> None:
        for tag, shown in (("Amazon EC2\n", "Amazon EC2"), ("", ""), ("a\nb\x1b", r"a\nb\x1b")):
            with self.subTest(tag):
                run = self.on_platform(tag=tag)
                self.assertEqual((run.status, len(run.lines)), (0, 1))
                self.assertIn(f'Not on Azure (the chassis asset tag is "{shown}")', run.output)
                self.assertEqual((self.ran_on.calls, self.azure.requests), ([], []))

    def test_azure_and_a_machine_without_a_tag_are_provisioned(self) -> None:
        for tag in ("7783-7084-3265-9085-8269-3286-77\n", None):
            with self.subTest(tag):
                run = self.on_platform(tag=tag)
                self.assertEqual(run.status, 0, run.output)
                self.assertEqual(len(self.ran_on.calls), 3)

    def test_without_root_nothing_is_sent_but_a_dry_run_works(self) -> None:
        run = self.on_platform(tag=None, uid=1000)
        self.assertEqual((run.status, len(run.lines)), (2, 1))
        self.assertIn("Not root", run.output)
        self.assertEqual((self.ran_on.calls, self.azure.requests), ([], []))
        self.assertEqual(self.on_platform("--dry-run", tag=None, uid=1000).status, 0)

    def test_naming_the_endpoints_skips_the_check(self) -> None:
        run = self.on_platform(*self.endpoints, tag="Amazon EC2\n", uid=1000)
        self.assertEqual((run.status, len(self.azure.requests)), (0, 3), run.output)
