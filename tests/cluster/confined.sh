#!/usr/bin/env bash
# Runs a command as a pod's container would, as far as Linux' namespaces go: it can write nothing but to the folders in
# WRITABLE, has no capabilities, and a network of its own. Needs root, in namespaces of mounts, network and processes.
#     confined.sh UID COMMAND...
# VISIBLE: folders it reads, wherever they are. CLOSED: folders on the way there that others may not enter.
set -euo pipefail
IFS=: read -ra visible <<< "$VISIBLE"
IFS=: read -ra closed <<< "$CLOSED"
IFS=: read -ra writable <<< "$WRITABLE"
user=$1
shift

mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
for number in "${!visible[@]}"; do
    mkdir "/mnt/$number"
    mount --bind "${visible[$number]}" "/mnt/$number"
done
for folder in "${writable[@]}"; do
    [ -d "$folder" ] || mount -t tmpfs -o mode=755 tmpfs "$(dirname "$folder")" # so that nothing is left of it
    mkdir -p "$folder"
    mount -t tmpfs -o mode=1777 tmpfs "$folder"
done
for folder in "${closed[@]}"; do # unless a mount has hidden it
    [ ! -d "$folder" ] || mount -t tmpfs -o mode=755 tmpfs "$folder"
done
for number in "${!visible[@]}"; do
    mkdir -p "${visible[$number]}"
    mount --bind -o ro "/mnt/$number" "${visible[$number]}"
done
mount --bind / /
mount -o remount,ro,bind /
ip link set lo up
cd /tmp
exec setpriv --reuid "$user" --regid "$user" --clear-groups --bounding-set -all --inh-caps -all --no-new-privs "$@"
