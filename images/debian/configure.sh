#!/usr/bin/env bash
# configure.sh PROFILE PACKAGES.tar.zst OUT.tar.zst KEY
#
# Makes the tree of installed packages a cloud image and packs it again.  Called by
# build-debian.sh, as root or as root of a user namespace.
images_dir=$(cd "$(dirname "$0")/.." && pwd)
. "$images_dir/lib.sh"

profile=$1 packages_tar=$2 out=$3 key=$4
root=$(mktemp -d "$(dirname "$out")/root.XXXXXX")
chmod 755 "$root"
# Device nodes cannot be made in a namespace, and the kernel brings its own /dev.
zstd -dcq "$packages_tar" | tar --xattrs --xattrs-include='*' --numeric-owner -C "$root" -xp --exclude='./dev/*'

partuuid=$(guid bulbil-debian-part1)
kernel=$(basename "$root"/lib/modules/*)
# no_timer_check: on a busy host an emulated guest's check of its timer fails now and then and the
# kernel panics ("IO-APIC + timer doesn't work!").
cmdline="root=PARTUUID=$partuuid ro console=tty0 console=ttyS0,115200 no_timer_check"
fsck_pass=1

copy_files() { # copy_files FOLDER : its files to the same places, whatever the checkout's modes are
    local file
    while IFS= read -r file; do install -D -m 644 "$1/$file" "$root/$file"; done < <(cd "$1" && find . -type f)
}

remove_traces_of_the_build() {
    # Empty, never absent: with a read-only root at start systemd refuses to make the file, and a
    # guest without a machine-id gets no DHCP lease.
    : >"$root/etc/machine-id"
    rm -f "$root/var/lib/dbus/machine-id"
    ln -s /etc/machine-id "$root/var/lib/dbus/machine-id"
    rm -rf "$root"/etc/ssh/ssh_host_* "$root"/var/lib/systemd/random-seed "$root"/initrd.img.old "$root"/vmlinuz.old \
        "$root"/var/log/apt "$root"/var/log/*.log "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin \
        "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/run/* "$root"/tmp/* \
        "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/* "$root"/etc/apt/apt.conf.d/99mmdebstrap
}

common() {
    remove_traces_of_the_build
    copy_files "$images_dir/debian/common"
    echo localhost >"$root/etc/hostname"
    ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
    chroot "$root" systemctl --quiet enable systemd-networkd systemd-resolved ssh 2>/dev/null
    printf 'PROFILE=%s\nKEY=%s\n' "$profile" "$key" >"$root/etc/bulbil-image-release"
}

# Each trim says in its file what it costs under emulation, not that it is bad.
fast() {
    local name
    # norandmaps: QEMU translates a shared library again for every process that has it elsewhere.
    # With all at one address a boot takes a fifth less, and a reboot a minute less: GRUB's writes to
    # pages with many translations crawl.
    cmdline="$cmdline norandmaps quiet mitigations=off rcupdate.rcu_expedited=1 8250.nr_uarts=1"
    fsck_pass=0
    copy_files "$images_dir/debian/fast"
    while read -r name; do ln -sf /dev/null "$root/etc/systemd/system/$name"; done < <(names_in fast.masked-units)
    while read -r name; do ln -sf /dev/null "$root/etc/udev/rules.d/$name.rules"; done < <(names_in fast.masked-udev-rules)
    # 1.5 MB instead of Debian's 14 MB, which starts udev a first time.
    make_initrd "$root/boot/initrd.img-$kernel" "$root" "$kernel" virtio_pci virtio_mmio virtio_blk virtio_scsi sd_mod
}

names_in() { sed -e 's/#.*//' "$images_dir/debian/$1" | tr -s ' ' '\n' | grep .; }

common
if [ "$profile" = fast ]; then fast; fi
echo "PARTUUID=$partuuid / ext4 rw,discard,errors=remount-ro 0 $fsck_pass" >"$root/etc/fstab"
mkdir -p "$root/boot/grub"
printf 'linux /vmlinuz %s\ninitrd /initrd.img\nboot\n' "$cmdline" >"$root/boot/grub/grub.cfg"
printf '%s\n' "$cmdline" >"$root/boot/cmdline"
# Byte code last, against the files' final times.  With SOURCE_DATE_EPOCH set Python makes byte
# code that it checks against a hash of the source at every import; this it takes as it is.
clamp_mtimes "$root"
chroot "$root" python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.11 >/dev/null

log "$profile: kernel $kernel, $(du -sm "$root" | cut -f1) MB"
tar --xattrs --xattrs-include='*' --numeric-owner --sort=name -C "$root" -c . | zstd -1 -q -T0 -o "$out"
