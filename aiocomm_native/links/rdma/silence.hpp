// Whether a device is silent, or a request takes long: whoever hears packets is no silent device. Pure.
#pragma once

#include <cstdint>
#include <utility>

namespace aiocomm::rdma {

class Silence {
 public:
  static constexpr uint64_t kLongest = 8;  // times the patience, whatever is heard

  // `since_ns`: when something completed last. `heard()`: what the port has received so far, by its own count; asked
  // for twice per `patience_ns` at most, and not before half of it is over. True: nothing more will come.
  template <class Heard>
  bool over(uint64_t now_ns, uint64_t since_ns, uint64_t patience_ns, Heard heard) {
    if (now_ns < since_ns + patience_ns / 2) return false;
    if (since_ns != since_ns_) {
      since_ns_ = since_ns;
      asked_ns_ = now_ns;
      heard_ = heard();
      return false;
    }
    if (now_ns < asked_ns_ + patience_ns / 2) return false;
    asked_ns_ = now_ns;
    const uint64_t count = heard();
    return std::exchange(heard_, count) == count || now_ns > since_ns + kLongest * patience_ns;
  }

 private:
  uint64_t since_ns_ = 0, asked_ns_ = 0, heard_ = 0;
};

}  // namespace aiocomm::rdma
