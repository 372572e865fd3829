#!/usr/bin/env bash
# build-server-disks.sh OUTDIR
#
# Builds four disks of 4 GiB that measurements store one after another, each one ext4 file system:
#
#   server.raw           Debian 12 with kernel, systemd, cloud-init, Docker and build-essential
#   server-updated.raw   the same disk, nginx, redis and a Java runtime installed in place
#   server-remade.raw    the files of the updated one in a file system made anew
#   server-again.raw     the files of the first one in a file system made anew
#
# What is there already is kept.  Runs as root: the update in place mounts a loop device.
images_dir=$(cd "$(dirname "$0")" && pwd)
. "$images_dir/lib.sh"

[ $# = 1 ] || die "one output folder is needed" "usage: $0 OUTDIR"
[ "$(id -u)" = 0 ] || die "the disk that is updated in place is mounted, which needs root"
need mmdebstrap mmdebstrap mke2fs e2fsprogs rsync rsync losetup mount zstd zstd
mkdir -p "$1"
outdir=$(cd "$1" && pwd)
one_build_at_a_time "$outdir"
[ ! -e "$outdir/server-again.raw" ] || { log "unchanged: $outdir/server*.raw"; exit 0; }

readonly SIZE=4096M
base=linux-image-cloud-amd64,systemd-sysv,udev,cloud-init,openssh-server,sudo,docker.io,build-essential,git,curl,ca-certificates,netbase,iproute2
more=nginx,redis-server,default-jre-headless

work=$(mktemp -d "$outdir/.work.XXXXXX")
mounted=''
cleanup() {
    [ -z "$mounted" ] || umount "$mounted"
    rm -rf "$work"
}
trap cleanup EXIT

# install_tree DIR PACKAGES
install_tree() {
    local option options=() sources=()
    while IFS= read -r option; do options+=(--aptopt="$option"); done < <(nested_apt_options)
    debian_sources >"$work/sources.list"
    if [ -s "$work/sources.list" ]; then sources=("$work/sources.list"); fi
    TMPDIR=$work mmdebstrap --quiet --mode=root --variant=minbase --architectures=amd64 --include="$2" \
        --aptopt='Acquire::Languages "none"' --dpkgopt=force-unsafe-io "${options[@]}" --format=directory \
        bookworm "$1" "${sources[@]}" >&2
}

# file_system OUT TREE SEED
file_system() {
    mke2fs -q -t ext4 -d "$2" -U "$(guid "$3-fs")" -m 1 \
        -E "hash_seed=$(guid "$3-hash"),lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0" "$1" "$SIZE"
}

log "server: packages"
install_tree "$work/base" "$base"
log "server: more packages"
install_tree "$work/updated" "$base,$more"
log "server: disks"
file_system "$work/server.raw" "$work/base" server
cp --sparse=always "$work/server.raw" "$work/server-updated.raw"
mkdir "$work/mnt"
mount -o loop "$work/server-updated.raw" "$work/mnt"
mounted=$work/mnt
# What is the same is left where it is, as a package manager does.
rsync -aHAX --checksum --no-times --delete --exclude /lost+found "$work/updated/" "$work/mnt/"
umount "$work/mnt"
mounted=''
file_system "$work/server-remade.raw" "$work/updated" remade
file_system "$work/server-again.raw" "$work/base" again
for name in server server-updated server-remade server-again; do mv "$work/$name.raw" "$outdir/$name.raw"; done
du -h "$outdir"/server*.raw >&2
