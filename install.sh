#!/bin/sh
# Install azure_provision.py and its unit into an image: this machine, or the tree at DESTDIR.

set -eu
umask 022
export LC_ALL=C "PATH=/usr/sbin:/usr/bin:/sbin:/bin${PATH:+:$PATH}" # the system's tools first
SCRIPT=azure_provision.py UNIT=azure-provisioning.service
DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}
PYTHON=${PYTHON:-/usr/bin/python3}

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] ./install.sh [--no-enable | --uninstall | --help]
Install the provisioning of Azure VMs. It runs at the next boot, not now.

  --no-enable  leave the unit disabled: no link, and a preset that keeps it so
  --uninstall  remove everything that an installation with the same PREFIX made

  DESTDIR  the root directory of the image   (this machine)
  PREFIX   the script goes to PREFIX/sbin    (/usr/local)
  PYTHON   the image's Python 3.6 or newer   (/usr/bin/python3)
Exit status: 0 done, 1 refused or failed, 2 usage.
EOF
}

die() {
    printf 'install.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

check_variables() {
    for value in "$PREFIX" "$PYTHON"; do
        case $value/ in
            *[!A-Za-z0-9/._+-]*) die "PREFIX and PYTHON can have letters, digits and /._+- only" ;;
            [!/]* | */../*) die "not an absolute path without '..': $value" ;;
            /home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*)
                die "$value is hidden from the unit, or cleaned at boot: use another directory" ;;
        esac
    done
    PREFIX=${PREFIX%/}
    if [ -n "$DESTDIR" ]; then
        case $DESTDIR in *[[:cntrl:]]*) die "DESTDIR has a control character" ;; esac
        [ -d "$DESTDIR" ] || die \
            "DESTDIR is not a directory; for a disk image: systemd-dissect --mount $DESTDIR /mnt"
        DESTDIR=$(readlink -f -- "$DESTDIR")
        DESTDIR=${DESTDIR%/} # empty for / itself
    fi
    [ -n "$DESTDIR" ] || [ "$(id -u)" -eq 0 ] || die "not root: run it with sudo, or set DESTDIR"
    script=$DESTDIR$PREFIX/sbin/$SCRIPT
    unit=$DESTDIR/etc/systemd/system/$UNIT
    # before a distribution's "disable *": systemd.preset(5)
    preset=$DESTDIR/etc/systemd/system-preset/20-azure-provisioning.preset
    link=$DESTDIR/etc/systemd/system/multi-user.target.wants/$UNIT
}

# Refuse to follow a symlink out of DESTDIR: in a VM it leads elsewhere.
check_targets() {
    for file in "$script" "$unit" "$preset" "$link"; do
        [ ! -d "$file" ] || die "$file is a directory"
        directory=${file%/*}
        # an absolute link inside DESTDIR leads out of it here
        until [ -d "$directory/" ] || [ -d "$DESTDIR$(readlink "$directory" || echo /-)" ]; do
            [ ! -L "$directory" ] ||
                die "$directory is a link to nothing: create its target, or set PREFIX=/usr"
            directory=${directory%/*}
        done
        case $(readlink -f -- "$directory/")/ in
            "$DESTDIR"/*) ;;
            *) die "$directory leads out of DESTDIR through a symlink (for /usr/local: set PREFIX=/usr)" ;;
        esac
    done
}

check_systemd() {
    [ -e "$DESTDIR/usr/lib/systemd/systemd" ] || [ -e "$DESTDIR/lib/systemd/systemd" ] ||
        die "there is no systemd in ${DESTDIR:-/}"
    case $(readlink "$unit" || [ ! -e "$unit" ] || [ -s "$unit" ] || echo /dev/null) in
        */dev/null) die "the unit is masked: delete $unit" ;;
    esac
}

# Run by the image's Python, with the script on its standard input. The unit's sandbox hides home
# directories; whatever lies in /tmp may be gone at the next boot.
PROBE='
import os, sys
files = sys.argv[1:] + [sys.executable]
sys.argv = ["azure_provision.py", "--version"]
try:
    exec(compile(sys.stdin.buffer.read(), sys.argv[0], "exec"), {"__name__": "__main__"})
except SystemExit as end:
    if end.code: raise
sys.stdout.flush()
files += [module.__file__ for module in list(sys.modules.values()) if hasattr(module, "__file__")]
for file in filter(None, files):
    for hidden in "/home", "/root", "/run/user", "/tmp", "/var/tmp":
        if os.path.realpath(file).startswith(os.path.realpath(hidden) + "/"):
            sys.exit(file + " is under " + hidden + ": hidden from the unit, or cleaned at boot")
print("fit")'

check_python() {
    set -- "$PYTHON" -I -S -B -c "$PROBE" "$PYTHON" "$PREFIX/sbin/$SCRIPT"
    [ -z "$DESTDIR" ] || set -- chroot "$DESTDIR" "$@"
    answer=$("$@" 2>&1 <"$here/$SCRIPT") && status=0 || status=$?
    answer=$(printf '%s\n' "$answer" | tail -n 1 | tr -d '[:cntrl:]')
    case ${DESTDIR:+tree}:$status:$answer in
        *:0:fit) ;;
        tree:12[56]:* | tree:1:chroot:*) # chroot is not permitted, or it is another architecture
            printf 'install.sh: warning: %s\n' \
                "$PYTHON cannot run here, so it was not checked: $answer" >&2 ;;
        *) die "$PYTHON cannot run the script, which needs all of Python 3.6 or newer: $answer" ;;
    esac
}

remove_new() { rm -f "$@" "$script.new" "$unit.new" "$preset.new" "$link.new"; }
# All files are complete before the first gets its name, and what enables the unit comes last: no
# VM runs a part of this, wherever it fails.
install_files() {
    trap 'remove_new; die "failed"' EXIT
    trap 'exit 1' HUP INT QUIT TERM
    remove_new # or a link there would be followed
    mkdir -p "${script%/*}" "${unit%/*}" "${preset%/*}" "${link%/*}"
    cp "$here/$SCRIPT" "$script.new"
    chmod 0755 "$script.new"
    sed -e "/^ExecStart=/s|/usr/bin/python3|$PYTHON|" \
        -e "/^ExecStart=/s|/usr/local/sbin|$PREFIX/sbin|" "$here/$UNIT" >"$unit.new"
    echo "$enable $UNIT" >"$preset.new" # or an image's first boot may enable all units
    ln -s "/etc/systemd/system/$UNIT" "$link.new"
    rm -f "$link" "$preset"
    mv -f "$script.new" "$script"
    mv -f "$unit.new" "$unit"
    mv -f "$preset.new" "$preset"
    if [ "$enable" = enable ]; then mv -f "$link.new" "$link"; else rm -f "$link.new"; fi
    trap - EXIT HUP INT QUIT TERM
}

enable=enable uninstall=no
case $#:${1:-} in
    0:) ;;
    1:--no-enable) enable=disable ;;
    1:--uninstall) uninstall=yes ;;
    1:--help | 1:-h) usage && exit ;;
    *) die "one option at most, and not: $* (see --help)" 2 ;;
esac
case $(readlink -f -- "$0") in */install.sh) ;; *) die "run it as ./install.sh (see --help)" 2 ;; esac
here=$(dirname -- "$(readlink -f -- "$0")")
check_variables
check_targets
if [ "$uninstall" = yes ]; then
    remove_new "$link" "$preset" "$unit" "$script"
    next="Removed $script and $unit."
else
    check_systemd
    check_python
    install_files
    next="Installed $script and $unit. Now look at the image, in $here:
python3 -m tests.check $(printf %s "$DESTDIR" | sed "s/'/'\\\\''/g; s/.*[^A-Za-z0-9/._+-].*/'&'/")"
fi
[ -n "$DESTDIR" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
printf '%s\n' "$next"
