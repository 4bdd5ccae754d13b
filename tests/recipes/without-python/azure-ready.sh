#!/bin/sh
# Provision an Azure VM whose image has no Python, once: report Ready, then set the hostname.
# Needs systemd, curl, and coreutils or busybox. Goes into /usr/local/sbin, executable, and
# azure-ready.service into /etc/systemd/system, enabled.
# Unlike azure_provision.py it does not publish the name in Azure's DNS (the next boot does), nor
# name a VM without an OS profile after its resource; and CI does not test the sandbox of its unit.

export LC_ALL=C                                                       # A-Z means ASCII
wireserver=${WIRESERVER:-168.63.129.16} imds=${IMDS:-169.254.169.254} # HOST:PORT, for tests
asset_tag=${ASSET_TAG_FILE:-/sys/class/dmi/id/chassis_asset_tag}
log() { printf '%s\n' "$*"; }
fail() { log "Not provisioned: $*; the next boot tries again"; exit 1; }
uptime() { cut -d . -f 1 /proc/uptime; } # the clock may be set meanwhile
printable() { tr -cd ' -~' | cut -c 1-100; }

ask() { # succeeds if the status is 2xx and $answer is whole; $reason, its last line, says both
    answer=$({ curl -q -s --noproxy '*' --connect-timeout 10 -m 60 -w '\nHTTP %{http_code}, ' "$@"
        echo "curl exit $?"; } | head -c 1048576 | tr '\0' '?') # the shell would drop a NUL
    reason=$(log "$answer" | tail -n 1 | printable)
    [ "${reason#HTTP 2??}" = ", curl exit 0" ]
}
retry() { # call $2 until it succeeds, for $1 seconds
    end=$(($(uptime) + $1)) logged=
    until "$2"; do
        [ "$(uptime)" -lt "$end" ] || fail "$2: $reason"
        [ "$reason" = "$logged" ] || log "$2: $reason; retrying for up to $1 s"
        logged=$reason && sleep "${PAUSE:-1}"
    done
}
# The text of the first element $1 of $answer, with its XML escapes.
element() { log "$answer" | tr -cd '!-~' | tr '<' '\n' | sed -n "s/^$1>//p" | head -n 1; }
report_ready() { # a fresh goal state each time: 410 means that it has moved on
    set -- -H 'x-ms-version: 2012-11-30' -H 'x-ms-agent-name: custom-provisioning'
    ask "$@" "http://$wireserver/machine?comp=goalstate" || return
    reason="the goal state has no ContainerId or no InstanceId"
    container=$(element ContainerId) instance=$(element InstanceId) number=$(element Incarnation)
    [ "$container" ] && [ "$instance" ] || return
    ask "$@" "http://$wireserver/machine?comp=health" -H 'Content-Type: text/xml;charset=utf-8' -d "\
<Health><GoalStateIncarnation>${number:-1}</GoalStateIncarnation><Container><ContainerId>$container\
</ContainerId><RoleInstanceList><Role><InstanceId>$instance</InstanceId><Health><State>Ready</State>\
</Health></Role></RoleInstanceList></Container></Health>"
    [ "${reason#HTTP 2}" != "$reason" ] # the status is the answer, whatever the body
}
fetch_name() { # JSON escapes a quote within a string, so only the key itself matches, not a tag
    ask "http://$imds/metadata/instance?api-version=2021-08-01&extended=true" -H Metadata:true || return
    name=$(log "$answer" | grep -o '"computerName" *: *"[^"\]*"' | head -n 1 | cut -d '"' -f 4)
    reason="IMDS has no computer name" && [ "$name" ]
}

[ ! -r "$asset_tag" ] || grep -qx 7783-7084-3265-9085-8269-3286-77 "$asset_tag" ||
    { log "Not on Azure: nothing to do"; exit 0; }
retry "${READY_LIMIT:-1200}" report_ready
log "Ready: container $container, instance $instance, $reason"
retry "${NAME_LIMIT:-300}" fetch_name
case .$name. in # with a dot at both ends, each label stands between two dots
*[!A-Za-z0-9.-]* | *..* | *.-* | *-.*) fail "not a hostname: $(log "$name" | printable)" ;; esac
[ ${#name} -le 64 ] || fail "over 64 characters: $(log "$name" | printable)"
hostnamectl set-hostname "$name" ||
    { hostname "$name" && log "$name" >"${HOSTNAME_FILE:-/etc/hostname}"; } || fail "$name not stored"
sync; log "Provisioned as $name"; systemctl disable --no-reload azure-ready.service
