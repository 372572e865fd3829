#!/usr/bin/env bash
# make-disk.sh DEBS STAGING
#
# Puts the tiny image's tree together out of unpacked packages and writes the disk.  Called by
# build-tiny.sh, as root or as root of a user namespace.
images_dir=$(cd "$(dirname "$0")/.." && pwd)
. "$images_dir/lib.sh"

debs=$1 staging=$2
unpacked=$(mktemp -d "$staging/../unpacked.XXXXXX")
root=$(mktemp -d "$staging/../root.XXXXXX")
for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$unpacked"; done
kernel=$(basename "$unpacked"/lib/modules/*)

folders() {
    mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,etc/dropbear,etc/udhcpc,etc/acpi/PWRF,dev,proc,sys,run,tmp,mnt,root/.ssh} \
        "$root"/{var/lib/bulbil,var/log,boot/grub,lib64,lib/x86_64-linux-gnu}
    chmod 755 "$root"
    chmod 1777 "$root/tmp"
    chmod 700 "$root/root" "$root/root/.ssh"
    ln -s ../run "$root/var/run"
    ln -s ../lib/x86_64-linux-gnu "$root/usr/lib"
}

programs() {
    local applet library
    cp "$unpacked/bin/busybox" "$root/bin/busybox"
    for applet in $("$unpacked/bin/busybox" --list-full); do
        mkdir -p "$root/$(dirname "$applet")"
        [ -e "$root/$applet" ] || ln -s /bin/busybox "$root/$applet"
    done
    cp "$unpacked/usr/sbin/dropbear" "$root/usr/sbin/"
    cp "$unpacked/usr/bin/dropbearkey" "$root/usr/bin/"
    cp -L "$unpacked/lib64/ld-linux-x86-64.so.2" "$root/lib64/"
    for library in libc.so.6 libcrypt.so.1 libtomcrypt.so.1 libtommath.so.1 libgmp.so.10 libz.so.1; do
        cp -L "$(find "$unpacked" -name "$library" | head -n 1)" "$root/lib/x86_64-linux-gnu/$library"
    done
}

modules() {
    local path
    depmod -b "$unpacked" "$kernel"
    for path in $(modules_in_load_order "$unpacked/lib/modules/$kernel/modules.dep" \
        virtio_pci virtio_mmio virtio_blk virtio_scsi sd_mod virtio_net virtio_rng virtio_console isofs evdev button); do
        install -D -m 644 "$unpacked/lib/modules/$kernel/$path" "$root/lib/modules/$kernel/$path"
    done
    cp "$unpacked/lib/modules/$kernel"/modules.{builtin,builtin.modinfo,order} "$root/lib/modules/$kernel/"
    depmod -b "$root" "$kernel"
}

settings() {
    install -m 755 "$images_dir/tiny/rc" "$root/etc/rc"
    install -m 755 "$images_dir/tiny/udhcpc.script" "$root/etc/udhcpc/default.script"
    install -m 755 "$images_dir/tiny/power-button" "$root/etc/acpi/PWRF/00000080" # the name acpid looks for
    install -m 644 "$images_dir/tiny/inittab" "$root/etc/inittab"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo 'root:*:19000:0:99999:7:::' >"$root/etc/shadow"
    echo 'root:x:0:' >"$root/etc/group"
    echo /bin/sh >"$root/etc/shells"
    echo tiny >"$root/etc/hostname"
    : >"$root/etc/machine-id"
    chmod 600 "$root/etc/shadow"
    # For a start without an initramfs, where nothing mounts /dev before init.  A namespace may not
    # make device nodes; such an image needs its initramfs.
    mknod -m 600 "$root/dev/console" c 5 1 2>/dev/null && mknod -m 666 "$root/dev/null" c 1 3 || true
}

folders
programs
modules
settings
cmdline="root=PARTUUID=$(guid bulbil-tiny-part1) ro console=tty0 console=ttyS0,115200 no_timer_check mitigations=off"
cp "$unpacked/boot/vmlinuz-$kernel" "$root/boot/vmlinuz"
make_initrd "$root/boot/initrd.img" "$unpacked" "$kernel" virtio_pci virtio_mmio virtio_blk virtio_scsi sd_mod
printf 'linux /boot/vmlinuz %s\ninitrd /boot/initrd.img\nboot\n' "$cmdline" >"$root/boot/grub/grub.cfg"
clamp_mtimes "$root"

make_disk "$staging/tiny.raw" "$root" tiny 96 bulbil-tiny bulbil-tiny -N 4096 -J size=4
cp "$root/boot/vmlinuz" "$staging/tiny.vmlinuz"
cp "$root/boot/initrd.img" "$staging/tiny.initrd"
printf '%s\n' "$cmdline" >"$staging/tiny.cmdline"
chmod 644 "$staging"/tiny.*
