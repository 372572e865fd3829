#!/usr/bin/env bash
# build-load-guest.sh OUTDIR
#
# Builds a guest that has no disk of its own and runs /job.sh: Debian's cloud kernel, static
# busybox and this machine's fio.  Writes load.vmlinuz and load.initrd; a job is put before it as an
# archive of its own, see load/init.  What is there already is kept.
images_dir=$(cd "$(dirname "$0")" && pwd)
. "$images_dir/lib.sh"

[ $# = 1 ] || die "one output folder is needed" "usage: $0 OUTDIR"
mkdir -p "$1"
outdir=$(cd "$1" && pwd)
key=$(cache_key load -- "$images_dir/build-load-guest.sh" "$images_dir/lib.sh" "$images_dir/load/init")
one_build_at_a_time "$outdir"
if is_current "$outdir" load "$key"; then
    log "unchanged: $outdir/load.initrd"
    exit 0
fi
need apt-get apt dpkg-deb dpkg cpio cpio lz4 lz4 depmod kmod fio fio
work=$(mktemp -d "$outdir/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/debs" "$work/tree" "$work/staging" "$work/root"

if [ -z "$(debian_sources)" ] && [ "$(id -u)" = 0 ]; then apt-get update >&2; fi
kernel_package=$(apt-cache show --no-all-versions linux-image-cloud-amd64 | sed -nE 's/^Depends: (linux-image-[^ ]+).*/\1/p')
[ -n "$kernel_package" ] || die "the package lists have no cloud kernel"
(cd "$work/debs" && apt-get -qq -o APT::Sandbox::User=root download "$kernel_package" busybox-static)
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/tree"; done
kernel=${kernel_package#linux-image-}
depmod -b "$work/tree" "$kernel"

root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp,modules}
cp "$work/tree/bin/busybox" "$root/bin/busybox"
n=100
for path in $(modules_in_load_order "$work/tree/lib/modules/$kernel/modules.dep" virtio_pci virtio_blk virtio_scsi sd_mod); do
    cp "$work/tree/lib/modules/$kernel/$path" "$root/modules/$n-$(basename "$path")"
    n=$((n + 1))
done
fio=$(command -v fio)
install -m 755 "$fio" "$root/bin/fio"
ldd "$fio" | awk '$3 ~ /^\// { print $3 } $1 ~ /^\// { print $1 }' | while IFS= read -r library; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
done
install -m 755 "$images_dir/load/init" "$root/init"
clamp_mtimes "$root"
(cd "$root" && find . -mindepth 1 | sort | cpio --quiet --reproducible -o -H newc -R 0:0) | lz4 -l -q -1 >"$work/staging/load.initrd"
cp "$work/tree/boot/vmlinuz-$kernel" "$work/staging/load.vmlinuz"
publish "$outdir" load "$key" "$work/staging" "kernel=$kernel"
