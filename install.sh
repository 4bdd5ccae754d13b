#!/bin/sh
# Install azure_provision.py and its unit into an image: this machine, or the tree at DESTDIR.

set -eu

SCRIPT=azure_provision.py
UNIT=azure-provisioning.service

DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}
UNITDIR=${UNITDIR:-/etc/systemd/system}
PYTHON=${PYTHON:-/usr/bin/python3}
PATH=$PATH:/usr/sbin:/sbin # chroot is there, and not on everybody's PATH

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] ./install.sh [--no-enable | --uninstall | --help]

Install the first-boot provisioning of Azure VMs into this machine, or into the
tree of an image at DESTDIR. The unit is enabled and runs at the next boot; it
is never started here.

  --no-enable  install, but leave the unit disabled (for packages)
  --uninstall  remove all that an installation with the same variables made
  --help       show this

  DESTDIR  the root of the image                (this machine)
  PREFIX   the script goes to PREFIX/sbin       (/usr/local)
  UNITDIR  the unit goes there                  (/etc/systemd/system)
  PYTHON   the image's Python 3.6 or newer      (/usr/bin/python3)

Exit status: 0 done, 1 refused or failed, 2 usage.
EOF
}

die() {
    printf 'install.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

warn() {
    printf 'install.sh: warning: %s\n' "$1" >&2
}

# What the image calls PATH, as this machine calls it.
in_image() {
    printf '%s%s' "$DESTDIR" "$1"
}

# Run a program of the image; status 125 where that cannot be done here, as of chroot(1).
run_in_image() {
    if [ -n "$DESTDIR" ]; then
        command -v chroot >/dev/null 2>&1 || return 125
        chroot "$DESTDIR" "$@"
    else
        "$@"
    fi
}

check_variables() {
    for pair in "PREFIX=$PREFIX" "UNITDIR=$UNITDIR" "PYTHON=$PYTHON"; do
        case ${pair#*=} in
            /*) ;;
            *) die "${pair%%=*} is no absolute path: ${pair#*=}" ;;
        esac
        # systemd.syntax(7) and systemd.unit(5) give these a meaning; no path needs them.
        case ${pair#*=} in
            *[\"\'\\%\$]* | *[[:cntrl:]]*)
                die "${pair%%=*} has a character that a unit cannot take: ${pair#*=}" ;;
        esac
    done
    if [ -n "$DESTDIR" ]; then
        [ -d "$DESTDIR" ] || die "DESTDIR is no directory: $DESTDIR"
        DESTDIR=$(CDPATH='' cd -- "$DESTDIR" && pwd)
        DESTDIR=${DESTDIR%/}
    fi
    if [ -z "$DESTDIR" ] && [ "$(id -u)" -ne 0 ]; then
        die "not root: run it with sudo, or set DESTDIR"
    fi
}

# systemctl enables only what lies where systemd looks: systemd.unit(5).
check_unitdir() {
    case ${UNITDIR%/} in
        /etc/systemd/system | /usr/local/lib/systemd/system) ;;
        /usr/lib/systemd/system | /lib/systemd/system) ;;
        *) die "systemd does not look for units in UNITDIR, so --no-enable is needed: $UNITDIR" ;;
    esac
}

# Have the image's Python import what the script imports: Debian's python3-minimal cannot.
check_python() {
    if [ ! -e "$(in_image "$PYTHON")" ] && [ ! -L "$(in_image "$PYTHON")" ]; then
        die "the image has no $PYTHON: install python3 in it, or set PYTHON"
    fi
    status=0
    answer=$({
        echo 'import sys'
        echo 'if sys.version_info < (3, 6):'
        echo '    sys.exit("it is %d.%d, and 3.6 is the oldest that will do" % sys.version_info[:2])'
        sed -n -e 's/^ *\(import [a-z.]*\).*/\1/p' -e '/^from /p' "$SCRIPT"
    } | run_in_image "$PYTHON" -Es - 2>&1) || status=$?
    reason=$(printf '%s\n' "$answer" | tail -n 1)
    case ${DESTDIR:+image}$status in
        0 | image0) ;;
        image125 | image126) warn "cannot run the image's $PYTHON here, so it is not checked: $reason" ;;
        *) die "$PYTHON cannot run the script: $reason" ;;
    esac
}

# Two agents would both report to Azure.
check_agents() {
    for agent in cloud-init waagent azure-init; do
        for directory in /usr/bin /usr/sbin /usr/local/bin /usr/local/sbin; do
            if [ -e "$(in_image "$directory/$agent")" ]; then
                warn "the image has $directory/$agent, which provisions too: remove it, or disable its units"
                break
            fi
        done
    done
}

# A path as a word of a unit's command line: systemd.service(5).
quoted() {
    case $1 in
        *\ *) printf '"%s"' "$1" ;;
        *) printf '%s' "$1" ;;
    esac
}

# The unit with this image's interpreter and script; all else is as in the repository.
image_unit() {
    while IFS= read -r line; do
        case $line in
            ExecStart=*)
                options=${line#"ExecStart=/usr/bin/python3"}
                options=${options%"/usr/local/sbin/$SCRIPT"}
                printf 'ExecStart=%s%s%s\n' \
                    "$(quoted "$PYTHON")" "$options" "$(quoted "$PREFIX/sbin/$SCRIPT")"
                ;;
            *) printf '%s\n' "$line" ;;
        esac
    done <"$UNIT"
}

make_directory() {
    [ -d "$1" ] || install -d -m 0755 "$1"
}

have_systemctl() {
    command -v systemctl >/dev/null 2>&1
}

link() {
    in_image "/etc/systemd/system/multi-user.target.wants/$UNIT"
}

enable_unit() {
    if ! have_systemctl; then
        make_directory "$(dirname "$(link)")"
        ln -sf "$UNITDIR/$UNIT" "$(link)"
    elif [ -n "$DESTDIR" ]; then
        systemctl --quiet --root="$DESTDIR" enable "$UNIT"
    else
        systemctl --quiet enable "$UNIT"
    fi
}

install_files() {
    rendered=$(mktemp)
    trap 'rm -f "$rendered"' EXIT
    image_unit >"$rendered"
    make_directory "$(in_image "$PREFIX/sbin")"
    make_directory "$(in_image "$UNITDIR")"
    install -m 0755 "$SCRIPT" "$(in_image "$PREFIX/sbin/$SCRIPT")"
    install -m 0644 "$rendered" "$(in_image "$UNITDIR/$UNIT")"
}

uninstall() {
    rm -f "$(link)" "$(in_image "$UNITDIR/$UNIT")" "$(in_image "$PREFIX/sbin/$SCRIPT")"
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
    echo "Removed $PREFIX/sbin/$SCRIPT and $UNITDIR/$UNIT from ${DESTDIR:-this machine}."
}

action=install
enable=yes
for argument in "$@"; do
    case $argument in
        --no-enable) enable=no ;;
        --uninstall) action=uninstall ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) die "not an option: $argument (see --help)" 2 ;;
    esac
done

check_variables
cd -- "$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)"
if [ "$action" = uninstall ]; then
    uninstall
    exit 0
fi
[ "$enable" = no ] || check_unitdir
check_python
check_agents
install_files
[ "$enable" = no ] || enable_unit
cat <<EOF
Installed in ${DESTDIR:-this machine}: $PREFIX/sbin/$SCRIPT
and $UNITDIR/$UNIT, $([ "$enable" = no ] && echo "not enabled" || echo "enabled for the next boot").
Before the image is captured: remove any other agent, the users, keys and logs that are not to be
in every VM, /etc/ssh/ssh_host_*, and empty /etc/machine-id. A VM that was provisioned has disabled
the unit: run install.sh again before that VM is captured.
EOF
