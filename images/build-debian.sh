#!/usr/bin/env bash
# build-debian.sh OUTDIR [--profile fast|stock] [--rebuild] [--rebuild-disk SEED]
#
# Builds a Debian 12 cloud image out of Debian's packages: systemd, Debian's cloud-init, sshd and
# the cloud kernel, on a GPT disk that starts under SeaBIOS, under OVMF and by direct kernel start.
#
#   fast   (default) trimmed for starting under software emulation; files are named debian-12.*
#   stock  Debian's defaults; files are named debian-12-stock.*
#
# Writes NAME.raw, NAME.qcow2, NAME.vmlinuz, NAME.initrd, NAME.cmdline, NAME.packages and
# NAME.manifest.json.  Unchanged scripts and settings: returns at once; --rebuild builds anyway,
# with packages of today.  --rebuild-disk SEED makes NAME-rebuilt.raw as well: the same files in a
# file system made anew, with another UUID, another hash seed and nearly every file elsewhere.
#
# Runs as root, or as a user who may be root in a user namespace.  See README.md.
images_dir=$(cd "$(dirname "$0")" && pwd)
. "$images_dir/lib.sh"

outdir='' profile=fast rebuild='' rebuild_seed=''
while [ $# -gt 0 ]; do
    case $1 in
        --profile) profile=${2:-}; shift ;;
        --rebuild) rebuild=1 ;;
        --rebuild-disk) rebuild_seed=${2:-}; shift ;;
        -*) die "unknown option \`$1\`" "usage: $0 OUTDIR [--profile fast|stock] [--rebuild] [--rebuild-disk SEED]" ;;
        *) outdir=$1 ;;
    esac
    shift
done
[ -n "$outdir" ] || die "no output folder given" "usage: $0 OUTDIR [--profile fast|stock] [--rebuild] [--rebuild-disk SEED]"
case $profile in
    fast) name=debian-12 ;;
    stock) name=debian-12-stock ;;
    *) die "unknown profile \`$profile\`" "the profiles are fast and stock" ;;
esac

packages=(systemd-sysv udev dbus kmod linux-image-cloud-amd64 initramfs-tools zstd busybox-static
    cloud-init cloud-guest-utils openssh-server sudo qemu-guest-agent systemd-resolved
    iproute2 iputils-ping netbase curl ca-certificates)
package_options=(--variant=minbase --architectures=amd64 --include="$(IFS=,; echo "${packages[*]}")"
    --aptopt='Apt::Install-Recommends "false"' --aptopt='Acquire::Languages "none"'
    --dpkgopt=force-unsafe-io
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright'
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-include=/usr/share/locale/locale.alias'
    --dpkgopt='path-exclude=/usr/share/i18n/*')

mkdir -p "$outdir/cache"
outdir=$(cd "$outdir" && pwd)
mapfile -t scripts < <(find "$images_dir/debian" -type f | sort)
packages_key=$(cache_key "${package_options[*]}" -- /dev/null)
key=$(cache_key "$packages_key $profile" -- "$images_dir/build-debian.sh" "$images_dir/lib.sh" "$images_dir/initrd-init.sh" "${scripts[@]}")
packages_tar=$outdir/cache/debian-12-packages-$packages_key.tar.zst
tree_tar=$outdir/cache/$name-tree-$key.tar.zst

one_build_at_a_time "$outdir"
if [ -n "$rebuild" ]; then rm -f "$outdir/$name.manifest.json" "$tree_tar" "$packages_tar"; fi

work=''
cleanup() { [ -z "$work" ] || as_root rm -rf "$work"; }
trap cleanup EXIT

prepare() {
    [ -z "$work" ] || return 0
    need mmdebstrap mmdebstrap zstd zstd
    need_for_disk
    need_root_or_namespace
    work=$(mktemp -d "$outdir/.work.XXXXXX")
    mkdir "$work/staging"
}

# Packages, installed but not configured for anything: about a minute, so they have a cache of
# their own, and a change to a profile costs seconds.
install_packages() {
    [ ! -e "$packages_tar" ] || return 0
    local option sources=() options=("${package_options[@]}")
    log "packages: mmdebstrap"
    while IFS= read -r option; do options+=(--aptopt="$option"); done < <(nested_apt_options)
    debian_sources >"$work/sources.list"
    if [ ! -s "$work/sources.list" ] && [ "$(id -u)" = 0 ]; then
        apt-get update >&2
        debian_sources >"$work/sources.list"
    fi
    # Without Debian 12 entries of this machine's own, mmdebstrap uses Debian's default mirror.
    if [ -s "$work/sources.list" ]; then sources=("$work/sources.list"); fi
    if [ "$(id -u)" = 0 ]; then
        mkdir "$work/tmp"
        options+=(--mode=root)
        export TMPDIR=$work/tmp
    else
        options+=(--mode=unshare) # its user must be able to reach the temporary folder: leave TMPDIR alone
    fi
    mmdebstrap --quiet "${options[@]}" --format=tar bookworm - "${sources[@]}" | zstd -1 -q -T0 -o "$work/packages.tar.zst"
    unset TMPDIR
    rm -f "$outdir"/cache/debian-12-packages-*
    mv "$work/packages.tar.zst" "$packages_tar"
}

configure_tree() {
    [ ! -e "$tree_tar" ] || return 0
    log "$name: configure"
    as_root "$images_dir/debian/configure.sh" "$profile" "$packages_tar" "$work/tree.tar.zst" "$key"
    rm -f "$outdir/cache/$name-tree-"*
    mv "$work/tree.tar.zst" "$tree_tar"
}

# disk_from_tree OUT.raw FILESYSTEM_SEED BYTES_PER_INODE
disk_from_tree() { as_root "$images_dir/debian/disk.sh" "$tree_tar" "$1" "$2" "$3" "$work/staging/$name"; }

build_image() {
    prepare
    install_packages
    configure_tree
    log "$name: disk"
    disk_from_tree "$work/staging/$name.raw" bulbil-debian 16384
    log "$name: qcow2"
    qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd "$work/staging/$name.raw" "$work/staging/$name.qcow2"
    publish "$outdir" "$name" "$key" "$work/staging" "profile=$profile" "kernel=$(cat "$work/staging/$name.kernel-version")"
}

build_rebuilt_disk() {
    local rebuilt=$name-rebuilt rebuilt_key
    rebuilt_key=$(cache_key "$key $rebuild_seed" -- /dev/null)
    if is_current "$outdir" "$rebuilt" "$rebuilt_key"; then
        log "unchanged: $outdir/$rebuilt.raw"
        return 0
    fi
    prepare
    install_packages
    configure_tree
    log "$rebuilt: disk"
    # Another number of inodes: their tables differ in size, so nearly every file lies elsewhere.
    disk_from_tree "$work/staging/$rebuilt.raw" "$rebuild_seed" 12288
    publish "$outdir" "$rebuilt" "$rebuilt_key" "$work/staging" "profile=$profile" "seed=$rebuild_seed"
}

if is_current "$outdir" "$name" "$key"; then log "unchanged: $outdir/$name.raw"; else build_image; fi
if [ -n "$rebuild_seed" ]; then build_rebuilt_disk; fi
