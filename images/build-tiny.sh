#!/usr/bin/env bash
# build-tiny.sh OUTDIR [--rebuild]
#
# Builds the image for quick launch tests: Debian's cloud kernel, static busybox, dropbear and
# tiny/rc, a start-up script that behaves like a very small cloud-init.  It is ready about five
# seconds after a start under software emulation.  Writes tiny.raw, tiny.qcow2, tiny.vmlinuz,
# tiny.initrd, tiny.cmdline, tiny.packages and tiny.manifest.json.
#
# Runs as root, under fakeroot, or as a user who may be root in a user namespace: files in the
# image belong to root.  See README.md.
images_dir=$(cd "$(dirname "$0")" && pwd)
. "$images_dir/lib.sh"

outdir='' rebuild=''
while [ $# -gt 0 ]; do
    case $1 in
        --rebuild) rebuild=1 ;;
        -*) die "unknown option \`$1\`" "usage: $0 OUTDIR [--rebuild]" ;;
        *) outdir=$1 ;;
    esac
    shift
done
[ -n "$outdir" ] || die "no output folder given" "usage: $0 OUTDIR [--rebuild]"
mkdir -p "$outdir"
outdir=$(cd "$outdir" && pwd)
mapfile -t scripts < <(find "$images_dir/tiny" -type f | sort)
key=$(cache_key tiny -- "$images_dir/build-tiny.sh" "$images_dir/lib.sh" "$images_dir/initrd-init.sh" "${scripts[@]}")

one_build_at_a_time "$outdir"
if [ -z "$rebuild" ] && is_current "$outdir" tiny "$key"; then
    log "unchanged: $outdir/tiny.raw"
    exit 0
fi
need apt-get apt dpkg-deb dpkg
need_for_disk
need_root_or_namespace
work=$(mktemp -d "$outdir/.work.XXXXXX")
trap 'as_root rm -rf "$work"' EXIT
mkdir "$work/debs" "$work/staging"

log "packages: download"
if [ -z "$(debian_sources)" ] && [ "$(id -u)" = 0 ]; then apt-get update >&2; fi
[ -n "$(debian_sources)" ] || die "this machine's apt has no Debian 12 package lists" \
    "run sudo apt-get update; on another system build the Debian image instead: cargo xtask guest-image"
kernel_package=$(apt-cache show --no-all-versions linux-image-cloud-amd64 | sed -nE 's/^Depends: (linux-image-[^ ]+).*/\1/p')
[ -n "$kernel_package" ] || die "the package lists have no cloud kernel"
(cd "$work/debs" && apt-get -qq -o APT::Sandbox::User=root download "$kernel_package" busybox-static dropbear-bin \
    libc6 libcrypt1 libtomcrypt1 libtommath1 libgmp10 zlib1g)
for deb in "$work"/debs/*.deb; do dpkg-deb -W --showformat='${Package}=${Version}\n' "$deb"; done >"$work/staging/tiny.packages"

log "tiny: disk"
as_root "$images_dir/tiny/make-disk.sh" "$work/debs" "$work/staging"
qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd "$work/staging/tiny.raw" "$work/staging/tiny.qcow2"
publish "$outdir" tiny "$key" "$work/staging" "kernel=${kernel_package#linux-image-}"
