#include "links/rdma/port.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <system_error>

#include "core/link.hpp"

namespace aiocomm::rdma {

namespace {

constexpr uint8_t kCardVersion = 2;
constexpr uint16_t kFullMember = 0x8000;
constexpr uint16_t kRocePort = 4791;  // of UDP
constexpr int kMostReads = 16;  // of a queue pair at a time: enough for any link; few devices answer less
constexpr int kGids = 256;      // that a queue pair can be told of

struct WireAddress {
  uint8_t gid[16];
  uint16_t lid, pkey;
  uint8_t mtu, link_layer, reads, routed;
};
static_assert(sizeof(WireAddress) == 24);

std::string line_of(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

bool is_zero(const ibv_gid& gid) {
  return std::all_of(gid.raw, gid.raw + sizeof gid.raw, [](uint8_t byte) { return byte == 0; });
}

bool is_ipv4(const ibv_gid& gid) {
  static constexpr uint8_t kMapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::memcmp(gid.raw, kMapped, sizeof kMapped) == 0;
}

bool is_link_local(const ibv_gid& gid) { return gid.raw[0] == 0xfe && (gid.raw[1] & 0xc0) == 0x80; }

std::string folder_of(const Port& port) {
  return "/sys/class/infiniband/" + port.device + "/ports/" + std::to_string(port.number);
}

[[noreturn]] void refuse(const std::string& port, const std::string& why, int error) {
  throw LinkFailure(port + ": " + why, error);
}

// RoCE v2 crosses routers, and is what every device has had since 2014; v1 and v2 use different indices of one table.
int best_gid(const Verbs& verbs, ibv_context* context, const Port& port, int entries,
             const std::string& name) {
  int best = -1, best_rank = 0;
  for (int i = 0; i < entries; ++i) {
    ibv_gid gid;
    if (verbs.query_gid(context, port.number, i, &gid) != 0 || is_zero(gid)) continue;
    std::string type = line_of(folder_of(port) + "/gid_attrs/types/" + std::to_string(i));
    if (type.find("RoCE v2") == std::string::npos) continue;
    int rank = is_ipv4(gid) ? 3 : is_link_local(gid) ? 1 : 2;
    if (rank > best_rank) best = i, best_rank = rank;
  }
  if (best < 0)
    refuse(name,
           "no RoCE v2 address: give its network interface an IP address, or set AIOCOMM_RDMA_GID_INDEX",
           EADDRNOTAVAIL);
  return best;
}

// The first whose full member the port is: two limited members do not hear each other.
void choose_partition(const Verbs& verbs, ibv_context* context, Port& port, uint16_t entries) {
  for (uint16_t i = 0; i < entries; ++i) {
    __be16 entry = 0;
    if (verbs.query_pkey(context, port.number, i, &entry) != 0) continue;
    const uint16_t key = ntohs(entry);
    const bool any = key & ~kFullMember, full = any && key & kFullMember;
    if (!any || (port.address.pkey && !full)) continue;
    port.address.pkey = key;
    port.pkey_index = i;
    if (full) return;
  }
}

uint8_t reads_of(int limit) { return static_cast<uint8_t>(std::clamp(limit, 1, kMostReads)); }

Port examine(const Verbs& verbs, ibv_context* context, const ibv_device_attr& limits,
             const std::string& device, uint8_t number, const Selection& selection) {
  Port port;
  port.device = device;
  port.number = number;
  std::string node = line_of("/sys/class/infiniband/" + device + "/device/numa_node");
  auto said = selection.nodes.find(device);
  port.node = said != selection.nodes.end() ? said->second : node.empty() ? -1 : std::atoi(node.c_str());
  std::string name = "device " + device + " port " + std::to_string(number);
  ibv_port_attr attributes{};
  if (int error = verbs.query_port(context, number, reinterpret_cast<_compat_ibv_port_attr*>(&attributes)))
    refuse(name, "cannot be queried: " + std::string(strerror(error)), error);
  if (attributes.state != IBV_PORT_ACTIVE)
    refuse(
        name,
        "the port is not active: plug the cable, bring its network interface up, or start the subnet manager",
        ENETDOWN);
  port.address.link_layer = attributes.link_layer;
  port.address.mtu = static_cast<uint8_t>(attributes.active_mtu);
  port.address.lid = attributes.lid;
  if (selection.gid_index >= 0)
    port.gid_index = selection.gid_index;
  else if (attributes.link_layer == IBV_LINK_LAYER_ETHERNET)
    port.gid_index = best_gid(verbs, context, port, std::min(attributes.gid_tbl_len, kGids), name);
  if (verbs.query_gid(context, number, port.gid_index, &port.address.gid) != 0 || is_zero(port.address.gid))
    refuse(name, "no address at GID index " + std::to_string(port.gid_index) + ": see `aiocomm doctor`",
           EADDRNOTAVAIL);
  choose_partition(verbs, context, port, attributes.pkey_tbl_len);
  port.reads = reads_of(limits.max_qp_init_rd_atom);
  port.address.reads = reads_of(limits.max_qp_rd_atom);
  port.address.routed = attributes.flags & IBV_QPF_GRH_REQUIRED;
  return port;
}

bool wanted(const Selection& selection, const std::string& device, uint8_t number) {
  if (selection.names.empty()) return true;
  auto is = [&](const std::string& name) {
    return name == device || name == device + ":" + std::to_string(number);
  };
  return std::any_of(selection.names.begin(), selection.names.end(), is);
}

// Rails pair up by their place, so one that is left out would have the others meet the wrong ones.
void refuse_unknown(const Selection& selection, const std::vector<std::string>& known,
                    const std::string& has) {
  for (const std::string& name : selection.names)
    if (std::find(known.begin(), known.end(), name) == known.end())
      throw LinkFailure("rdma: AIOCOMM_RDMA_DEVICES names " + name + ", which this machine does not have; " +
                            "it has " + has,
                        ENODEV);
}

size_t place(const Selection& selection, const Port& port) {
  for (size_t i = 0; i < selection.names.size(); ++i)
    if (selection.names[i] == port.device ||
        selection.names[i] == port.device + ":" + std::to_string(port.number))
      return i;
  return selection.names.size();
}

// Devices that the kernel has and the library does not list. In a container their files are often missing.
std::string unlisted() {
  std::string names;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/infiniband", none))
    names += (names.empty() ? "" : ", ") + entry.path().filename().string();
  return names;
}

[[noreturn]] void refuse_all(const std::string& why) {
  if (std::string names = unlisted(); why.empty() && !names.empty())
    throw LinkFailure(
        "rdma: the kernel has " + names +
            ", but the verbs library lists none: give this process its files (in a container: "
            "--device /dev/infiniband) and the library its drivers (apt install ibverbs-providers)",
        ENODEV);
  throw LinkFailure("rdma: this machine has no verbs device" + (why.empty() ? why : " (" + why + ")") +
                        "; soft-RoCE serves for trying: rdma link add rxe0 type rxe netdev eth0; see "
                        "`aiocomm doctor`",
                    ENODEV);
}

}  // namespace

std::vector<Port> choose_ports(const Verbs& verbs, const Selection& selection,
                               std::vector<LeftOut>& left_out) {
  int count = 0;
  ibv_device** list = verbs.get_device_list(&count);
  if (!list && errno == ENOSYS) refuse_all("no kernel module of one is loaded");
  if (!list)
    throw LinkFailure(
        "rdma: verbs devices cannot be listed: " + std::string(strerror(errno)) + "; see `aiocomm doctor`",
        errno);
  std::unique_ptr<ibv_device*, void (*)(ibv_device**)> owned(list, verbs.free_device_list);
  std::vector<Port> ports;
  std::vector<std::string> known;  // devices, and their ports
  std::string reasons, has;
  int error = ENODEV;
  for (int i = 0; i < count; ++i) {
    std::string device = verbs.get_device_name(list[i]);
    known.push_back(device);
    has += (has.empty() ? "" : ", ") + device;
    ibv_context* context = nullptr;
    auto open = [&] {
      if (context) return;
      context = verbs.open_device(list[i]);
      if (!context)
        refuse("device " + device,
               "cannot be opened (" + std::string(strerror(errno)) +
                   "): give this user access to /dev/infiniband; in a container: --device /dev/infiniband",
               errno);
    };
    ibv_device_attr attributes{};
    try {
      if (list[i]->transport_type != IBV_TRANSPORT_IB)
        refuse("device " + device,
               "it is neither InfiniBand nor RoCE (but iWARP, EFA or the like), whose queue pairs the link "
               "cannot "
               "use: let the link tcp have this network",
               EOPNOTSUPP);
      open();
      if (int failed = verbs.query_device(context, &attributes))
        refuse("device " + device, "cannot be queried: " + std::string(strerror(failed)), failed);
      if (attributes.max_srq == 0)
        refuse("device " + device,
               "it has no shared receive queues, which the link needs: name others by AIOCOMM_RDMA_DEVICES, "
               "or let "
               "the link tcp have this network",
               EOPNOTSUPP);
    } catch (const LinkFailure& failure) {
      attributes = {};  // none of its ports is looked at
      reasons += std::string(reasons.empty() ? "" : "; ") + failure.what();
      error = failure.code;
      bool named = wanted(selection, device, 0) && !selection.names.empty();
      for (const std::string& name : selection.names)
        if (name.starts_with(device + ":")) {  // nobody knows
          known.push_back(name);
          named = true;
        }
      // Of what another link serves nobody has asked for this one.
      if (named || (selection.names.empty() && failure.code != EOPNOTSUPP))
        left_out.push_back({device, failure.what()});
    }
    for (uint8_t number = 1; number <= attributes.phys_port_cnt; ++number) {
      known.push_back(device + ":" + std::to_string(number));
      if (!wanted(selection, device, number)) continue;
      try {
        ports.push_back(examine(verbs, context, attributes, device, number, selection));
      } catch (const LinkFailure& failure) {
        reasons += std::string(reasons.empty() ? "" : "; ") + failure.what();
        error = failure.code;
        if (!selection.names.empty())
          left_out.push_back({device + ":" + std::to_string(number), failure.what()});
      }
    }
    if (context) verbs.close_device(context);
  }
  if (count > 0) refuse_unknown(selection, known, has);
  std::stable_sort(ports.begin(), ports.end(),
                   [&](const Port& a, const Port& b) { return place(selection, a) < place(selection, b); });
  if (ports.size() > kMaxRails) ports.resize(kMaxRails);
  if (!ports.empty()) return ports;
  if (!reasons.empty()) throw LinkFailure("rdma: no port can be used: " + reasons, error);
  if (count > 0) throw LinkFailure("rdma: none of this machine's devices has a port", ENODEV);
  refuse_all("");
}

uint64_t heard(const Port& port) {
  for (const char* counter : {"/counters/port_rcv_packets", "/hw_counters/rcvd_pkts", "/hw_counters/rx_pkts"})
    if (std::string line = line_of(folder_of(port) + counter); !line.empty())
      return std::strtoull(line.c_str(), nullptr, 10);
  return 0;
}

std::string describe(const Address& address) {
  char text[INET6_ADDRSTRLEN];
  if (is_ipv4(address.gid))
    inet_ntop(AF_INET, address.gid.raw + 12, text, sizeof text);
  else
    inet_ntop(AF_INET6, address.gid.raw, text, sizeof text);
  return text;
}

std::string encode_card(const std::vector<Port>& ports) {
  std::string card{static_cast<char>(kCardVersion), static_cast<char>(ports.size())};
  for (const Port& port : ports) {
    WireAddress wire{};
    std::memcpy(wire.gid, port.address.gid.raw, sizeof wire.gid);
    wire.lid = port.address.lid;
    wire.pkey = port.address.pkey;
    wire.mtu = port.address.mtu;
    wire.link_layer = port.address.link_layer;
    wire.reads = port.address.reads;
    wire.routed = port.address.routed;
    card.append(reinterpret_cast<const char*>(&wire), sizeof wire);
  }
  return card;
}

std::vector<Address> decode_card(std::string_view card) {
  if (card.size() < 2 || static_cast<uint8_t>(card[0]) != kCardVersion)
    throw LinkFailure("rdma: the peer's card is of another version: use the same release on both sides",
                      EPROTO);
  size_t count = static_cast<uint8_t>(card[1]);
  if (count == 0 || count > kMaxRails || card.size() != 2 + count * sizeof(WireAddress))
    throw LinkFailure("rdma: the peer's card makes no sense", EPROTO);
  std::vector<Address> addresses;
  for (size_t i = 0; i < count; ++i) {
    WireAddress wire;
    std::memcpy(&wire, card.data() + 2 + i * sizeof wire, sizeof wire);
    if (wire.mtu < IBV_MTU_256 || wire.mtu > IBV_MTU_4096 || wire.reads < 1 || wire.reads > kMostReads)
      throw LinkFailure("rdma: the peer's card makes no sense", EPROTO);
    Address& address = addresses.emplace_back();
    std::memcpy(address.gid.raw, wire.gid, sizeof wire.gid);
    address.lid = wire.lid;
    address.pkey = wire.pkey;
    address.mtu = wire.mtu;
    address.link_layer = wire.link_layer;
    address.reads = wire.reads;
    address.routed = wire.routed;
  }
  return addresses;
}

void check_reach(const Port& ours, const Address& theirs) {
  std::string name = "device " + ours.device + " port " + std::to_string(ours.number);
  if (ours.address.link_layer != theirs.link_layer)
    refuse(name,
           "one side is InfiniBand and the other Ethernet: choose matching ports by AIOCOMM_RDMA_DEVICES",
           EPROTONOSUPPORT);
  if (ours.address.link_layer == IBV_LINK_LAYER_ETHERNET) return;
  if (std::memcmp(ours.address.gid.raw, theirs.gid.raw, 8) != 0)
    refuse(
        name,
        "the peer (" + describe(theirs) +
            ") is on another InfiniBand subnet: order the ports alike on both sides by AIOCOMM_RDMA_DEVICES",
        ENETUNREACH);
  if ((ours.address.pkey & ~kFullMember) != (theirs.pkey & ~kFullMember))
    refuse(name,
           "the peer is in another partition: ask for one partition key on both ports at the subnet manager",
           EACCES);
  if (!((ours.address.pkey | theirs.pkey) & kFullMember))
    refuse(
        name,
        "both ports are limited members of their partition, which do not hear each other: make one of them a "
        "full member at the subnet manager",
        EACCES);
}

void check_route(const Port& ours, const Address& theirs) {
  if (ours.address.link_layer != IBV_LINK_LAYER_ETHERNET) return;  // the subnet manager's matter
  if (is_link_local(ours.address.gid) || is_link_local(theirs.gid)) return;
  auto socket_address = [](const ibv_gid& gid, uint16_t port) {
    sockaddr_in6 address{};
    address.sin6_family = AF_INET6;
    address.sin6_port = htons(port);
    std::memcpy(&address.sin6_addr, gid.raw, sizeof gid.raw);
    return address;
  };
  int fd = ::socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;  // no IPv6 here, not even for mapped addresses: the device will say
  sockaddr_in6 from = socket_address(ours.address.gid, 0), to = socket_address(theirs.gid, kRocePort);
  auto as_any = [](const sockaddr_in6& address) { return reinterpret_cast<const sockaddr*>(&address); };
  int error = 0;
  if (::bind(fd, as_any(from), sizeof from) == 0 && ::connect(fd, as_any(to), sizeof to) != 0) error = errno;
  ::close(fd);
  if (error != ENETUNREACH && error != EHOSTUNREACH) return;
  std::string here = describe(ours.address), there = describe(theirs);
  refuse("device " + ours.device + " port " + std::to_string(ours.number),
         "the peer (" + there + ") is on another subnet than " + here + ", and there is no route (" +
             strerror(error) + "): give both ports addresses of one subnet, add a route (ip route get " +
             there + " from " + here + "), or order the ports alike on both sides by AIOCOMM_RDMA_DEVICES",
         error);
}

}  // namespace aiocomm::rdma
