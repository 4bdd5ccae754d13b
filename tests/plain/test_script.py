"""The first boot as one run of the script: the steps, their order, and what each one logs."""

import html
import io
import json
import os
import select
import signal
import sys
from typing import Any, List, Tuple, Union
from xml.etree import ElementTree

from tests.fake_azure import (
    GOAL_STATE,
    OK_LINE,
    Answer,
    Chunked,
    Raw,
    Request,
    Silence,
    Status,
    Text,
)
from tests.plain.harness import SCRIPT, ScriptTest, popen, start_script

MIB = 1024 * 1024  # the longest body that is accepted
SLEEP = "/bin/sleep 600"
SET, FSYNC = "hostnamectl set-hostname web-prod-01", "fsync hostname"
DISABLE = "systemctl disable --no-reload azure-provisioning.service"


def compute(computer_name: str, name: str = "vm") -> str:
    """The compute metadata of a VM."""
    return json.dumps({"name": name, "osProfile": {"computerName": computer_name}})


class FirstBootTest(ScriptTest):
    def test_steps_run_in_order(self) -> None:
        machine = self.machine()
        run = self.provision(machine=machine)
        self.assertEqual((run.status, run.errors), (0, ""))
        self.assertTrue(self.azure.ready.is_set())
        self.assertEqual(machine.calls, [SET, FSYNC, DISABLE])
        steps = [
            f"^ContainerId: {self.azure.container_id}$",
            f"^InstanceId: {self.azure.instance_id}$",
            "<Health><GoalStateIncarnation>1<.*<State>Ready</State>.*</Health>$",
            "^Response: 200 OK$",
            r"^Hostname: web-prod-01 \(computerName\)$",
            "^Hostname set by hostnamectl$",
            "^Hostname not published: ",
            "^azure-provisioning.service disabled$",
            r"^Provisioned as web-prod-01 in \d+\.\d\d s$",
        ]
        self.assertRegex(run.output, "(?ms)" + ".*".join(steps))
        self.assertEqual(len(run.lines), len(steps))

    def test_requests_are_those_of_the_platform(self) -> None:
        self.azure.incarnation = "7"
        self.provision()
        report = (
            "<Health><GoalStateIncarnation>7</GoalStateIncarnation><Container>"
            f"<ContainerId>{self.azure.container_id}</ContainerId><RoleInstanceList><Role>"
            f"<InstanceId>{self.azure.instance_id}</InstanceId>"
            "<Health><State>Ready</State></Health></Role></RoleInstanceList></Container></Health>"
        )
        wireserver = {"x-ms-version": "2012-11-30", "x-ms-agent-name": "custom-provisioning"}
        post_headers = {"Content-Type": "text/xml;charset=utf-8", **wireserver}
        compute_path = "/metadata/instance/compute?api-version=2021-02-01"
        self.assertEqual(len(self.azure.requests), 3)
        for request, (method, path, headers, body) in zip(
            self.azure.requests,
            (
                ("GET", "/machine?comp=goalstate", wireserver, ""),
                ("POST", "/machine?comp=health", post_headers, report),
                ("GET", compute_path, {"Metadata": "true"}, ""),
            ),
        ):
            sent = (request.method, request.path, request.body.decode())
            self.assertEqual(sent, (method, path, body))
            self.assertEqual(request.headers, {**request.headers, **headers, "Connection": "close"})

    def test_unusual_answers_of_the_wireserver_are_understood_at_once(self) -> None:
        usual = self.azure.goal_state()
        incarnation = "<Incarnation>1</Incarnation>"  # the default, too
        second = "<RoleInstance><InstanceId>second</InstanceId></RoleInstance></RoleInstanceList>"
        unusual: List[Answer] = [
            Text(usual.replace(incarnation, "")),
            Text(usual.replace(incarnation, "<Incarnation> </Incarnation>")),
            Text(usual.replace("</RoleInstanceList>", second)),
            Text(usual.replace('"utf-8"', '"utf-16"')),
            Chunked("\ufeff" + usual),
            Raw(OK_LINE + b"\r\n" + usual.encode()),
        ]
        cases = [("goalstate", answer, "200 OK") for answer in unusual]
        cases += [("health", Status(status), str(status)) for status in (201, 204, 299)]
        for resource, answer, response in cases:
            with self.subTest(vars(answer)):
                self.azure.requests.clear()
                self.azure.script(resource, [answer])
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
        self.assertEqual(len(self.azure.asked("compute")), requests)

    def test_old_imds_gives_the_vm_name(self) -> None:
        self.azure.newest_version = "2019-06-01"
        self.assert_hostname("web-prod-01-vm", requests=3)
        versions = [request.path.split("=")[1] for request in self.azure.asked("compute")]
        self.assertEqual(versions, ["2021-02-01", "2021-02-01", "2019-06-01"])

    def test_faults_are_retried_and_do_not_end_in_the_vm_name(self) -> None:
        bodies: List[Union[str, bytes]] = ["", "[]", "{}", "[" * 100000, '{"name": {"web": 1}}']
        bodies += [compute("web")[:-1], compute("web").encode("utf-16"), '{"osProfile": "web"}']
        bodies += ['{"osProfile": {"computerName": 7}, "name": "web"}']
        cases: List[List[Answer]] = [[Text(body)] for body in bodies]
        for statuses in ([400], [404, 404], [404, 410, 429, 500, 503]):
            cases.append([Status(status) for status in statuses])
        for answers in cases:
            with self.subTest(getattr(answers[0], "body", b"")[:60] or len(answers)):
                self.azure.script("compute", answers)
                self.assert_hostname("web-prod-01", requests=len(answers) + 1)

    def test_valid_metadata_is_understood_at_once(self) -> None:
        web = compute("web")
        cases: List[Tuple[Answer, str]] = [
            (Text(compute("myset000000", name="myset_0")), "myset000000"),  # in a scale set
            (Chunked("\ufeff" + web), "web"),
            (Raw(OK_LINE + b"Content-Length: %d \r\n\r\n" % len(web) + web.encode()), "web"),
            (Text(compute("\r\n\t web \r\n")), "web"),
            (Text(web.ljust(MIB)), "web"),
            (Chunked(web.ljust(MIB)), "web"),
            (Text('{"name": "web", "x": %s}' % ("9" * 1000000)), "web"),
        ]
        for profile in (None, {}, {"computerName": None}, {"computerName": " \r\n\t"}):
            cases.append((Text(json.dumps({"name": "vm", "osProfile": profile})), "vm"))
        for name in ("7", "Web-PROD", "a--b", "web.example.com", "x" * 63, "x" * 32 + ".y" * 16):
            cases.append((Text(compute(name)), name))
        for answer, name in cases:
            with self.subTest(name, answer=getattr(answer, "body", b"")[:90]):
                self.azure.script("compute", [answer])
                self.assert_hostname(name)

    def test_invalid_names_are_final_and_change_nothing(self) -> None:
        machine = self.machine()
        plain = ["myset_0", "-web", "web-", ".web", "web.", "a..b", "a.-b", "a-.b", "web prod"]
        plain += ["--help", "$(reboot)", "x" * 64, "x" * 32 + "." + "y" * 32]
        names = {  # and how they are logged
            **dict(zip(plain, plain)),
            "web\r\n<3>forged": r"web\r\n<3>forged",
            "x" * 5000: "x" * 97 + "...",
            "w\u00e9b": r"w\xe9b",
            "\ud800": r"\ud800",
        }
        for name, shown in names.items():
            with self.subTest(name):
                self.azure.requests.clear()
                self.azure.ready.clear()
                self.azure.computer_name = name
                run = self.provision(machine=machine)
                self.assertEqual((run.status, machine.calls), (1, []))
                self.assertTrue(self.azure.ready.is_set(), "Ready was not posted before")
                self.assertEqual(len(self.azure.asked("compute")), 1, "tried again")
                self.assertEqual(machine.hostname_file.read_text(), "localhost\n")
                reason = f"The computerName in IMDS is not a valid hostname: {shown}; the next boot"
                self.assertEqual(run.lines[4:], [f"Not provisioned: {reason} tries again"])


class MachineTest(ScriptTest):
    def test_failing_hostnamectl_leaves_it_to_the_kernel_and_the_file(self) -> None:
        timed_out = "timed out after 0 s"
        for tools, reason in (
            ({}, "No such file or directory"),
            ({"hostnamectl": "echo Failed to connect to bus >&2; exit 1"}, "Failed to connect"),
            ({"hostnamectl": "kill $$"}, "status -15"),
            ({"hostnamectl": r"printf 'no\n<0>forged\033[2J\377'; exit 1"}, r"no\n<0>forged\x1b"),
            ({"hostnamectl": f"{SLEEP} & exit 0"}, timed_out),
            ({"hostnamectl": f"/usr/bin/setsid /bin/sleep 8 & {SLEEP}"}, timed_out),
            ({"hostnamectl": "while :; do echo; done"}, "printed more than 65536 bytes"),
            # Variables that would change what a tool prints are not passed on.
            ({"hostnamectl": 'echo "$SYSTEMD_COLORS,$LC_ALL,$HOME"; exit 1'}, ",C,; "),
        ):
            with self.subTest(tools):
                machine = self.machine(systemctl="", **tools)
                limit = 0.2 if reason == timed_out else 30
                environment = {"SYSTEMD_COLORS": "1", "LC_ALL": "de_DE.UTF-8", "HOME": "/"}
                run = self.provision(
                    machine=machine, COMMAND_TIMEOUT=limit, environment=environment
                )
                self.assertEqual(run.status, 0, run.output)
                self.assertIn(f"\nhostnamectl: {reason}", run.output)
                self.assertIn("; setting the hostname without hostnamectl\n", run.output)
                self.assertEqual(machine.hostname_file.read_text(), "web-prod-01\n")
                self.assertEqual(machine.calls[-3:], ["sethostname web-prod-01", FSYNC, DISABLE])

    def test_hostnamectl_that_hangs_is_killed_with_its_children(self) -> None:
        machine = self.machine(hostnamectl=f'exec 3>"$0.fifo"; {SLEEP} & {SLEEP}', systemctl="")
        fifo = str(machine.bin / "hostnamectl.fifo")
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        self.provision(machine=machine, COMMAND_TIMEOUT=0.5)
        poll = select.poll()
        poll.register(reader, 0)
        self.assertTrue(poll.poll(5000), "a child still has the FIFO open")

    def test_name_that_cannot_be_stored_leaves_the_unit_enabled(self) -> None:
        directory = self.machine().root
        fifo = directory / "fifo"
        os.mkfifo(str(fifo))
        for file in ("/dev/null", "/dev/full", directory, fifo):
            with self.subTest(file=file):
                machine = self.machine(hostnamectl="exit 1", systemctl="")
                run = self.provision(machine=machine, HOSTNAME_FILE=str(file), journal=True)
                self.assertEqual(run.status, 0, run.output)
                self.assertNotIn("systemctl", " ".join(machine.calls))
                self.assertRegex(run.output, f"(?m)^<4>{file}: .*; .* stays enabled")

    def test_full_disk_keeps_the_old_name(self) -> None:
        class FullDisk(io.FileIO):
            def write(self, _: Any) -> int:
                raise OSError(28, "No space left on device")

        machine = self.machine()
        machine.hostname_file.write_text("golden-image.example.com\n")
        run = self.provision(machine=machine, open=FullDisk)
        self.assertEqual(machine.hostname_file.read_text(), "golden-image.example.com\n")
        self.assertRegex(run.output, "hostname: No space left on device; .* stays enabled")

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


class OutputTest(ScriptTest):
    def test_lines_have_priorities_in_the_journal_alone(self) -> None:
        self.azure.script("goalstate", [Status(503)])
        self.azure.computer_name = "not_valid"
        run = self.provision(journal=True)
        for line in run.lines:
            self.assertRegex(line, r"^<[3-6]>\S")
        self.assertRegex(run.output, "(?m)^<6>ContainerId: ")
        self.assertRegex(run.output, "(?m)^<4>.*503 Service Unavailable; retrying for up to")
        self.assertRegex(run.output, "(?m)^<3>Not provisioned: ")
        run = self.provision(environment={"JOURNAL_STREAM": "8:12345"})  # inherited from elsewhere
        self.assertNotRegex(run.output, "(?m)^<[0-9]>")

    def test_goal_state_that_moves_on_is_logged_and_reported_anew(self) -> None:
        first = self.azure.container_id
        self.azure.script("health", [Status(500), Status(503), Status(410)])

        def move_on(request: Request) -> None:
            if request.status == 503:
                self.azure.container_id = "another"
            if request.status == 410:
                self.azure.incarnation = "2"

        self.azure.on_request = move_on
        output = self.provision().output
        lines = [f"^ContainerId: {first}$", "^InstanceId:", " 500 ", " 503 "]
        lines += ["^ContainerId: another$", " 410 ", "<GoalStateIncarnation>2<", "^Response: 200"]
        self.assertRegex(output, "(?ms)" + ".*".join(lines))
        self.assertEqual(output.count("ContainerId: "), 2)

    def test_ids_that_always_change_are_logged_ten_times_at_most(self) -> None:
        def change(request: Request) -> None:
            self.azure.container_id = str(len(self.azure.requests))

        self.azure.on_request = change
        self.azure.script("health", [Status(500)] * 20)
        self.assertEqual(self.provision(READY_LIMIT=30).output.count("ContainerId: "), 10)

    def test_long_and_hostile_ids_are_escaped_and_stay_one_short_line_each(self) -> None:
        hostile = "id\n&lt;3>forged&amp;\u2028\x85" + "x" * 100000
        goal_state = GOAL_STATE.format(
            version="", incarnation=hostile, container_id=hostile, instance_id=hostile
        )
        self.azure.script("goalstate", [Text(goal_state)])
        self.azure.script("health", [Status(200)])
        run = self.provision()
        report = ElementTree.fromstring(self.azure.asked("health")[0].body.decode("utf-8"))
        self.assertEqual(report.findtext("Container/ContainerId"), html.unescape(hostile))
        self.assertEqual((run.status, len(run.lines)), (0, 9), run.output)
        self.assertLess(max(len(line) for line in run.lines), 1100)
        self.assertNotRegex(run.output, "(?m)^<3>")


class ProcessTest(ScriptTest):
    """What only a process of its own shows."""

    def assert_dry_run(self, *command: str) -> str:
        """COMMAND, a dry run, succeeds; return its output."""
        path = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
        words = [*command, "--dry-run", *self.endpoints]
        process = popen(words, self.machine(), {"PATH": path})
        output, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors), (0, ""), output)
        return output

    def test_script_runs_as_a_program_even_if_its_standard_output_is_closed(self) -> None:
        self.assertIn("Hostname: web-prod-01", self.assert_dry_run(str(SCRIPT)))
        output = self.assert_dry_run("/bin/sh", "-c", '"$@" >&-', "sh", str(SCRIPT))
        self.assertEqual((output, len(self.azure.requests)), ("", 4))

    def test_signal_that_the_parent_blocked_does_not_hide_a_timeout(self) -> None:
        self.azure.script("goalstate", [Silence()])
        impatient = (
            "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); "
            "text = open(sys.argv[1]).read(); "
            "text = text.replace('RESPONSE_TIMEOUT = 10', 'RESPONSE_TIMEOUT = 0.3'); "
            "sys.argv[:2] = ['script']; exec(compile(text, 'script', 'exec'))"
        )
        output = self.assert_dry_run(sys.executable, "-I", "-c", impatient, str(SCRIPT))
        self.assertIn("timed out after 0 s", output)

    def test_ssl_is_not_loaded(self) -> None:
        self.assertIsNone(sys.modules["ssl"])

    def test_each_line_is_flushed_and_a_reader_that_goes_away_does_not_stop_the_run(self) -> None:
        machine = self.machine()
        self.azure.script("compute", [Status(404)] * 15)
        with start_script(machine, *self.endpoints) as process:
            assert process.stdout is not None and process.stderr is not None
            while not process.stdout.readline().startswith("Response: 200"):
                self.assertIsNone(process.poll())
            self.assertLess(len(self.azure.asked("compute")), 15, "not flushed")
            process.stdout.close()
            self.azure.script("compute", [])
            self.assertEqual((process.wait(30), process.stderr.read()), (0, ""))
        self.assertEqual(len(machine.calls), 3)

    def test_ctrl_c_leaves_no_traceback(self) -> None:
        self.azure.script("goalstate", [], forever=Status(503))
        process = popen([sys.executable, str(SCRIPT), *self.endpoints], self.machine())
        self.azure.wait_for("goalstate", 2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        self.assertEqual((process.returncode, errors), (-signal.SIGINT, ""))


class CommandLineTest(ScriptTest):
    def test_dry_run_waits_and_shows_all_and_touches_nothing(self) -> None:
        machine = self.machine()
        self.azure.script("goalstate", [Status(500)])
        run = self.provision("--dry-run", machine=machine)
        self.assertEqual((run.status, machine.calls), (0, []))
        self.assertEqual([r.method for r in self.azure.requests], ["GET"] * 3)
        self.assertIn(f"<ContainerId>{self.azure.container_id}</ContainerId>", run.output)
        self.assertIn("Hostname: web-prod-01 (", run.output)
        self.assertRegex(run.lines[-1], "^Dry run: nothing was posted, nothing was changed")
        self.azure.computer_name = "not_valid"
        self.assertEqual(self.provision("--dry-run").status, 1)

    def test_version_is_that_of_the_script_and_help_names_every_option(self) -> None:
        version, usage = self.provision("--version"), self.provision("--help")
        for run in (version, usage):
            self.assertEqual((run.status, run.errors), (0, ""))
        self.assertRegex(version.output, r"^azure_provision.py \d+\.\d+\.\d+\n$")
        for option in ("--wireserver", "--imds", "--dry-run", "--version", "--help"):
            self.assertIn(option, usage.output)

    def test_usage_errors_are_status_2_and_one_clear_line(self) -> None:
        both = "give both --wireserver and --imds, or neither$"
        cases = [
            (["--imds", "a b"], "argument --imds: invalid endpoint value"),
            (["--wireserver", self.azure.wireserver], both),
            (["--imds", self.azure.imds], both),
            (["--no-such-option"], "unrecognized arguments: --no-such-option"),
            (["--dry"], "unrecognized arguments: --dry"),
        ]
        for text in ("", "a b", "http://169.254.169.254", "::1", "a:http", "a:0", "a:65536"):
            cases.append((["--wireserver", text], "argument --wireserver: invalid endpoint value"))
        for arguments, reason in cases:
            with self.subTest(arguments):
                run = self.provision(*arguments, endpoints=False)
                self.assertEqual((run.status, run.output), (2, ""))
                last = run.errors.splitlines()[-1]
                self.assertRegex(last, f"^azure_provision.py: error: .*{reason}")
        self.assertEqual(self.azure.requests, [])


class PlatformTest(ScriptTest):
    def test_only_root_on_azure_is_provisioned_unless_the_endpoints_are_named(self) -> None:
        azure = "7783-7084-3265-9085-8269-3286-77\n"
        other = 'Not on Azure (the chassis asset tag is "{}"): nothing to do'.format
        for tag, arguments, uid, status, requests, last in (
            ("Amazon EC2\n", [], 0, 0, 0, other("Amazon EC2")),
            ("", [], 0, 0, 0, other("")),
            ("a\nb\x1b", [], 0, 0, 0, other(r"a\nb\x1b")),
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
                    machine.tag_file.write_text(tag)
                run = self.provision(*arguments, endpoints=False, machine=machine, uid=uid)
                self.assertEqual((run.status, len(self.azure.requests)), (status, requests))
                self.assertEqual(len(machine.calls), 3 if requests == 3 else 0)
                self.assertTrue(run.lines[-1].startswith(last), run.output)
                self.assertTrue(requests or len(run.lines) == 1, run.output)
