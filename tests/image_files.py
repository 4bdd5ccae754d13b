"""An image's files as its VMs will read them: symlinks, layers of configuration, units, presets.

Only regular files are read, nothing is run, and no link leads out of the tree.
"""

import contextlib
import os
import re
import stat
from fnmatch import fnmatchcase
from typing import Dict, Iterator, List, Optional, Set, Tuple

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
    r"(?mi)^[ \t]*(?:linux\w*[ \t]+(?!\S*memtest)\S+|options|append|(?:set )?kernelopts="
    r"|GRUB_CMDLINE_LINUX\w*=)(.*)"
)
YAML_TOKEN = r"(\"[^\"]*\"|'[^']*'|[{}]|(?:[^\s{}\[\],:]|:(?!\s|$))+)(\s*:(?=\s|$))?"
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
    return "".join([value for name in names for value in found.get(name, ())][-1:])


def yes(value: str) -> bool:
    return value.lower() in ("yes", "y", "true", "t", "on", "1")


def no(value: Optional[str]) -> bool:
    return (value or "").lower() in ("no", "n", "false", "f", "off", "0")


def variables(text: str) -> Dict[str, str]:
    """The variables of a file of shell assignments; none that matters here has a space."""
    return dict(re.findall(r"(?m)^[ \t]*([\w.]+)=[\"']?([^\s\"']*)", text))


def yaml(text: str) -> Settings:
    """The values of each "key/key/key" in netplan's subset of YAML, in blocks or in braces."""
    found: Settings = {}
    anchors: Dict[str, str] = {}  # &name: where it is
    keys: List[Tuple[int, str]] = []  # those around what is read, each with its depth
    braces = 0
    for line in text.split("\n"):
        for token in re.finditer(YAML_TOKEN, re.sub(r"(^|\s)#.*", "", line)):
            word = token.group(1).strip("\"'")
            braces += (word == "{") - (word == "}")
            if token.group(2):  # a key ends those that are as deep
                depth = 1000 * braces or token.start()
                keys = [*(key for key in keys if key[0] < depth), (depth, word)][:9]
            here = "/".join(key for _, key in keys)
            values = found.setdefault(here, [])
            kind = token.group(1)[0]
            if kind == "&":
                anchors[word[1:]] = here
            elif kind == "*" and len(found) < MAX_FILES:  # what is at its anchor is here, too
                anchor, here = anchors.get(word[1:], "/"), here.replace("/<<", "")
                for key in [k for k in found if f"{k}/".startswith(f"{anchor}/")]:
                    copied = found.setdefault(here + key[len(anchor) :], [])
                    copied += [value for value in found[key] if value not in copied]
            elif kind != "!" and not token.group(2) and word not in "{}-":
                values.append(word)
    return found


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
            lines = self.command_lines(patterns.split())
            if lines:
                break
        self.boot_loaders = lines
        self.command_line = " ".join(line for _, line in lines).split()
        first = " ".join(line for _, line in lines[:1])
        if first and patterns is BOOT_LOADERS[-1]:  # grub-mkconfig puts `ro` before both variables
            first = " ".join(["ro", *self.command_line])
        rights = [word for word in first.split() if word in ("ro", "rw")]
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

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Note PATH if it is there and cannot be read."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:
            self.unreadable.add(path)

    def stat(self, path: str, follow: bool = True) -> int:
        """The mode of a file, 0 if there is none."""
        directory, name = os.path.split(path)
        here = self.resolve(path) if follow else f"{self.resolve(directory)}/{name}"
        with self.reading(path):
            return os.lstat(self.root + here).st_mode
        return 0

    def exists(self, path: str) -> bool:
        """Whether there is such a name, if only of a link to nothing."""
        return self.stat(path, follow=False) != 0

    def read(self, path: str) -> str:
        """The text of a regular file; nothing of anything else: a FIFO would hang."""
        with self.reading(path):
            if stat.S_ISREG(self.stat(path)):
                with open(self.root + self.resolve(path), "rb") as file:
                    return file.read(MAX_FILE).decode("utf-8-sig", "replace").replace("\0", "")
        return ""

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
        with self.reading(directory):
            names = os.listdir(self.root + self.resolve(directory))
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

    def command_lines(self, patterns: List[str]) -> List[Tuple[str, str]]:
        """The kernel's command lines, each with the file that it is in."""
        found = []
        for file in (file for pattern in patterns for file in self.list(pattern)):
            text = self.read(file).replace('"', " ").replace("'", " ")
            lines = [text] if file.endswith("/cmdline") else re.findall(COMMAND_LINE, text)
            found += [(file, line) for line in lines if line.strip()]
        return found

    def systemd_version(self) -> int:
        """The version of systemd; 0 if it cannot be told."""
        places = ("lib", "usr/lib", "usr/lib64", "lib/*", "usr/lib/*")
        files = [f for p in places for f in self.list(f"{p}/systemd/libsystemd-shared-*.so")]
        return int((re.findall(r"-shared-(\d+)", " ".join(files)) or ["0"])[0])

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
        todo += ["rc-local.service"] if self.stat("/etc/rc.local") & 0o111 else []
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
        file = self.unit_file(unit)
        if file and not self.read(file):
            return f"{unit} is masked"
        if unit in self.by_preset:
            return f"only a preset enables {unit}, which a root that is mounted `ro` never applies"
        return f"{unit} is not enabled"

    def programs(self, unit: Settings) -> str:
        """What a unit runs: its commands, and the text of the scripts that they name."""
        text = "\n".join(c for name in unit if "Service.ExecStart" in name for c in unit[name])
        files = re.findall(r"(?:/[\w.+-]+)+", text)
        return "\n".join([text, *(self.text_of(f) for f in files if self.read(f)[:1] != "\x7f")])
