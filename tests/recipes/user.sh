#!/bin/sh
# Create the user azureuser in TREE, or on this machine if it is /: who has one of the keys in the
# file KEYS may log in, and use sudo.
set -eu
tree=${1:?usage: user.sh TREE KEYS} keys=${2:?usage: user.sh TREE KEYS}
[ -s "$keys" ] || {
    echo "user.sh: put the public keys that may log in into $keys" >&2
    exit 1
}
chroot "$tree" useradd --create-home --shell /bin/bash azureuser
ssh=$tree/home/azureuser/.ssh
mkdir -m 700 "$ssh"
cp "$keys" "$ssh/authorized_keys"
chmod 600 "$ssh/authorized_keys"
chroot "$tree" chown -R azureuser: /home/azureuser
echo 'azureuser ALL=(ALL) NOPASSWD: ALL' >"$tree/etc/sudoers.d/azureuser" # there is no password
