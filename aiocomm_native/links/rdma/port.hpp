// Ports of verbs devices: which of them can be used, by which address, and the card that tells a peer of them.
//
// A rail is a pair of ports, one of each side: the n-th of a card with the n-th of the peer's.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/link.hpp"
#include "links/rdma/verbs.hpp"

namespace aiocomm::rdma {

constexpr size_t kMaxRails = 4;

// What a peer has to know of a port to send there.
struct Address {
  ibv_gid gid{};
  uint16_t lid = 0;
  uint16_t pkey = 0;
  uint8_t mtu = 0;         // ibv_mtu
  uint8_t link_layer = 0;  // IBV_LINK_LAYER_*
  uint8_t reads = 1;       // that a queue pair of it answers at a time
  bool routed = false;     // packets to it need its GID: several ports share the LID
};

struct Port {
  std::string device;
  uint8_t number = 1;
  int gid_index = 0;
  int node = -1;  // of NUMA, where its device is; -1: the machine has one only, or does not tell
  Address address;
  uint16_t pkey_index = 0;
  uint8_t reads = 1;  // that a queue pair of it may have under way
};

struct Selection {
  std::vector<std::string> names;    // device or device:port, in order of use; empty: all that are up
  int gid_index = -1;                // -1: the best for the link layer
  std::map<std::string, int> nodes;  // of NUMA, by device, where the machine's word is not taken
};

// The ports to use, at most kMaxRails. `left_out`: those that are named, or whose device fails, though others will do.
// Throws LinkFailure that names the device and the remedy where there is none, or where one is named that this machine
// does not have.
std::vector<Port> choose_ports(const Verbs& verbs, const Selection& selection,
                               std::vector<LeftOut>& left_out);

// Packets that the port has received so far, as the kernel tells; 0 where it does not, or knows no such port any more.
uint64_t heard(const Port& port);

std::string describe(const Address& address);

std::string encode_card(const std::vector<Port>& ports);
std::vector<Address> decode_card(std::string_view card);  // throws LinkFailure
// Throws LinkFailure where the two ports cannot talk to each other.
void check_reach(const Port& ours, const Address& theirs);
// The same, where this machine knows no way from the one address to the other. Sends nothing.
void check_route(const Port& ours, const Address& theirs);

}  // namespace aiocomm::rdma
