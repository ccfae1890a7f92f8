// needs:
// Frames in a ring: taken whole and in turn, whatever part of them is to be seen first.

#include "links/rdma/ring.hpp"

#include <algorithm>
#include <array>
#include <random>
#include <vector>

#include "check.hpp"

namespace {

using aiocomm::rdma::Ring;

constexpr uint32_t kSlots = 4;
struct alignas(64) Memory {
  std::array<std::byte, kSlots * Ring::kSlotBytes> bytes{};
  std::byte* slot(uint32_t seq) { return bytes.data() + (seq % kSlots) * Ring::kSlotBytes; }
};

std::vector<std::byte> frame_of(std::mt19937& random, size_t nbytes) {
  std::vector<std::byte> frame(nbytes);
  std::generate(frame.begin(), frame.end(), [&] { return static_cast<std::byte>(random()); });
  return frame;
}

std::vector<std::byte> marked(uint32_t seq, const std::vector<std::byte>& frame) {
  std::vector<std::byte> written = frame;
  Ring::Mark mark = Ring::mark(seq, frame.data(), frame.size());
  auto bytes = reinterpret_cast<const std::byte*>(&mark);
  written.insert(written.end(), bytes, bytes + sizeof mark);
  return written;
}

// Bytes may come to be seen in any order: the frame is taken with the last of them, and not before.
void whole_or_not_at_all() {
  std::mt19937 random(1);
  Memory memory;
  std::byte out[Ring::kSlotBytes];
  for (uint32_t seq = 0; seq < 400; ++seq) {
    const auto frame = frame_of(random, 1 + random() % Ring::kMostBytes);
    const auto written = marked(seq, frame);
    std::byte* into = memory.bytes.data() + Ring::offset(seq, kSlots, frame.size());
    std::vector<size_t> order;  // of those that differ from what is there
    for (size_t i = 0; i < written.size(); ++i)
      if (into[i] != written[i]) order.push_back(i);
    std::shuffle(order.begin(), order.end(), random);
    for (size_t i : order) {
      CHECK(Ring::take(memory.slot(seq), seq, out) == 0);
      into[i] = written[i];
    }
    CHECK(Ring::waits(memory.slot(seq)));
    CHECK(Ring::take(memory.slot(seq), seq, out) == frame.size());
    CHECK(std::equal(frame.begin(), frame.end(), out));
    CHECK(!Ring::waits(memory.slot(seq)) && Ring::take(memory.slot(seq), seq, out) == 0);
  }
}

// What lies there for another turn, or says that it is longer than a slot, is not taken.
void nothing_else_is_taken() {
  std::mt19937 random(2);
  Memory memory;
  std::byte out[Ring::kSlotBytes];
  const auto frame = frame_of(random, 40);
  const auto written = marked(5, frame);
  std::copy(written.begin(), written.end(), memory.bytes.data() + Ring::offset(5, kSlots, frame.size()));
  CHECK(Ring::take(memory.slot(1), 1, out) == 0);
  CHECK(Ring::take(memory.slot(9), 9, out) == 0);
  CHECK(Ring::take(memory.slot(5), 5, out) == 40);
  for (Ring::Mark mark : {~Ring::Mark{0}, (Ring::kMostBytes + 1) << 32, Ring::Mark{1}}) {
    std::memcpy(memory.slot(2) + Ring::kMostBytes, &mark, sizeof mark);
    CHECK(Ring::take(memory.slot(2), 2, out) == 0);
  }
}

}  // namespace

int main() {
  whole_or_not_at_all();
  nothing_else_is_taken();
}
