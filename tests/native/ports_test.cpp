// needs: links/rdma/port.cpp
//
// What is wrong with ports and between them: each error names the device, and what to do.

#if __has_include(<infiniband/verbs.h>)

#include <arpa/inet.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "check.hpp"
#include "core/link.hpp"
#include "links/rdma/port.hpp"

using namespace aiocomm;
using namespace aiocomm::rdma;

namespace {

// A machine with one device that nothing but this test knows, so the kernel tells nothing of its addresses.
struct Machine {
  bool module = true, device = true, opens = true, shares = true;
  ibv_transport_type transport = IBV_TRANSPORT_IB;
  ibv_port_state state = IBV_PORT_ACTIVE;
  uint8_t layer = IBV_LINK_LAYER_INFINIBAND;
  bool address = true;
  uint16_t partitions[3] = {0xffff, 0, 0};
  uint8_t flags = 0;
} g_machine;

Verbs pretended() {
  static ibv_device device{};
  static ibv_device* list[] = {&device, nullptr};
  static ibv_context context{};
  Verbs verbs{};
  verbs.get_device_list = [](int* count) {
    *count = g_machine.device;
    device.transport_type = g_machine.transport;
    errno = ENOSYS;
    return g_machine.module ? list : nullptr;
  };
  verbs.free_device_list = [](ibv_device**) {};
  verbs.get_device_name = [](ibv_device*) -> const char* { return "test_0"; };
  verbs.open_device = [](ibv_device*) -> ibv_context* {
    errno = EACCES;
    return g_machine.opens ? &context : nullptr;
  };
  verbs.close_device = [](ibv_context*) { return 0; };
  verbs.query_device = [](ibv_context*, ibv_device_attr* attributes) {
    attributes->phys_port_cnt = 1;
    attributes->max_srq = g_machine.shares;
    attributes->max_qp_init_rd_atom = 128;
    attributes->max_qp_rd_atom = 4;
    return 0;
  };
  verbs.query_port = [](ibv_context*, uint8_t, _compat_ibv_port_attr* out) {
    auto attributes = reinterpret_cast<ibv_port_attr*>(out);
    attributes->state = g_machine.state;
    attributes->link_layer = g_machine.layer;
    attributes->active_mtu = IBV_MTU_4096;
    attributes->gid_tbl_len = 4;
    attributes->pkey_tbl_len = 3;
    attributes->flags = g_machine.flags;
    return 0;
  };
  verbs.query_gid = [](ibv_context*, uint8_t, int, ibv_gid* gid) {
    std::memset(gid, 0, sizeof *gid);
    if (g_machine.address) inet_pton(AF_INET6, "fe80::1:2:3:4", gid->raw);
    return 0;
  };
  verbs.query_pkey = [](ibv_context*, uint8_t, int index, __be16* key) {
    *key = htons(g_machine.partitions[index]);
    return 0;
  };
  return verbs;
}

void complains(int code, std::initializer_list<const char*> words, const std::function<void()>& call) {
  try {
    call();
  } catch (const LinkFailure& failure) {
    std::string text = failure.what();
    for (const char* word : words)
      if (text.find(word) == std::string::npos) {
        std::fprintf(stderr, "'%s' does not say '%s'\n", text.c_str(), word);
        std::abort();
      }
    CHECK(failure.code == code);
    return;
  }
  std::fprintf(stderr, "no complaint of %s\n", *words.begin());
  std::abort();
}

void one_machine() {
  Verbs verbs = pretended();
  std::vector<LeftOut> left_out;
  auto choose = [&](Selection selection = {}) { return choose_ports(verbs, selection, left_out); };
  g_machine = {};
  CHECK(choose().size() == 1 && choose()[0].address.pkey == 0xffff);
  CHECK(choose()[0].reads == 16 && choose()[0].address.reads == 4 && !choose()[0].address.routed);
  g_machine = {.flags = IBV_QPF_GRH_REQUIRED};
  CHECK(choose()[0].address.routed);
  g_machine = {};
  CHECK(choose({{"test_0:1"}}).size() == 1);
  complains(ENODEV, {"AIOCOMM_RDMA_DEVICES names test_0:2, which", "it has test_0"},
            [&] { choose({{"test_0:2"}}); });
  complains(ENODEV, {"AIOCOMM_RDMA_DEVICES names other, which", "it has test_0"},
            [&] { choose({{"test_0", "other"}}); });  // the next rail would take its place
  g_machine = {.module = false};
  complains(ENODEV, {"no verbs device (no kernel module", "rdma link add", "aiocomm doctor"},
            [&] { choose(); });
  g_machine = {.device = false};
  complains(ENODEV, {"no verbs device", "rdma link add"}, [&] { choose(); });
  g_machine = {.opens = false};
  complains(EACCES, {"device test_0", "give this user access to /dev/infiniband"}, [&] { choose(); });
  complains(EACCES, {"give this user access"}, [&] { choose({{"test_0:1"}}); });  // nobody knows its ports
  complains(EACCES, {"--device /dev/infiniband"}, [&] { choose(); });
  for (ibv_transport_type other : {IBV_TRANSPORT_IWARP, IBV_TRANSPORT_UNSPECIFIED, IBV_TRANSPORT_UNKNOWN}) {
    g_machine = {.transport = other};
    complains(EOPNOTSUPP, {"device test_0", "iWARP, EFA", "link tcp"}, [&] { choose(); });
    complains(EOPNOTSUPP, {"iWARP, EFA"}, [&] { choose({{"test_0:1"}}); });
  }
  g_machine = {.shares = false};
  complains(EOPNOTSUPP, {"device test_0", "no shared receive queues", "AIOCOMM_RDMA_DEVICES", "link tcp"},
            [&] { choose(); });
  g_machine = {.state = IBV_PORT_DOWN};
  complains(ENETDOWN, {"device test_0 port 1", "not active", "plug the cable", "subnet manager"},
            [&] { choose(); });
  g_machine = {.layer = IBV_LINK_LAYER_ETHERNET};
  complains(EADDRNOTAVAIL, {"device test_0 port 1", "no RoCE v2 address", "IP address"}, [&] { choose(); });
  g_machine = {.address = false};
  complains(EADDRNOTAVAIL, {"device test_0 port 1", "GID index 0", "aiocomm doctor"}, [&] { choose(); });
}

// Limited members do not hear each other, and some machines are that of the first partition.
void partitions() {
  Verbs verbs = pretended();
  auto chosen = [&](uint16_t first, uint16_t second, uint16_t third) {
    g_machine = {.partitions = {first, second, third}};
    std::vector<LeftOut> left_out;
    const Port port = choose_ports(verbs, {}, left_out)[0];
    return std::pair<int, int>(port.pkey_index, port.address.pkey);
  };
  CHECK(chosen(0xffff, 0x8001, 0) == std::pair(0, 0xffff));
  CHECK(chosen(0x7fff, 0x8001, 0x8002) == std::pair(1, 0x8001));
  CHECK(chosen(0x7fff, 0x0001, 0x0002) == std::pair(0, 0x7fff));
  CHECK(chosen(0, 0x0001, 0x8000) == std::pair(1, 0x0001));  // 0 is no partition, for full members neither
  CHECK(chosen(0, 0, 0) == std::pair(0, 0));
}

Address at(const char* gid, uint16_t partition = 0xffff, uint8_t layer = IBV_LINK_LAYER_INFINIBAND) {
  Address address;
  inet_pton(AF_INET6, gid, address.gid.raw);
  address.pkey = partition;
  address.mtu = IBV_MTU_4096;
  address.link_layer = layer;
  return address;
}

void two_ports() {
  Port ours{"test_0", 1, 0, -1, at("fe80::1")};
  check_reach(ours, at("fe80::2"));
  check_reach(ours, at("fe80::2", 0x7fff));  // a limited member of the same partition
  Port limited{"test_0", 1, 0, -1, at("fe80::1", 0x7fff)};
  check_reach(limited, at("fe80::2"));
  complains(EACCES, {"device test_0 port 1", "limited members", "subnet manager"},
            [&] { check_reach(limited, at("fe80::2", 0x7fff)); });
  complains(EACCES, {"device test_0 port 1", "another partition", "partition key"},
            [&] { check_reach(ours, at("fe80::2", 0x8001)); });
  complains(ENETUNREACH,
            {"device test_0 port 1", "fec0::2", "another InfiniBand subnet", "AIOCOMM_RDMA_DEVICES"},
            [&] { check_reach(ours, at("fec0::2")); });
  complains(EPROTONOSUPPORT, {"device test_0 port 1", "InfiniBand", "Ethernet", "AIOCOMM_RDMA_DEVICES"},
            [&] { check_reach(ours, at("::ffff:10.0.0.1", 0xffff, IBV_LINK_LAYER_ETHERNET)); });
  Port roce{"test_0", 1, 0, -1, at("::ffff:10.0.0.1", 0xffff, IBV_LINK_LAYER_ETHERNET)};
  check_reach(roce, at("::ffff:10.9.0.1", 0xffff, IBV_LINK_LAYER_ETHERNET));  // routers are not our matter
}

void cards() {
  std::vector<Port> ports{{"test_0", 1, 0, -1, at("fe80::1")}, {"test_1", 1, 0, -1, at("fe80::2", 0x8001)}};
  ports[1].address.reads = 16;
  ports[1].address.routed = true;
  std::string card = encode_card(ports);
  auto addresses = decode_card(card);
  CHECK(addresses[0].reads == 1 && !addresses[0].routed && addresses[1].reads == 16 && addresses[1].routed);
  CHECK(addresses.size() == 2 && addresses[1].pkey == 0x8001 && addresses[0].mtu == IBV_MTU_4096);
  complains(EPROTO, {"another version", "same release"}, [&] { decode_card("\x09" + card.substr(1)); });
  complains(EPROTO, {"another version"}, [&] { decode_card(""); });
  complains(EPROTO, {"makes no sense"}, [&] { decode_card(card.substr(0, card.size() - 1)); });
  complains(EPROTO, {"makes no sense"}, [&] { decode_card(card.substr(0, 1) + "\x09" + card.substr(2)); });
  for (uint8_t reads : {0, 17}) {
    ports[0].address.reads = reads;
    complains(EPROTO, {"makes no sense"}, [&] { decode_card(encode_card(ports)); });
  }
  ports[0].address.reads = 1;
  ports[0].address.mtu = 77;
  complains(EPROTO, {"makes no sense"}, [&] { decode_card(encode_card(ports)); });
}

}  // namespace

int main() {
  one_machine();
  partitions();
  two_ports();
  cards();
}

#else
int main() {}  // built without the headers of libibverbs, as the link is
#endif
