"""An image's files as its VMs will read them: symlinks, layers of configuration, units, presets.

Only regular files are read, nothing is run, and no link leads out of the tree.
"""

import os
import re
import shlex
import stat
from collections import deque
from fnmatch import fnmatchcase
from typing import Any, Deque, Dict, List, Optional, Set, Tuple

MAX_FILE = 4 << 20  # bytes; the largest are lists of modules
MAX_FILES = 9999
LAYERS = ("etc", "usr/local/lib", "usr/lib", "lib")  # the first that has a file wins

# Where a boot loader has the kernel's command line; the first group that does is used.
BOOT_LOADERS = (
    "boot/grub*/grub.cfg boot/grub*/grubenv boot/efi/EFI/*/grub.cfg boot/*linux/*linux.c* "
    "boot/loader/entries/*.conf boot/efi/loader/entries/*.conf efi/loader/entries/*.conf",
    "etc/kernel/cmdline usr/lib/kernel/cmdline",
    "etc/default/grub etc/default/grub.d/*.cfg",
)
COMMAND_LINE = (
    r"(?mi)^[ \t]*(?:linux\w*[ \t]+\S+|options|append|(?:set )?kernelopts="
    r"|GRUB_CMDLINE_LINUX\w*=)(.*)"
)
YAML_TOKEN = r"\"[^\"]*\"|'[^']*'|[{}\[\],]|:(?=\s|$)|(?:[^\s{}\[\],:]|:(?!\s|$))+"
Settings = Dict[str, List[str]]


def settings(text: str) -> Settings:
    """The values of each "Section.Name"; an empty one clears a list, as in systemd.syntax(7)."""
    found: Settings = {}
    section = ""
    for line in map(str.strip, text.replace("\\\n", " ").split("\n")):
        if line.startswith("["):
            section = line.strip("[]")
        elif line and line[0] not in "#;":
            name, _, value = line.partition("=")
            values = found.setdefault(f"{section}.{name.rstrip('+ ')}", [])
            values[:] = [*values, value.strip()] if value.strip() else []
    return found


def words(found: Settings, *names: str) -> List[str]:
    """All words of all values; NetworkManager separates them by semicolons or commas."""
    return [w for name in names for v in found.get(name, ()) for w in re.split(r"[\s;,]+", v) if w]


def last(found: Settings, *names: str) -> str:
    values = [value for name in names for value in found.get(name, ())]
    return values[-1] if values else ""


def variables(text: str) -> Dict[str, str]:
    """The variables of a file of shell assignments."""
    found = {}
    for line in text.split("\n"):
        try:
            name, _, value = "".join(shlex.split(line, comments=True)[:1]).partition("=")
        except ValueError:  # a quote that is not closed
            continue
        found[name] = value
    return found


def yaml(text: str) -> Any:
    """Netplan's subset of YAML: blocks get the brackets that flows have, and are then read."""
    tokens: Deque[str] = deque()
    levels: List[Tuple[int, str]] = [(-1, "")]  # indentation, and the bracket that ends it

    def begin(indentation: int, brackets: str) -> None:
        while levels[-1][0] > indentation:
            tokens.append(levels.pop()[1])
        if levels[-1][0] < indentation:
            levels.append((indentation, brackets[1]))
            tokens.append(brackets[0])

    depth = 0
    for line in text.split("\n"):
        body = re.sub(r"(^|\s)#.*", "", line).rstrip()
        indentation = 2 * (len(body) - len(body.lstrip()))
        body = body.strip()
        if not depth and body not in ("", "---"):
            while re.match(r"-(\s|$)", body):
                begin(indentation + 1, "[]")  # deeper than its key, which may be indented as much
                indentation += 2 * (len(body) - len(body[1:].lstrip()))
                body = body[1:].lstrip()
            if re.match(r"[^{\[]+?:(\s|$)", body):
                begin(indentation, "{}")
        found = re.findall(YAML_TOKEN, body)
        depth += sum((token in "{[") - (token in "}]") for token in found)
        tokens.extend(found)
    begin(-1, "")

    def value() -> Any:
        token = tokens.popleft()
        mapping: Dict[str, Any] = {}
        items: List[Any] = []
        while token == "[" and tokens[0] != "]":
            items += [value()] if tokens[0] != "," else tokens.popleft()[1:]
        while token == "{" and tokens[0] != "}":
            key = tokens.popleft().strip("\"'")
            if tokens[0] == ":":
                tokens.popleft()
                mapping[key] = value() if tokens[0] not in "}," else ""
        if token in "{[":
            tokens.popleft()
        return mapping if token == "{" else items if token == "[" else token.strip("\"'")

    try:
        return value()
    except (IndexError, RecursionError):
        return {}


class ImageFiles:
    """The files of an image, as a VM will find them; paths are those in the VM."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root).rstrip("/")
        # A chroot is a tree, too.
        self.live = not self.root and os.path.isdir("/run/systemd/system")
        self.unreadable: Set[str] = set()
        machine_id = self.read("/etc/machine-id").strip()
        self.first_boot = machine_id == "uninitialized" or not self.exists("/etc/machine-id")
        for patterns in BOOT_LOADERS:
            self.boot_loaders = [
                file for pattern in patterns.split() for file in self.list(pattern)
            ]
            lines = [(f, line) for f in self.boot_loaders for line in self.command_lines(f)]
            if lines:
                break
        self.boot_loaders = [file for file, _ in lines]
        self.command_line = " ".join(line for _, line in lines).split()
        rights = [w for w in (lines[0][1] if lines else "").split() if w in ("ro", "rw")]
        self.by_preset = self.start(presets=self.first_boot)
        read_only = rights[-1:] == ["ro"]
        self.started = self.start(presets=False) if read_only else self.by_preset

    def resolve(self, path: str) -> str:
        """PATH without symlinks, none of which leads out of the tree."""
        # Names may be no UTF-8, and this machine's locale may not be UTF-8.
        todo = os.fsdecode(path.encode("utf-8", "surrogateescape")).split("/")[::-1]
        done = ""
        links = 0
        while todo:
            name = todo.pop()
            here = f"{done}/{name}"
            if name == "..":
                done = os.path.dirname(done).rstrip("/")
            elif name not in ("", ".") and os.path.islink(self.root + here):
                target = os.readlink(self.root + here)
                links += 1
                if links > 40:
                    return "/a loop/of links"
                done = "" if target.startswith("/") else done
                todo += target.split("/")[::-1]
            elif name not in ("", "."):
                done = here
        return done or "/"

    def stat(self, path: str, follow: bool = True) -> int:
        """The mode of a file, 0 if there is none; notes a directory that cannot be read."""
        directory, name = os.path.split(path)
        here = self.resolve(path) if follow else f"{self.resolve(directory)}/{name}"
        try:
            return os.lstat(self.root + here).st_mode
        except PermissionError:
            self.unreadable.add(path)
        except OSError:
            pass
        return 0

    def exists(self, path: str) -> bool:
        """Whether there is such a name, if only of a link to nothing."""
        return self.stat(path, follow=False) != 0

    def read(self, path: str) -> str:
        """The text of a regular file; nothing of anything else: a FIFO would hang."""
        if not stat.S_ISREG(self.stat(path)):
            return ""
        try:
            with open(self.root + self.resolve(path), "rb") as file:
                text = file.read(MAX_FILE).decode("utf-8-sig", "replace")
        except OSError:
            self.unreadable.add(path)
            return ""
        return text.replace("\0", "")

    def list(self, pattern: str) -> List[str]:
        """The paths that match PATTERN, sorted."""
        found = [""]
        for part in pattern.strip("/").split("/"):
            names = self.names if "*" in part else lambda path, part=part: [part]
            found = [f"{path}/{n}" for path in found for n in names(path) if fnmatchcase(n, part)]
            del found[MAX_FILES:]  # links can form loops
        return [path for path in found if self.exists(path)]

    def names(self, directory: str) -> List[str]:
        """The names in a directory that are not hidden, sorted."""
        try:
            names = os.listdir(self.root + self.resolve(directory))
        except PermissionError:
            self.unreadable.add(directory)
        except OSError:
            pass
        else:
            return sorted(name for name in names if name[0] != ".")
        return []

    def layered(self, pattern: str) -> List[str]:
        """Configuration in the order of its names: /etc's hides a package's, and empty is none."""
        found: Dict[str, str] = {}
        for path in [path for base in LAYERS for path in self.list(f"{base}/{pattern}")]:
            found.setdefault(os.path.basename(path), path)
        return [path for _, path in sorted(found.items()) if self.read(path)]

    def text_of(self, file: str) -> str:
        """The text of a file without its comments."""
        lines = self.read(file).replace("\\\n", " ").split("\n")
        return "\n".join(line for line in lines if line.strip()[:1] not in ("#", ";"))

    def text(self, pattern: str) -> str:
        """The text of all configuration that matches, without comments."""
        return "\n".join(map(self.text_of, self.layered(pattern)))

    def command_lines(self, file: str) -> List[str]:
        text = self.read(file).replace('"', " ").replace("'", " ")
        lines: List[str] = [text] if file.endswith("/cmdline") else re.findall(COMMAND_LINE, text)
        return [line for line in lines if line.strip()]

    def unit_file(self, name: str) -> str:
        """The file that systemd reads for a unit, or for the template that it is made from."""
        names = (name, re.sub(r"@.*\.", "@.", name))
        paths = [f"/{base}/systemd/system/{n}" for n in names for base in LAYERS]
        return next((path for path in paths if self.exists(path)), "")

    def unit(self, name: str) -> Optional[Settings]:
        """A unit's settings with those of its drop-ins; None if it is masked or does not exist."""
        text = self.read(self.unit_file(name))
        return settings(f"{text}\n{self.text(f'systemd/system/{name}.d/*.conf')}") if text else None

    def start(self, presets: bool) -> Dict[str, Settings]:
        """What systemd starts at boot, by its names."""
        wanted: Dict[str, List[str]] = {}
        units = [path for base in LAYERS for path in self.list(f"{base}/systemd/system/*.*")]
        for path in units:
            if re.search(r"\.(wants|requires)$", path):
                names = map(os.path.basename, self.list(f"{path}/*"))
                wanted.setdefault(os.path.basename(path).rpartition(".")[0], []).extend(names)
        rules = [line.split() for line in self.text("systemd/system-preset/*.preset").split("\n")]
        for name in {os.path.basename(path) for path in units} if presets else ():
            chosen = [rule[0] for rule in rules if rule[1:] and fnmatchcase(name, rule[1])]
            unit = self.unit(name) if chosen[:1] in ([], ["enable"]) else None
            for target in words(unit or {}, "Install.WantedBy", "Install.RequiredBy"):
                wanted.setdefault(target, []).append(name)
        todo = ["multi-user.target", "default.target"]
        off = self.exists("/etc/cloud/cloud-init.disabled")
        if not off and "cloud-init=disabled" not in self.command_line:
            generator = self.layered("systemd/system-generators/cloud-init-generator")
            todo += ["cloud-init.target"] if generator else []
        started: Dict[str, Settings] = {}
        while todo:
            name = todo.pop()
            if not todo and name == "multi-user.target":  # all that default.target starts is known
                self.default_target = name in started
            unit = None if name in started else self.unit(name)
            if unit is not None:
                alias = os.path.basename(self.resolve(self.unit_file(name)))
                started[name] = started[alias] = unit
                todo += wanted.get(name, []) + wanted.get(alias, [])
                todo += words(unit, "Unit.Wants", "Unit.Requires", "Unit.BindsTo", "Socket.Service")
                if name.endswith((".socket", ".timer", ".path")):
                    todo.append(name.rpartition(".")[0] + ".service")
        return started

    def off(self, unit: str) -> str:
        """Why systemd does not start a unit; empty if it does."""
        if unit in self.started:
            return ""
        if self.exists(self.unit_file(unit)) and not self.read(self.unit_file(unit)):
            return f"{unit} is masked"
        if unit in self.by_preset:
            return f"only a preset enables {unit}, which a root that is mounted `ro` never applies"
        return f"{unit} is not enabled"

    def programs(self, unit: Settings) -> str:
        """What a unit runs: its commands, and the scripts that they name."""
        commands = (values for name, values in unit.items() if "Service.ExecStart" in name)
        text = "\n".join(command for values in commands for command in values)
        scripts = map(self.read, re.findall(r"(?:/[\w.+-]+)+", text))
        return "\n".join([text, *(script for script in scripts if script.startswith("#!"))])
