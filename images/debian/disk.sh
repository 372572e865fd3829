#!/usr/bin/env bash
# disk.sh TREE.tar.zst OUT.raw FILESYSTEM_SEED BYTES_PER_INODE BESIDE
#
# Writes the disk out of a configured tree, and BESIDE.vmlinuz, .initrd, .cmdline, .packages and
# .kernel-version out of the same tree.  Called by build-debian.sh, as root or as root of a user
# namespace.
images_dir=$(cd "$(dirname "$0")/.." && pwd)
. "$images_dir/lib.sh"

tree_tar=$1 out=$2 filesystem_seed=$3 bytes_per_inode=$4 beside=$5
root=$(mktemp -d "$(dirname "$out")/../root.XXXXXX")
zstd -dcq "$tree_tar" | tar --xattrs --xattrs-include='*' --numeric-owner -C "$root" -xp

make_disk "$out" "$root" bulbil-root 2048 bulbil-debian "$filesystem_seed" -J size=16 -i "$bytes_per_inode"

kernel=$(basename "$root"/lib/modules/*)
cp "$root/boot/vmlinuz-$kernel" "$beside.vmlinuz"
cp "$root/boot/initrd.img-$kernel" "$beside.initrd"
cp "$root/boot/cmdline" "$beside.cmdline"
echo "$kernel" >"$beside.kernel-version"
dpkg-query --admindir="$root/var/lib/dpkg" -W -f '${Package}=${Version}\n' >"$beside.packages"
chmod 644 "$beside".*
rm -rf "$root"
