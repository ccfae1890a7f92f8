#!/bin/busybox sh
# First process of the guest: the machine's root, read-only and shared, under a layer that is thrown away; then the job.
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1  # the archive has no device files, so nothing was open until now
for module in /modules/*; do $b insmod "$module" || echo "guest: $module does not load"; done
# The shared tree does not change while the guest runs: it may be cached without asking again, which emulation needs.
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose root /lower || exec $b poweroff -f
$b mount -t tmpfs tmpfs /over
$b mkdir /over/upper /over/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work overlay /new || exec $b poweroff -f
$b mkdir -p /new/run/aiocomm /new/proc /new/sys /new/dev
for mounted in proc sys dev; do $b mount --move /$mounted /new/$mounted; done
$b mount -t tmpfs run /new/run
$b mkdir -p /new/run/aiocomm
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288 results /new/run/aiocomm || exec $b poweroff -f
$b mkdir -p /new/dev/pts /new/dev/shm
$b mount -t devpts devpts /new/dev/pts; $b mount -t tmpfs shm /new/dev/shm
exec $b switch_root /new /bin/sh /run/aiocomm/first.sh
