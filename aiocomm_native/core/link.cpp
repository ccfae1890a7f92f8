#include "core/link.hpp"

#include <algorithm>

namespace aiocomm {

namespace {
std::vector<LinkEntry>& entries() {
  static std::vector<LinkEntry> list;
  return list;
}
}  // namespace

LinkRegistration::LinkRegistration(const char* name, int cost, LinkFactory factory, bool by_name) {
  entries().push_back({name, cost, factory, by_name});
  std::stable_sort(entries().begin(), entries().end(),
                   [](const LinkEntry& a, const LinkEntry& b) { return a.cost < b.cost; });
}

const std::vector<LinkEntry>& link_registry() { return entries(); }

int LinkPeer::pull_rows(const Location& where, std::byte* into, const RowList& rows, uint64_t offset,
                        uint64_t nbytes) {
  int error = 0;
  rows.cut(offset, nbytes, [&](const Rows& one) {
    for (uint64_t i = 0; i < one.count && !error; ++i) {
      const uint64_t from = one.from + i * static_cast<uint64_t>(one.from_step);
      error = pull({where.address + from, where.segment},
                   into + one.to + static_cast<int64_t>(i) * one.to_step, one.nbytes);
    }
    return !error;
  });
  return error;
}

}  // namespace aiocomm
