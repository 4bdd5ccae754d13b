#!/bin/sh
# Install azure_provision.py and its unit into an image: this machine, or the tree at DESTDIR.
# shellcheck disable=SC2046,SC2086 # lists of patterns are split and expanded on purpose

set -eu +f
umask 022
unset SYSTEMD_UNIT_PATH

SCRIPT=azure_provision.py
UNIT=azure-provisioning.service
PRESET=20-azure-provisioning.preset # before a distribution's "disable *": systemd.preset(5)

# What makes every VM of an image fail: a function each, below, which prints one line per problem,
# the file and the fix. They run in the root directory of the image.
CHECKS='mac_addresses dhcp_client other_agents host_keys machine_id installation'

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
        case $name in
            '' | .) ;;
            ..) resolved=${resolved%/*} ;;
            *)
                if [ -L "$DESTDIR$resolved/$name" ]; then
                    links=$((links + 1))
                    [ "$links" -le 40 ] || return 0 # a loop: the result is a directory
                    target=$(readlink "$DESTDIR$resolved/$name")
                    case $target in /*) resolved='' ;; esac
                    todo=$target/$todo
                else
                    resolved=$resolved/$name
                    passed=$passed$resolved:
                fi
                ;;
        esac
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
    case $DESTDIR in *[[:cntrl:]]*) die "DESTDIR has a control character: $DESTDIR" ;; esac
    if [ -n "$DESTDIR" ]; then
        [ -d "$DESTDIR" ] || die "DESTDIR is not a directory: $DESTDIR"
        DESTDIR=$(CDPATH='' cd -- "$DESTDIR" && pwd -P)
        DESTDIR=${DESTDIR%/}
    fi
    if [ -z "$DESTDIR" ] && [ "$(id -u)" -ne 0 ]; then
        die "not root: run it with sudo, or set DESTDIR"
    fi
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
            case $directories in
                *":$resolved:"*)
                    die "$path is under $hidden, which the unit's sandbox hides: use another directory"
                    ;;
            esac
        done
    done
}

# Refuse a unit that masks this one or that systemd prefers to it: systemd.unit(5).
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
    # systemctl enables only what lies where systemd looks.
    case $enable$UNITDIR in
        no* | yes/etc/systemd/system | yes/usr/local/lib/systemd/system) ;;
        yes/usr/lib/systemd/system | yes/lib/systemd/system) ;;
        *) die "systemd does not look for units in UNITDIR, so --no-enable is needed: $UNITDIR" ;;
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
        echo "install.sh: warning: cannot run the image's $PYTHON here, so it was not checked: $answer" >&2
    else
        die "$PYTHON cannot run the script, which needs Python 3.6 or newer and all of its library: $answer"
    fi
}

# Where files that match the patterns, such as systemd/network/*.network, can lie in the image.
config() {
    for directory in etc usr/local/lib usr/lib lib; do
        [ "$directory" = lib ] && [ -L lib ] || printf "$directory/%s\n" "$@"
    done
}

nm_conf() { config 'NetworkManager/*.conf' 'NetworkManager/conf.d/*'; }
nm_profiles() { config 'NetworkManager/system-connections/*'; }
IFCFG='etc/sysconfig/network-scripts/ifcfg-* etc/sysconfig/network/ifcfg-*'
INTERFACES='etc/network/interfaces etc/network/interfaces.d/*'

# Print the files that have a setting that matches REGEX, in any case. Indentation is ignored; a
# setting in a section is matched as "[Section]Name=value".
files_with() {
    regex=$1
    shift
    for file in "$@"; do
        resolve "/$file"
        [ -f "$DESTDIR$resolved" ] || continue
        sed -E 's/^[[:space:]]+|[[:space:]]+$//g; /^\[/{ h; d; }; G; s/(.*)\n(.*)/\2\1/' \
            "$DESTDIR$resolved" | grep -Ei -e "$regex" >/dev/null && printf '/%s\n' "$file"
    done
    :
}

has() {
    [ -n "$(files_with "$@")" ]
}

# What masks a unit: a link to /dev/null, or an empty file.
empty() {
    [ -e "$1" ] && [ ! -s "$1" ]
}

# machine-id(5): with an empty file it is not the first boot.
first_boot() {
    [ ! -e etc/machine-id ] || grep -qx uninitialized etc/machine-id
}

# Whether UNIT starts at boot: by a link, or by a preset that the first boot applies.
enabled() {
    for wanted in $(config "systemd/system/*.wants/$1" "systemd/system/*.requires/$1"); do
        if exists "$wanted" && ! empty "etc/systemd/system/${wanted##*/}"; then return 0; fi
    done
    first_boot && has "^enable[[:space:]]+$1" $(config 'systemd/system-preset/*.preset')
}

mac_addresses() {
    mac='[0-9a-f]{2}([:-][0-9a-f]{2}){5}'
    {
        files_with "^[^#]*macaddress[\"']?[[:space:]]*:[[:space:]]*[\"']?$mac" $(config 'netplan/*.yaml')
        files_with '^\[(match|link)\](permanent)?macaddress[[:space:]]*=[[:space:]]*[0-9a-f]' \
            $(config 'systemd/network/*.network' 'systemd/network/*.link' 'systemd/network/*.d/*.conf')
        files_with "^\[[^]]*\]([a-z0-9-]+\.)?(cloned-)?mac-address[[:space:]]*=[[:space:]]*$mac" \
            $(nm_conf) $(nm_profiles)
        files_with "^(hwaddr|macaddr|lladdr)=[\"']?$mac" $IFCFG
        files_with "^(hwaddress|auto|allow-[a-z]+|iface|rename)[[:space:]].*$mac" $INTERFACES
        files_with "^[^#]*attrs?\{address\}==\"$mac\"" etc/udev/rules.d/*.rules
    } | sed 's/$/ is bound to a MAC address that no VM of the image has: match by name or driver, or delete it/'
}

dhcp_client() {
    dhcp='^\[network\]dhcp[[:space:]]*=[[:space:]]*(y|t|on|1|both|ipv4|v4)'
    bootproto="^bootproto=[\"']?dhcp"
    if enabled systemd-networkd.service &&
        files_with "$dhcp" $(config 'systemd/network/*.network' 'systemd/network/*.network.d/*.conf') |
        grep -v /80-container- >/dev/null; then return; fi
    # netplan's generator enables systemd-networkd
    if exists $(config systemd/system-generators/netplan) &&
        has "^[^#]*dhcp4[\"']?[[:space:]]*:[[:space:]]*(true|yes|on)" $(config 'netplan/*.yaml'); then return; fi
    # NetworkManager asks on every interface unless told otherwise
    if enabled NetworkManager.service &&
        { ! has '^\[main\]no-auto-default[[:space:]]*=.*\*' $(nm_conf) ||
            has '^\[ipv4\]method[[:space:]]*=[[:space:]]*auto' $(nm_profiles) ||
            has "$bootproto" $IFCFG; }; then return; fi
    if enabled networking.service && has '^iface.*inet[[:space:]]+dhcp' $INTERFACES; then return; fi
    # SUSE's wicked, and the init script of RHEL 7
    if { enabled wicked.service || exists etc/rc3.d/S*network; } &&
        has "$bootproto" $IFCFG; then return; fi
    for client in 'dhcpcd*' 'dhclient*' 'udhcpc*' connman; do
        if enabled "$client.service"; then return; fi
    done
    echo "no DHCP client is enabled and configured: enable one, for example systemd-networkd" \
        "with DHCP=yes in /etc/systemd/network/80-dhcp.network"
}

other_agents() {
    while read -r agent off fix; do
        for file in usr/bin/$agent usr/sbin/$agent usr/local/bin/$agent usr/local/sbin/$agent; do
            exists "$file" || continue
            for switch in $off; do
                case $switch in # cloud-init looks only whether its file exists
                    *.disabled) [ ! -e "$switch" ] || continue 3 ;;
                    *) ! empty "$switch" || continue 3 ;;
                esac
            done
            echo "/$file also reports to Azure: remove its package, or $fix"
            break
        done
    done <<EOF
cloud-init etc/cloud/cloud-init.disabled touch /etc/cloud/cloud-init.disabled
waagent etc/systemd/system/wa*agent.service mask its unit
azure-init etc/systemd/system/azure-init.service mask its unit
afterburn etc/systemd/system/afterburn*checkin.service mask its checkin units
EOF
}

host_keys() {
    # A live machine needs its keys until it is captured.
    if [ -n "$DESTDIR" ] && exists etc/ssh/ssh_host_*_key; then
        echo "/$file would be shared by all VMs: rm -f /etc/ssh/ssh_host_*"
    fi
    exists usr/sbin/sshd usr/bin/sshd || return 0
    makers=$(grep -Els '^([^#;=]*|Exec.*)(ssh-keygen|sshd-keygen|sshd-gen-keys|openssh-server)' \
        $(config 'systemd/system/*.service' 'systemd/system/*.service.d/*.conf') || :)
    if [ -z "$makers" ]; then
        echo "/$file has no host keys in a VM, as nothing creates them:" \
            "add a unit that runs ssh-keygen -A before it"
    elif ! first_boot && ! grep -L '^ConditionFirstBoot=yes' $makers | grep . >/dev/null; then
        echo "/${makers%%[[:space:]]*} creates SSH host keys only if /etc/machine-id is missing or" \
            "\"uninitialized\": write that word to it, or add a unit that always runs ssh-keygen -A"
    fi
}

machine_id() {
    if [ -n "$DESTDIR" ] && [ -s etc/machine-id ] && ! first_boot; then
        echo "/etc/machine-id would be shared by all VMs: truncate -s 0 /etc/machine-id"
    fi
    # systemd copies it if /etc/machine-id is empty
    if [ ! -L var/lib/dbus/machine-id ] && [ -s var/lib/dbus/machine-id ]; then
        echo "/var/lib/dbus/machine-id would be shared by all VMs: replace it with a link to /etc/machine-id"
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

# Print what the checks find; return 1 if there is something.
check_image() {
    problems=$(cd "$DESTDIR/" && for check in $CHECKS; do "$check"; done)
    [ -n "$problems" ] || return 0
    printf '%s\n' "$problems" | sed 's/^/install.sh: warning: /' >&2
    return 1
}

remove() {
    rm -f "$DESTDIR$link" "$DESTDIR$preset" "$DESTDIR$unit" "$DESTDIR$script"
}

# systemd reads its units again, on a live machine that runs it.
reload() {
    [ -n "$DESTDIR" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
}

roll_back() {
    set +e
    printf '%s' "$created" | while IFS= read -r path; do rm -f "$path"; done
    for path in "$DESTDIR$script" "$DESTDIR$unit" "$DESTDIR$preset"; do
        rm -f "$path.new"
        ln -f "$path.old" "$path" 2>/dev/null # not mv: it leaves two links to one file alone
        rm -f "$path.old"
    done
    die "failed: everything is as it was"
}

# Files get their names only when all of them are complete: the disk may be full.
install_files() {
    created=''
    for path in "$DESTDIR$script" "$DESTDIR$unit" "$DESTDIR$preset" "$DESTDIR$link"; do
        exists "$path" || created=$created$path$newline
    done
    trap roll_back EXIT
    trap 'exit 1' HUP INT QUIT TERM
    for path in "$DESTDIR$script" "$DESTDIR$unit" "$DESTDIR$preset"; do
        rm -f "$path.new" "$path.old" # a link there would be followed
        ! exists "$path" || ln "$path" "$path.old"
    done
    mkdir -p "$DESTDIR$PREFIX/sbin" "$DESTDIR$UNITDIR"
    cp "$here/$SCRIPT" "$DESTDIR$script.new"
    chmod 0755 "$DESTDIR$script.new"
    case $PYTHON$script in *\ *) q='"' ;; *) q='' ;; esac # systemd.service(5)
    sed "s|^\(ExecStart=\)/usr/bin/python3\(.*\)/usr/local/sbin/$SCRIPT\$|\1$q$PYTHON$q\2$q$script$q|" \
        "$here/$UNIT" >"$DESTDIR$unit.new"
    if [ "$enable" = yes ]; then
        mkdir -p "$DESTDIR${preset%/*}" "$DESTDIR${link%/*}"
        echo "enable $UNIT" >"$DESTDIR$preset.new"
        mv -f "$DESTDIR$preset.new" "$DESTDIR$preset"
    fi
    mv -f "$DESTDIR$script.new" "$DESTDIR$script"
    mv -f "$DESTDIR$unit.new" "$DESTDIR$unit"
    if [ "$enable" = no ]; then
        :
    elif command -v systemctl >/dev/null 2>&1; then
        systemctl --quiet --root="${DESTDIR:-/}" enable "$UNIT"
    else
        ln -sf "$unit" "$DESTDIR$link"
    fi
    trap - EXIT
    rm -f "$DESTDIR$script.old" "$DESTDIR$unit.old" "$DESTDIR$preset.old"
}

newline='
'
action=install
enable=yes
for argument in "$@"; do
    case $argument in
        --check) action=check ;;
        --no-enable) enable=no ;;
        --uninstall) [ "$action" = check ] || action=uninstall ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) die "not an option: $argument (see --help)" 2 ;;
    esac
done

here=$(dirname -- "$(readlink -f -- "$0")")
check_variables
check_targets
if [ "$action" = uninstall ]; then
    remove
    reload
    echo "Removed $script and $unit from ${DESTDIR:-this machine}."
    exit 0
fi
{ [ -f "$here/$SCRIPT" ] && [ -f "$here/$UNIT" ]; } || die "$SCRIPT or $UNIT is missing in $here"
check_sandbox
check_unit
check_python
if [ "$action" = check ]; then
    check_image || exit 1
    echo "No problem was found in ${DESTDIR:-this machine}.$(exists "$DESTDIR$unit" || echo " The unit is not installed there.")"
    exit 0
fi
check_image || :
install_files
reload
echo "Installed in ${DESTDIR:-this machine}: $script"
echo "and $unit, $([ "$enable" = no ] && echo "not enabled" || echo "enabled for the next boot")."
[ -n "$DESTDIR" ] || cat <<EOF
Before this machine is captured: remove the users, keys and logs that must not be in every VM, then
    rm -f /etc/ssh/ssh_host_* && truncate -s 0 /etc/machine-id
A provisioned VM has disabled the unit: run install.sh again before that VM is captured.
EOF
