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

}  // namespace aiocomm
