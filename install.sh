#!/bin/sh
# Install azure_provision.py and its unit into an image: this machine, or the tree at DESTDIR.
# shellcheck disable=SC2046,SC2048,SC2086 # lists of patterns are split and expanded on purpose

set -eu
umask 022

SCRIPT=azure_provision.py
UNIT=azure-provisioning.service
PRESET=20-azure-provisioning.preset # before a distribution's "disable *": systemd.preset(5)

DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}
UNITDIR=${UNITDIR:-/etc/systemd/system}
PYTHON=${PYTHON:-/usr/bin/python3}
PATH=$PATH:/usr/sbin:/sbin # for chroot, which is not on every user's PATH

usage() {
    cat <<EOF
usage: [VARIABLE=value ...] ./install.sh [--check | --no-enable | --uninstall | --help]

Install the first-boot provisioning of Azure VMs into this machine, or into the
tree of an image at DESTDIR. The unit is enabled and runs at the next boot; it
is never started here. Warns about whatever would make every VM of the image
fail, such as a network configuration that is bound to one MAC address.

  --check      only look for such problems; change nothing
  --no-enable  install neither link nor preset: the unit stays disabled (for packages)
  --uninstall  remove everything that an installation with the same variables made
  --help       show this

  DESTDIR  the root of the image                (this machine)
  PREFIX   the script goes to PREFIX/sbin       (/usr/local)
  UNITDIR  the unit goes there, and its preset
           to UNITDIR-preset                    (/etc/systemd/system)
  PYTHON   the image's Python 3.6 or newer      (/usr/bin/python3)

Exit status: 0 done, 1 refused or failed (--check: found a problem), 2 usage.
EOF
}

die() {
    printf 'install.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

# Whether one of the files exists, if only as a symlink. Sets $file to it.
exists() {
    for file in "$@"; do
        if [ -e "$file" ] || [ -L "$file" ]; then return 0; fi
    done
    return 1
}

# Follow the symlinks of PATH inside the image, as its VMs will. Sets $resolved to the real path,
# and $passed to all directories on the way, each between colons.
resolve() {
    todo=$1/ resolved='' passed=: links=0
    while [ -n "$todo" ]; do
        name=${todo%%/*}
        todo=${todo#*/}
        if [ -z "$name" ] || [ "$name" = . ]; then continue; fi
        if [ "$name" = .. ]; then
            resolved=${resolved%/*}
        elif [ -L "$DESTDIR$resolved/$name" ] && [ "$links" -lt 40 ]; then # or it is a loop
            links=$((links + 1))
            target=$(readlink "$DESTDIR$resolved/$name")
            case $target in /*) resolved='' ;; esac
            todo=$target/$todo
        else
            resolved=$resolved/$name
            passed=$passed$resolved:
        fi
    done
}

check_variables() {
    for pair in "PREFIX=$PREFIX" "UNITDIR=$UNITDIR" "PYTHON=$PYTHON"; do
        name=${pair%%=*} value=${pair#*=}
        case $value/ in
            [!/]*) die "$name is not an absolute path: $value" ;;
            */../*) die "$name must not contain '..': $value" ;;
            # special in a unit, as in systemd.syntax(7) and systemd.unit(5), or in sed
            *[\"\'\\%\$\&\|]* | *[[:cntrl:]]*)
                die "$name has a character that cannot be used in a unit: $value"
                ;;
        esac
    done
    PREFIX=${PREFIX%/} UNITDIR=${UNITDIR%/}
    [ -n "$UNITDIR" ] || die "UNITDIR must not be /"
    if [ -n "$DESTDIR" ]; then
        case $DESTDIR in *[[:cntrl:]]*) die "DESTDIR has a control character: $DESTDIR" ;; esac
        [ -d "$DESTDIR" ] || die "DESTDIR is not a directory: $DESTDIR"
        DESTDIR=$(CDPATH='' cd -- "$DESTDIR" && pwd -P)
        DESTDIR=${DESTDIR%/}
    fi
    [ -n "$DESTDIR" ] || [ "$(id -u)" -eq 0 ] ||
        die "not root: run it with sudo, or set DESTDIR"
    script=$PREFIX/sbin/$SCRIPT
    unit=$UNITDIR/$UNIT
    preset=$UNITDIR-preset/$PRESET
    link=/etc/systemd/system/multi-user.target.wants/$UNIT
}

# Refuse symlinks that lead out of DESTDIR on this machine: they lead elsewhere in a VM.
check_targets() {
    for file in "$script" "$unit" "$preset" "$link"; do
        [ ! -d "$DESTDIR$file" ] || die "$file is a directory"
        directory=${file%/*}
        until [ -z "$directory" ] || exists "$DESTDIR$directory"; do directory=${directory%/*}; done
        resolve "$directory"
        real=$(readlink -f "$DESTDIR${directory:-/}" || :)
        [ "${real%/}" = "$DESTDIR$resolved" ] ||
            die "$directory leads out of DESTDIR through a symlink: make the link relative"
        [ -d "$real" ] || die "$directory is not a directory"
    done
}

# The unit has ProtectHome=yes and PrivateTmp=yes.
check_sandbox() {
    for path in "$script" "$PYTHON"; do
        resolve "$path"
        directories=$passed
        for hidden in /home /root /run/user /tmp /var/tmp; do
            resolve "$hidden"
            case $directories in *":$resolved:"*)
                die "$path is under $hidden, which the unit's sandbox hides: use another directory"
            esac
        done
    done
}

# Refuse what keeps systemd from reading the unit: systemd.unit(5).
check_unit() {
    resolve "$UNITDIR"
    unitdir=$resolved
    for directory in /etc/systemd/system /usr/local/lib/systemd/system "$UNITDIR"; do
        resolve "$directory/$UNIT"
        if exists "$DESTDIR$directory/$UNIT" && [ ! -s "$DESTDIR$resolved" ]; then
            die "$directory/$UNIT masks the unit: delete it"
        fi
        resolve "$directory"
        [ "$resolved" != "$unitdir" ] || break
        ! exists "$DESTDIR$directory/$UNIT" ||
            die "$directory/$UNIT takes precedence over a unit in $UNITDIR: delete it"
    done
    case $UNITDIR in
        /etc/systemd/system | /usr/local/lib/systemd/system) ;;
        /usr/lib/systemd/system | /lib/systemd/system) ;;
        *) [ "$enable" = no ] ||
            die "systemd does not look for units in UNITDIR, so --no-enable is needed: $UNITDIR" ;;
    esac
}

# Have the image's Python import everything that the script imports, and write no bytecode.
check_python() {
    resolve "$PYTHON"
    { [ -f "$DESTDIR$resolved" ] && [ -x "$DESTDIR$resolved" ]; } ||
        die "the image has no program $PYTHON: install python3 in it, or set PYTHON"
    set -- "$PYTHON" -I -S -B - --version
    [ -z "$DESTDIR" ] || set -- chroot "$DESTDIR" "$@"
    status=0
    answer=$("$@" 2>&1 <"$here/$SCRIPT") || status=$?
    answer=$(printf '%s\n' "$answer" | tail -n 1)
    case $status:$answer in "0:$SCRIPT "*) return ;; esac
    # from chroot(1): it is not permitted, or the program is for another architecture
    if [ -n "$DESTDIR" ] && { [ "$status" -eq 125 ] || [ "$status" -eq 126 ]; }; then
        echo "install.sh: warning: cannot run the image's $PYTHON here, so it was not checked:" \
            "$answer" >&2
    else
        needs="Python 3.6 or newer and all of its library"
        die "$PYTHON cannot run the script, which needs $needs: $answer"
    fi
}

# What follows looks for what makes every VM of an image fail. It runs in the image's root directory
# and prints one line per problem: the file and the fix. Patterns are relative to these directories.
config() {
    set -f # in the subshell that every caller is
    for directory in etc usr/local/lib usr/lib lib; do
        [ "$directory" = lib ] && [ -L lib ] || printf "$directory/%s\n" $*
    done
}

NETPLAN='netplan/*.yaml'
NETWORKD='systemd/network/*.network systemd/network/*.d/*.conf'
NM_CONF='NetworkManager/*.conf NetworkManager/conf.d/*'
NM_PROFILES='NetworkManager/system-connections/*'
IFCFG='sysconfig/network-scripts/ifcfg-* sysconfig/network/ifcfg-*'
INTERFACES='network/interfaces network/interfaces.d/*'

# Print the files that have a setting that matches REGEX, in any case. Indentation is ignored; a
# setting in a section is matched as "[Section]Name=value".
files_with() {
    regex=$1
    shift
    for file in $(config "$@"); do
        resolve "$file"
        [ -f "$DESTDIR$resolved" ] || continue # a FIFO would hang
        # not grep -q: where SIGPIPE is ignored, as in a service, sed would complain
        if sed -E 's/^[[:space:]]+|[[:space:]]+$//g; /^\[/{ h; d; }; G; s/(.*)\n(.*)/\2\1/' \
            "$DESTDIR$resolved" | grep -Ei -e "$regex" >/dev/null; then echo "$file"; fi
    done
}

has() {
    [ -n "$(files_with "$@")" ]
}

# Whether a unit that matches PATTERN is masked: by a link to /dev/null, or an empty file.
masked() {
    for file in etc/systemd/system/$1; do
        if [ -e "$file" ] && [ ! -s "$file" ]; then return 0; fi
    done
    return 1
}

# machine-id(5): with an empty file it is not the first boot.
first_boot() {
    [ ! -e etc/machine-id ] || grep -qx uninitialized etc/machine-id
}

# Whether UNIT starts at boot: by a link, or by a preset that the first boot applies.
enabled() {
    for wanted in $(config "systemd/system/*.wants/$1" "systemd/system/*.requires/$1"); do
        if exists "$wanted" && ! masked "${wanted##*/}"; then return 0; fi
    done
    first_boot && has "^enable[[:space:]]+$1" 'systemd/system-preset/*.preset'
}

mac_addresses() {
    mac='[0-9a-f]{2}([:-][0-9a-f]{2}){5}'
    fix='match by name or driver, or delete it'
    {
        files_with "^[^#]*macaddress[\"']?[[:space:]]*:[[:space:]]*[\"']?$mac" "$NETPLAN"
        files_with '^\[(match|link)\](permanent)?macaddress[[:space:]]*=[[:space:]]*[0-9a-f]' \
            "$NETWORKD" 'systemd/network/*.link'
        files_with "^\[[^]]*\]([a-z0-9-]+\.)?(cloned-)?mac-address[[:space:]]*=[[:space:]]*$mac" \
            "$NM_CONF" "$NM_PROFILES"
        files_with "^(hwaddr|macaddr|lladdr)=[\"']?$mac" "$IFCFG"
        files_with "^(hwaddress|auto|allow-[a-z]+|iface|rename)[[:space:]].*$mac" "$INTERFACES"
        files_with "^[^#]*attrs?\{address\}==\"$mac\"" 'udev/rules.d/*.rules'
    } | sed "s|.*|/& is bound to a MAC address that no VM of the image has: $fix|"
}

dhcp_client() {
    dhcp='^\[network\]dhcp[[:space:]]*=[[:space:]]*(y|t|on|1|both|ipv4|v4)'
    dhcp4="^[^#]*dhcp4[\"']?[[:space:]]*:[[:space:]]*(true|yes|on)"
    bootproto="^bootproto=[\"']?dhcp"
    if enabled systemd-networkd.service &&
        files_with "$dhcp" "$NETWORKD" | grep -v /80-container- >/dev/null; then return; fi
    # netplan's generator enables systemd-networkd
    if exists $(config systemd/system-generators/netplan) && has "$dhcp4" "$NETPLAN"; then return; fi
    # NetworkManager asks on every interface unless told otherwise
    if enabled NetworkManager.service &&
        { ! has '^\[main\]no-auto-default[[:space:]]*=.*\*' "$NM_CONF" ||
            has '^\[ipv4\]method[[:space:]]*=[[:space:]]*auto' "$NM_PROFILES" ||
            has "$bootproto" "$IFCFG"; }; then return; fi
    if enabled networking.service && has '^iface.*inet[[:space:]]+dhcp' "$INTERFACES"; then return; fi
    # SUSE's wicked, and the init script of RHEL 7
    if { enabled wicked.service || exists etc/rc3.d/S*network; } &&
        has "$bootproto" "$IFCFG"; then return; fi
    for client in 'dhcpcd*' 'dhclient*' 'udhcpc*' connman; do
        if enabled "$client.service"; then return; fi
    done
    echo "no DHCP client is enabled and configured: enable one, for example systemd-networkd" \
        "with DHCP=yes in /etc/systemd/network/80-dhcp.network"
}

# Print a problem if the image has the program AGENT, which FIX turns off.
agent() {
    ! exists "usr/bin/$1" "usr/sbin/$1" "usr/local/bin/$1" "usr/local/sbin/$1" ||
        echo "/$file also reports to Azure: remove its package, or $2"
}

other_agents() {
    [ -e etc/cloud/cloud-init.disabled ] ||
        agent cloud-init 'touch /etc/cloud/cloud-init.disabled'
    masked 'wa*agent.service' || agent waagent 'mask its unit'
    masked azure-init.service || agent azure-init 'mask its unit'
    masked 'afterburn*checkin.service' || agent afterburn 'mask its checkin units'
}

host_keys() {
    # A live machine needs its keys until it is captured.
    if [ -n "$DESTDIR" ] && exists etc/ssh/ssh_host_*_key; then
        echo "/$file would be shared by all VMs: rm -f /etc/ssh/ssh_host_*"
    fi
    exists usr/sbin/sshd usr/bin/sshd || return 0
    keygen='(ssh-keygen|sshd-keygen|sshd-gen-keys|openssh-server)'
    makers=$(files_with "^([^#;=]*|\[service\]exec.*)$keygen" \
        'systemd/system/*.service' 'systemd/system/*.service.d/*.conf')
    if [ -z "$makers" ]; then
        echo "/$file has no host keys in a VM, as nothing creates them:" \
            "add a unit that runs ssh-keygen -A before it"
    elif ! first_boot && ! grep -L '^ConditionFirstBoot=yes' $makers | grep . >/dev/null; then
        echo "/${makers%%[[:space:]]*} creates SSH host keys only if /etc/machine-id is missing" \
            "or \"uninitialized\": write that word to it," \
            "or add a unit that always runs ssh-keygen -A"
    fi
}

machine_id() {
    if [ -n "$DESTDIR" ] && [ -s etc/machine-id ] && ! first_boot; then
        echo "/etc/machine-id would be shared by all VMs: truncate -s 0 /etc/machine-id"
    fi
    # systemd copies it if /etc/machine-id is empty
    if [ ! -L var/lib/dbus/machine-id ] && [ -s var/lib/dbus/machine-id ]; then
        echo "/var/lib/dbus/machine-id would be shared by all VMs:" \
            "replace it with a link to /etc/machine-id"
    fi
}

installation() {
    [ "$action" = check ] || return 0
    exists "$DESTDIR$script" "$DESTDIR$unit" "$DESTDIR$link" || return 0
    for file in "$script" "$unit"; do
        resolve "$file"
        [ -s "$DESTDIR$resolved" ] || echo "$file is missing: run install.sh again"
    done
    enabled "$UNIT" || echo "$unit is disabled, as on a provisioned VM: run install.sh again"
}

# Print what is found; return 1 if there is something.
check_image() {
    problems=$(
        cd "$DESTDIR/" || exit
        for check in mac_addresses dhcp_client other_agents host_keys machine_id installation; do
            "$check"
        done
    )
    [ -n "$problems" ] || return 0
    printf '%s\n' "$problems" | sed 's/^/install.sh: warning: /' >&2
    return 1
}

# Put everything back: the earlier version's files, which the .old ones are links to, and no others.
roll_back() {
    set +e
    trap '' HUP INT QUIT TERM
    for path in "$DESTDIR$script" "$DESTDIR$unit" "$DESTDIR$preset" "$DESTDIR$link"; do
        if exists "$path.old"; then
            ln -f "$path.old" "$path" # not mv: it leaves two links to one file alone
        elif [ "$kept" = yes ]; then
            rm -f "$path"
        fi
        rm -f "$path.new" "$path.old"
    done
    die "failed: everything is as it was"
}

# Files get their names only when all of them are complete: the disk may be full.
install_files() {
    set -- "$DESTDIR$script" "$DESTDIR$unit" "$DESTDIR$preset" "$DESTDIR$link"
    for path in "$@"; do
        rm -f "$path.new" "$path.old" # of a run that was killed; and a link there would be followed
    done
    kept=no
    trap roll_back EXIT
    trap 'exit 1' HUP INT QUIT TERM
    for path in "$@"; do
        ! exists "$path" || ln "$path" "$path.old"
    done
    kept=yes
    mkdir -p "$DESTDIR${script%/*}" "$DESTDIR${unit%/*}"
    cp "$here/$SCRIPT" "$DESTDIR$script.new"
    chmod 0755 "$DESTDIR$script.new"
    case $PYTHON$script in *\ *) q='"' ;; *) q='' ;; esac # systemd.service(5)
    sed -e "/^ExecStart=/s|/usr/bin/python3|$q$PYTHON$q|" \
        -e "/^ExecStart=/s|/usr/local/sbin/$SCRIPT|$q$script$q|" "$here/$UNIT" >"$DESTDIR$unit.new"
    if [ "$enable" = yes ]; then
        mkdir -p "$DESTDIR${preset%/*}" "$DESTDIR${link%/*}"
        echo "enable $UNIT" >"$DESTDIR$preset.new"
        ln -s "$unit" "$DESTDIR$link.new"
    fi
    for path in "$@"; do
        ! exists "$path.new" || mv -f "$path.new" "$path"
    done
    trap '' HUP INT QUIT TERM
    trap - EXIT
    for path in "$@"; do rm -f "$path.old" || :; done
}

uninstall() {
    done="Nothing to remove from"
    ! exists "$DESTDIR$script" "$DESTDIR$unit" "$DESTDIR$preset" "$DESTDIR$link" ||
        done="Removed $script and $unit from"
    rm -f "$DESTDIR$link" "$DESTDIR$preset" "$DESTDIR$unit" "$DESTDIR$script"
    echo "$done ${DESTDIR:-this machine}."
}

# systemd reads its units again, on a live machine that runs it.
reload() {
    [ -n "$DESTDIR" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
}

action=install
enable=yes
for argument in "$@"; do
    case $argument in
        --check) action=check ;;
        --no-enable) enable=no ;;
        --uninstall) [ "$action" = check ] || action=uninstall ;;
        --help | -h)
            usage
            exit
            ;;
        *) die "not an option: $argument (see --help)" 2 ;;
    esac
done

here=$(dirname -- "$(readlink -f -- "$0")")
check_variables
check_targets
if [ "$action" = uninstall ]; then
    uninstall
    reload
    exit
fi
{ [ -f "$here/$SCRIPT" ] && [ -f "$here/$UNIT" ]; } || die "$SCRIPT or $UNIT is missing in $here"
check_sandbox
check_unit
check_python
if [ "$action" = check ]; then
    check_image || exit 1
    also=''
    exists "$DESTDIR$unit" || also=' The unit is not installed there.'
    echo "No problem was found in ${DESTDIR:-this machine}.$also"
    exit
fi
check_image || :
install_files
reload
enabled='enabled for the next boot'
[ "$enable" = yes ] || enabled='not enabled'
echo "Installed in ${DESTDIR:-this machine}: $script"
echo "and $unit, $enabled."
[ -n "$DESTDIR" ] || cat <<EOF
Before this machine is captured: remove the users, keys and logs that must not be in every VM, then
    rm -f /etc/ssh/ssh_host_* && truncate -s 0 /etc/machine-id
A provisioned VM has disabled the unit: run install.sh again before that VM is captured.
EOF
