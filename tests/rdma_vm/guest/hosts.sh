# Two "hosts" (a, b) with two rails each, in one network namespace: soft-RoCE of Linux 6.1 works in no other. Every packet
# goes over a veth pair, so loss (tc … netem) and links set down are real.
#
#   rail 0: rxea0 on a0, 10.20.0.1  <->  rxeb0 on b0, 10.20.0.2
#   rail 1: rxea1 on a1, 10.21.0.1  <->  rxeb1 on b1, 10.21.0.2        GID index 1 is the RoCE v2 one with the IPv4 address
ip link set lo up
modprobe -a rdma_rxe veth sch_netem rdma_ucm ib_uverbs
ip rule add pref 100 lookup local 2>/dev/null
ip rule del pref 0 2>/dev/null
for r in 0 1; do
  ip link add a$r type veth peer name b$r
  ip addr add 10.2$r.0.1/32 dev a$r
  ip addr add 10.2$r.0.2/32 dev b$r
  for d in a$r b$r; do
    echo 1 >/proc/sys/net/ipv4/conf/$d/accept_local
    echo 0 >/proc/sys/net/ipv4/conf/$d/rp_filter
    echo 0 >/proc/sys/net/ipv4/conf/$d/arp_ignore
    ip link set $d mtu 4200 up
  done
  ip route add 10.2$r.0.2 dev a$r table 10$r
  ip rule add pref 1$r iif lo to 10.2$r.0.2 lookup 10$r
  ip route add 10.2$r.0.1 dev b$r table 11$r
  ip rule add pref 2$r iif lo to 10.2$r.0.1 lookup 11$r
done
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
for r in 0 1; do
  rdma link add rxea$r type rxe netdev a$r
  rdma link add rxeb$r type rxe netdev b$r
done
