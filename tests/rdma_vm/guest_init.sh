#!/bin/busybox sh
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
# The guest's first process: modules, the host's files under an overlay, Soft-RoCE devices, the command, the end.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec </dev/null >/dev/console 2>&1

power_off() {
  sync
  poweroff -f
  sleep 60 # never return: a kernel whose first process ends panics
}
give_up() {
  echo "guest: $*"
  power_off
}
# By env: busybox would take its own ip and tc, which know neither veth nor netem.
inside() { chroot /root /usr/bin/env PATH=/usr/sbin:/usr/bin "$@"; }

. /job/settings
for module in $modules; do
  insmod "/modules/$module.ko" || give_up "module $module does not load"
done

# Nothing below changes while the guest runs, so that the guest may cache all of it.
shared=trans=virtio,version=9p2000.L,msize=512000
mkdir -p /host /packages /memory /root
mount -t 9p -o $shared,cache=loose,ro host /host || give_up "no host file system"
mount -t 9p -o $shared,cache=loose,ro packages /packages || give_up "no packages"
mount -t tmpfs -o size=90% tmpfs /memory
mkdir /memory/changed /memory/work
mount -t overlay -o lowerdir=/packages:/host,upperdir=/memory/changed,workdir=/memory/work overlay /root ||
  give_up "no overlay of packages and host"
# Folders that the command may write to: their changes reach the host at once.
while read -r tag folder; do
  mount -t 9p -o $shared,cache=mmap "$tag" "/root$folder" || give_up "cannot share $folder"
done </job/writable
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
mount -t devtmpfs devtmpfs /root/dev
mkdir -p /root/dev/pts /root/dev/shm
mount -t devpts devpts /root/dev/pts
mount -t tmpfs -o mode=1777,size=90% tmpfs /root/dev/shm
mount -t tmpfs -o mode=755 tmpfs /root/run
ln -sf /proc/self/fd /root/dev/fd
ln -sf fd/0 /root/dev/stdin
ln -sf fd/1 /root/dev/stdout
ln -sf fd/2 /root/dev/stderr

hostname rdma-vm
ip link set lo up
if [ "$linked" ]; then
  # Both ends of the cable are here. Soft-RoCE binds a packet to its own interface, so a host route brings it onto
  # the cable; the peer's end must then take a packet that comes from one of this machine's own addresses.
  inside ip link add rdma0 type veth peer name rdma1
  echo 1 >/proc/sys/net/ipv4/conf/all/accept_local
  echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
fi
rail=0
while [ $rail -lt "$rails" ]; do
  address=10.77.$rail.1
  [ "$linked" ] && address=10.77.0.$((rail + 1))
  [ "$linked" ] || ip link add rdma$rail type dummy
  echo 0 >/proc/sys/net/ipv4/conf/rdma$rail/rp_filter
  ip link set rdma$rail mtu "$mtu" up
  ip addr add $address/24 dev rdma$rail
  inside rdma link add rxe$rail type rxe netdev rdma$rail || give_up "no Soft-RoCE device on rdma$rail"
  rail=$((rail + 1))
done
if [ "$linked" ]; then
  ip route add 10.77.0.2/32 dev rdma0 src 10.77.0.1
  ip route add 10.77.0.1/32 dev rdma1 src 10.77.0.2
fi
if [ "$netem" ]; then
  for interface in rdma0 rdma1; do
    # shellcheck disable=SC2086 # several words on purpose
    inside tc qdisc add dev $interface root netem $netem || give_up "tc refuses netem $netem"
  done
fi

# Shortly before the host's time limit: what still runs and what the devices count, which the host then prints.
last_words() {
  read -r up _ </proc/uptime
  sleep $((speak_after - ${up%%.*}))
  echo "guest: its time is nearly up; still running:"
  ps -o pid,stat,args | grep -v ' \[.*\]$'
  inside rdma resource show qp
  for count in /sys/class/infiniband/*/ports/1/hw_counters/*; do
    [ "$(cat "$count")" = 0 ] || echo "$count $(cat "$count")"
  done
}
if [ "$speak_after" ]; then last_words & fi

# A virtio port can be opened once, but a command may open /dev/stdout again: it gets pipes. Whatever it leaves behind
# is ended, or the pipes would stay open; the two relays end by themselves, once all is through.
for port in /sys/class/virtio-ports/*; do
  read -r name <"$port/name"
  eval "port_$name=/dev/${port##*/}"
done
mkfifo /pipe_out /pipe_err
cat </pipe_out >"$port_out" &
relays=" $! "
cat </pipe_err >"$port_err" &
relays="$relays$! "
ulimit -l unlimited
chroot /root /bin/bash -c "$(cat /job/command)" >/pipe_out 2>/pipe_err
code=$?
for process in /proc/[0-9]*; do
  process=${process#/proc/}
  case "$relays 1 " in *" $process "*) ;; *) kill -9 "$process" ;; esac
done
wait
echo "$code" >"$port_code"
power_off
