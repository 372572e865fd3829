#!/bin/busybox sh
# /init of the small initramfs: loads the modules, finds root=, switches to it.
# Understands root=/dev/..., LABEL=, UUID= and PARTUUID=; rw, rootwait=SECONDS, rootflags= and init=.
b=/bin/busybox
$b mount -t devtmpfs -o mode=0755,nosuid dev /dev
$b mount -t proc -o nosuid,nodev,noexec proc /proc
$b mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
for module in /modules/*; do $b insmod "$module" 2>/dev/null; done

root= init=/sbin/init mode=ro wait=10 rootflags=
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        root=*) root=${word#root=} ;;
        init=*) init=${word#init=} ;;
        rootwait=*) wait=${word#rootwait=} ;;
        rootflags=*) rootflags=,${word#rootflags=} ;;
        rw) mode=rw ;;
    esac
done

# busybox's findfs knows no PARTUUID: read the GPT entries (LBA 2, 128 of 128 bytes) of each
# partitioned disk and compare.  On disk a GUID's first three fields are little endian.
by_partuuid() {
    guid=$(echo "$1" | $b tr 'A-F' 'a-f')
    want=$(echo "$guid" | $b sed -E 's/^(..)(..)(..)(..)-(..)(..)-(..)(..)-(....)-(.{12})$/\4\3\2\1\6\5\8\7\9/')${guid##*-}
    for disk in /sys/block/*; do
        disk=${disk##*/}
        [ -e "/sys/block/$disk/${disk}1" ] || [ -e "/sys/block/$disk/${disk}p1" ] || continue
        line=$($b dd if="/dev/$disk" bs=512 skip=2 count=32 2>/dev/null | $b hexdump -v -e '128/1 "%02x" "\n"' |
            $b cut -c33-64 | $b grep -n -x "$want") || continue
        for partition in "$disk${line%%:*}" "${disk}p${line%%:*}"; do
            [ -b "/dev/$partition" ] && { echo "/dev/$partition"; return 0; }
        done
    done
    return 1
}

find_root() {
    case $root in
        PARTUUID=*) by_partuuid "${root#PARTUUID=}" ;;
        LABEL=* | UUID=*) $b findfs "$root" 2>/dev/null ;;
        /dev/*) [ -b "$root" ] && echo "$root" ;;
    esac
}

tries=0
until device=$(find_root); do
    tries=$((tries + 1))
    [ $tries -le $((wait * 20)) ] || { echo "initrd: no root device $root"; exec $b sh; }
    $b usleep 50000
done
$b mount -t ext4 -o "$mode$rootflags" "$device" /root || { echo "initrd: cannot mount $device"; exec $b sh; }
for dir in dev proc sys; do $b mount -o move /$dir /root/$dir; done
exec $b switch_root /root "$init"
