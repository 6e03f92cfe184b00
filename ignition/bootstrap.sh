#!/bin/sh
# precache-agent-bootstrap LABEL SHA256 WAIT: copies the binary of precache-agent from the partition to /run. Exits 0 if it is there
# with that hash; nothing depends on it. A partition is mounted for as long as it is read, in the mount namespace of the service, and
# not a byte of it changes.
set -u
label=$1 sha256=$2 wait=$3
run=/run/precache-agent
binary=$run/bin/precache-agent
new=$run/bin/.new
mnt=$run/bootstrap
sum="" why="no partition labelled $label"

give_up() {
	rm -f "$new"
	echo "precache-agent-bootstrap: $*. Nothing will be loaded, the boot goes on." >&2
	exit 1
}

matches() {
	sum=$(sha256sum <"$1") && sum=${sum%% *} && [ "$sum" = "$sha256" ]
}

# seconds since the boot: the clock may be set meanwhile
now() {
	read -r up rest </proc/uptime
	echo "${up%%.*}"
}

# all partitions of that label; udev links one of them, later
partitions() {
	for uevent in /sys/class/block/*/uevent; do
		name="" dev=""
		while IFS="=" read -r key value; do
			case $key in
			DEVNAME) dev=/dev/$value ;;
			PARTNAME) name=$value ;;
			esac
		done <"$uevent"
		if [ "$name" = "$label" ] && [ -b "$dev" ]; then echo "$dev"; fi
	done 2>/dev/null
	if [ -b "/dev/disk/by-partlabel/$label" ]; then readlink -f "/dev/disk/by-partlabel/$label"; fi
}

# take PARTITION: false, and why, if another one may have the binary
take() {
	# Else the log would be replayed. Ext4 writes whatever its options, but not through a loop device that cannot.
	type=ext4 options=loop,noload
	if head -c 4 "$1" | grep -q XFSB; then type=xfs options=norecovery,nouuid; fi
	err=$(mount -t "$type" -o "ro,nodev,nosuid,noexec,$options" "$1" "$mnt" 2>&1) || {
		why="cannot mount $1: $(echo "$err" | head -n 1)"
		return 1
	}
	if ! [ -f "$mnt/precache-agent" ]; then
		umount "$mnt"
		why="$1 has no file precache-agent"
		return 1
	fi
	head -c 67108864 "$mnt/precache-agent" >"$new" || give_up "cannot copy precache-agent from $1"
	umount "$mnt"
	matches "$new" || give_up "precache-agent on $1 has the sha256 $sum, not $sha256"
	chmod 755 "$new"
	# systemd may not execute a file in /run that has no such label
	if [ -e /sys/fs/selinux/enforce ]; then chcon system_u:object_r:bin_t:s0 "$new"; fi
	version=$("$new" version 2>&1) || give_up "precache-agent on $1 does not run: $version"
	mv "$new" "$binary" || give_up "cannot write $binary"
	echo "precache-agent-bootstrap: $version from $1"
	exit 0
}

if [ -x "$binary" ] && matches "$binary"; then exit 0; fi
rm -f "$binary"
mkdir -p "$run/bin" "$mnt" || give_up "cannot write to $run"
end=$(($(now) + wait))
tried=" "
while :; do
	for dev in $(partitions); do
		case $tried in *" $dev "*) continue ;; esac
		tried="$tried$dev "
		take "$dev"
	done
	if [ "$(now)" -ge "$end" ]; then give_up "$why; waited for $wait s"; fi
	sleep 0.2
done
