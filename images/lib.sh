# shellcheck shell=bash
# What build-debian.sh and build-tiny.sh share.  Sourced, never run.
#
#   where packages come from    debian_sources, nested_apt_options
#   who may write root's files  as_root
#   small initramfs             make_initrd, modules_in_load_order
#   disk                        make_disk (GPT, ext4, GRUB for BIOS and UEFI)
#   output and cache            cache_key, is_current, publish
#
# Nothing here needs a loop device or mounts an image.

set -euo pipefail
export LC_ALL=C TZ=UTC
# One fixed time for every file that is newer, so that a rebuild differs only where packages do.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-1735689600}" # 2025-01-01T00:00:00Z
export E2FSPROGS_FAKE_TIME="$SOURCE_DATE_EPOCH"
export PATH="$PATH:/usr/sbin:/sbin" # mke2fs and sfdisk, for users other than root
umask 022

# The partitions of Debian's own cloud images, with smaller numbers: 1 is the root and lies last,
# so that growpart can grow it; 14 is GRUB's BIOS boot partition, 15 the EFI system partition.
readonly BIOS_START_MIB=1 BIOS_MIB=1
readonly ESP_START_MIB=2 ESP_MIB=14
readonly ROOT_START_MIB=16

log() { printf '%s %s\n' "$(date -u +%H:%M:%S)" "$*" >&2; }

# die MESSAGE [HINT]
die() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

# need PROGRAM-OR-FILE PACKAGE ... : every missing package is named at once.
need() {
    local missing=()
    while [ $# -gt 0 ]; do
        command -v "$1" >/dev/null 2>&1 || [ -e "$1" ] || missing+=("$2")
        shift 2
    done
    [ ${#missing[@]} -eq 0 ] || die "these programs are missing: ${missing[*]}" \
        "sudo apt-get install -y --no-install-recommends ${missing[*]}   (or: cargo xtask setup)"
}

need_for_disk() {
    need sfdisk fdisk mke2fs e2fsprogs mformat mtools grub-mkimage grub-common cpio cpio lz4 lz4 depmod kmod \
        /usr/lib/grub/i386-pc/boot.img grub-pc-bin /usr/lib/grub/x86_64-efi/moddep.lst grub-efi-amd64-bin \
        qemu-img qemu-utils flock util-linux
}

# one_build_at_a_time DIR : later calls wait for the first.
one_build_at_a_time() {
    exec 9>"$1/.lock"
    flock 9
}

### Packages

# The Debian 12 entries of this machine's apt set-up, one deb line each: the image is built from
# whatever mirror the machine is set up to use, and no script names one.  Empty when there are none.
debian_sources() {
    apt-get indextargets --format '$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(SIGNED_BY)' 'Identifier: Packages' 2>/dev/null |
        awk -F'|' '$4 == "Debian" && $2 ~ /^bookworm(-updates|-security)?$/ && $3 == "main" && !seen[$1 $2]++ {
            key = ($5 ~ /^\//) ? $5 : "/usr/share/keyrings/debian-archive-keyring.gpg"
            printf "deb [signed-by=%s] %s %s %s\n", key, $1, $2, $3 }' || true
}

# Options of this machine's apt that a nested apt needs too (proxies, date checks).
nested_apt_options() {
    apt-config dump | grep -E '^Acquire::(https?::Proxy|Check-Valid-Until|Check-Date|ForceIPv4|Retries)[^ ]* ' || true
}

### Root's files without root

# as_root COMMAND... : runs COMMAND as root, or in a user namespace in which the caller is root
# and the caller's subordinate ids are the other users.  Functions and variables do not come along.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else
        unshare --user --map-auto --map-root-user --mount --pid --fork --kill-child -- "$@"
    fi
}

# Says what to do when this machine does not let this user be root in a namespace.
need_root_or_namespace() {
    [ "$(id -u)" != 0 ] || return 0
    need newuidmap uidmap unshare util-linux
    grep -q "^$(id -un):" /etc/subuid && grep -q "^$(id -un):" /etc/subgid ||
        die "$(id -un) has no subordinate user ids" \
            "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $(id -un)   (or run this script with sudo)"
    unshare --user --map-auto --map-root-user --mount --pid --fork true 2>/dev/null ||
        die "this machine does not allow user namespaces" \
            "run this script with sudo, or allow them: sudo sysctl -w kernel.unprivileged_userns_clone=1 (Debian), kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu)"
}

### Files

clamp_mtimes() { find "$1" -xdev -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +; }

# guid SEED : a stable GUID out of a string.
guid() { printf '%s' "$1" | sha256sum | sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-4\3-8\4-\5/'; }

### Initramfs

# make_initrd OUT TREE KERNEL-VERSION MODULE...
# 1.5 MB: TREE's static busybox, the named modules with what they need, and initrd-init.sh.
make_initrd() {
    local out=$1 tree=$2 kernel=$3 tmp path n=100
    shift 3
    tmp=$(mktemp -d)
    mkdir -p "$tmp"/{bin,dev,proc,sys,root,modules}
    cp "$tree/bin/busybox" "$tmp/bin/busybox"
    for path in $(modules_in_load_order "$tree/lib/modules/$kernel/modules.dep" "$@"); do
        cp "$tree/lib/modules/$kernel/$path" "$tmp/modules/$n-$(basename "$path")"
        n=$((n + 1))
    done
    install -m 755 "$images_dir/initrd-init.sh" "$tmp/init"
    clamp_mtimes "$tmp"
    (cd "$tmp" && find . -mindepth 1 | sort | cpio --quiet --reproducible -o -H newc -R 0:0) | lz4 -l -q -9 >"$out"
    rm -rf "$tmp"
}

# modules_in_load_order MODULES.DEP NAME... : the .ko paths of NAMEs and of what they need, needs first.
modules_in_load_order() {
    local dep=$1
    shift
    awk -v want="$*" '
        { file = $1; sub(/:$/, "", file)
          name = file; sub(/.*\//, "", name); sub(/\.ko.*/, "", name); gsub(/-/, "_", name)
          path[name] = file; needs = ""
          for (i = NF; i > 1; i--) needs = needs " " $i
          deps[file] = needs }
        function visit(file,   list, k, i) {
          if (done[file]) return
          done[file] = 1
          k = split(deps[file], list, " ")
          for (i = 1; i <= k; i++) visit(list[i])
          print file }
        END { k = split(want, names, " ")
              for (i = 1; i <= k; i++) if (names[i] in path) visit(path[names[i]]) }' "$dep"
}

### Disk

# make_disk OUT.raw TREE LABEL SIZE_MIB PARTITION_SEED FILESYSTEM_SEED [mke2fs option...]
#
#   LBA 0        boot.img (440 bytes) and the protective MBR
#   1 MiB        core.img: GRUB for BIOS
#   2 MiB        FAT: /EFI/BOOT/BOOTX64.EFI, GRUB for UEFI
#   16 MiB       ext4 root, to the end
#
# TREE holds /boot/grub/grub.cfg.  GRUB's prefix `(,gpt1)` means partition 1 of the disk it was
# loaded from, so it searches nothing.  PARTITION_SEED decides the partition GUIDs (the kernel's
# root=PARTUUID), FILESYSTEM_SEED the file system's UUID and its directory hash seed.
make_disk() {
    local out=$1 tree=$2 label=$3 size_mib=$4 partition_seed=$5 filesystem_seed=$6
    shift 6
    local root_mib=$((size_mib - ROOT_START_MIB - 1)) tmp
    tmp=$(mktemp -d)
    rm -f "$out"
    truncate -s "${size_mib}M" "$out"
    sfdisk -q "$out" <<TABLE
label: gpt
label-id: $(guid "$partition_seed-disk")
first-lba: 34
14 : start=${BIOS_START_MIB}MiB, size=${BIOS_MIB}MiB, type=21686148-6449-6E6F-744E-656564454649, uuid=$(guid "$partition_seed-part14"), name=bios
15 : start=${ESP_START_MIB}MiB, size=${ESP_MIB}MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=$(guid "$partition_seed-part15"), name=esp
1 : start=${ROOT_START_MIB}MiB, size=${root_mib}MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, uuid=$(guid "$partition_seed-part1"), name=root
TABLE
    # No lazy inode tables: a guest that finishes them itself writes for no reason of its own.
    mke2fs -q -t ext4 -d "$tree" -L "$label" -U "$(guid "$filesystem_seed-fs")" -m 1 \
        -E "offset=$((ROOT_START_MIB * 1048576)),hash_seed=$(guid "$filesystem_seed-hash"),lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0" \
        "$@" "$out" "${root_mib}M"
    install_grub_bios "$out" "$tmp"
    install_grub_uefi "$out" "$tmp"
    rm -rf "$tmp"
}

readonly GRUB_MODULES=(part_gpt ext2 normal configfile linux echo test boot serial terminal)

# boot.img in the MBR and core.img in its partition, with the patches that grub-bios-setup makes:
# made here, they need no device and no root.
install_grub_bios() {
    local disk=$1 tmp=$2 lba=$((BIOS_START_MIB * 2048))
    grub-mkimage -O i386-pc -p '(,gpt1)/boot/grub' -o "$tmp/core.img" biosdisk "${GRUB_MODULES[@]}"
    [ "$(stat -c %s "$tmp/core.img")" -le $((BIOS_MIB * 1048576)) ] || die "GRUB's core image does not fit its partition"
    cp /usr/lib/grub/i386-pc/boot.img "$tmp/boot.img"
    le64 "$lba" | patch_at "$tmp/boot.img" $((0x5c))          # where core.img begins
    printf '\x90\x90' | patch_at "$tmp/boot.img" $((0x66))    # two NOPs: believe the BIOS's drive number
    le64 $((lba + 1)) | patch_at "$tmp/core.img" $((0x1f4))   # where core.img goes on after its first sector
    dd if="$tmp/boot.img" of="$disk" bs=440 count=1 conv=notrunc status=none
    dd if="$tmp/core.img" of="$disk" bs=512 seek="$lba" conv=notrunc status=none
}

install_grub_uefi() {
    local disk=$1 tmp=$2
    grub-mkimage -O x86_64-efi -p '(,gpt1)/boot/grub' -o "$tmp/BOOTX64.EFI" fat "${GRUB_MODULES[@]}"
    touch -d "@$SOURCE_DATE_EPOCH" "$tmp/BOOTX64.EFI"
    truncate -s "${ESP_MIB}M" "$tmp/esp.fat"
    mformat -i "$tmp/esp.fat" -N 0b01b11d -v ESP ::
    mmd -i "$tmp/esp.fat" ::/EFI ::/EFI/BOOT
    mcopy -m -i "$tmp/esp.fat" "$tmp/BOOTX64.EFI" ::/EFI/BOOT/BOOTX64.EFI
    dd if="$tmp/esp.fat" of="$disk" bs=1M seek="$ESP_START_MIB" conv=notrunc,sparse status=none
}

patch_at() { dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }

le64() {
    local value=$1 i
    for i in 0 8 16 24 32 40 48 56; do printf '%b' "\\x$(printf %02x $((value >> i & 255)))"; done
}

### Output and cache

# cache_key TEXT -- FILE... : 16 hex digits over the settings and the scripts.
cache_key() {
    local text=$1
    shift 2
    { printf '%s\n' "$text" "$SOURCE_DATE_EPOCH"; cat "$@"; } | sha256sum | cut -c1-16
}

# is_current OUTDIR NAME KEY : true when the finished files there were made with KEY.
is_current() { grep -qs "^  \"key\": \"$3\"" "$1/$2.manifest.json"; }

# publish OUTDIR NAME KEY STAGING FIELD=VALUE... : moves the finished files NAME.* from STAGING to
# OUTDIR and describes them in NAME.manifest.json, which is removed first and written last: where
# it exists, every file it lists is whole.
publish() {
    local outdir=$1 name=$2 key=$3 staging=$4 field file hash separator=
    shift 4
    {
        printf '{\n  "name": "%s",\n  "key": "%s",\n' "$name" "$key"
        for field in "$@"; do printf '  "%s": "%s",\n' "${field%%=*}" "${field#*=}"; done
        printf '  "files": {'
        for file in "$staging/$name".*; do
            # Two sparse gigabytes take seconds to hash, and the qcow2 has the same content.
            hash=''
            [ "${file%.raw}" != "$file" ] || hash="\"sha256\": \"$(sha256sum <"$file" | cut -c1-64)\", "
            printf '%s\n    "%s": {%s"size_bytes": %s}' "$separator" "$(basename "$file")" "$hash" "$(stat -c %s "$file")"
            separator=,
        done
        printf '\n  }\n}\n'
    } >"$staging/manifest"
    rm -f "$outdir/$name.manifest.json"
    mv "$staging/$name".* "$outdir/"
    mv "$staging/manifest" "$outdir/$name.manifest.json"
    log "ready: $outdir/$name.raw"
}
