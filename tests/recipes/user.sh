#!/bin/sh
# Create the user azureuser in TREE, or on this machine if it is /: who has one of the keys in the
# file KEYS may log in, and use sudo.
set -eu
tree=${1:?usage: user.sh TREE KEYS} keys=${2:?usage: user.sh TREE KEYS}
[ -s "$keys" ] || {
    echo "user.sh: put the public keys that may log in into $keys" >&2
    exit 1
}
[ -d "$tree/etc/sudoers.d" ] || {
    echo "user.sh: install sudo" >&2
    exit 1
}
chroot "$tree" id azureuser >/dev/null 2>&1 ||
    chroot "$tree" useradd --create-home --shell /bin/bash azureuser
ssh=$tree/home/azureuser/.ssh
mkdir -p "$ssh"
cp "$keys" "$ssh/authorized_keys"
chmod -R go= "$ssh"
chroot "$tree" chown -R azureuser: /home/azureuser
echo 'azureuser ALL=(ALL) NOPASSWD: ALL' >"$tree/etc/sudoers.d/azureuser" # there is no password
