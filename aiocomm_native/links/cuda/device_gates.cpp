// What a copy waits for before it begins: work on the user's stream, and words of others.

#include <cerrno>
#include <utility>
#include <vector>

#include "core/link.hpp"
#include "core/relax.hpp"
#include "links/cuda/device.hpp"

namespace aiocomm::cuda {

void Device::await_gate(const GateWait& wait) {
  while (!gate_queue_.push(wait)) relax();
  ring(wake_, bell_);
}

Gate Device::gate_behind(CUstream stream) {
  uint32_t slot;
  {
    std::lock_guard lock(gate_mutex_);
    if (!words_) throw LinkFailure("the communicator is closed", ESHUTDOWN);
    std::erase_if(shut_gates_, [&](const Gate& gate) {
      if (!gate.open()) return false;
      free_gates_.push_back(static_cast<uint32_t>(gate.word - words_));
      return true;
    });
    if (free_gates_.empty()) throw LinkFailure("too many transfers wait for their streams", 0);
    slot = free_gates_.back();
    free_gates_.pop_back();
  }
  Gate gate{words_ + slot, words_[slot] + 1};
  CUresult code = driver.cuStreamWriteValue32(stream, words_at_ + slot * sizeof(uint32_t), gate.value,
                                              CU_STREAM_WRITE_VALUE_DEFAULT);
  if (code != CUDA_SUCCESS) {
    std::lock_guard lock(gate_mutex_);
    free_gates_.push_back(slot);
    throw LinkFailure("the stream cannot be waited for: " + driver.describe(code), code);
  }
  return gate;
}

void Device::give_back(const Gate& gate) {
  if (!gate.word) return;
  std::lock_guard lock(gate_mutex_);
  if (!words_) return;
  if (gate.open())
    free_gates_.push_back(static_cast<uint32_t>(gate.word - words_));
  else
    shut_gates_.push_back(gate);
}

// The user's stream is not asked: it may be gone by now, or be captured. What has failed there is said of any stream of
// the context; of one that has something to do, for certain.
void Device::watch_gates(uint64_t now) {
  Stream& stream = streams_[kLocal];
  if (lost_ || !stream.inflight.empty() || now < gates_.front().since_ns + kOverdueNs ||
      now < gates_looked_ns_ + kLookNs)
    return;
  gates_looked_ns_ = now;
  CUresult code = driver.cuStreamWriteValue32(stream.handle, words_at_ + kLocal * kLine * sizeof(uint32_t),
                                              stream.issued, CU_STREAM_WRITE_VALUE_DEFAULT);
  if (code == CUDA_SUCCESS) code = driver.cuStreamQuery(stream.handle);
  if (is_lost(code)) lost_ = code;
}

bool Device::open_gates() {
  GateWait wait;
  while (gate_queue_.pop(wait)) {
    wait.since_ns = now_ns();
    gates_.push_back(std::move(wait));
  }
  if (gates_.empty()) return false;
  std::vector<OpId> ready, hopeless;
  std::erase_if(gates_, [&](const GateWait& gate) {
    if (gate.company && gate.company->over.load(std::memory_order_acquire)) return true;
    if (!gate.gate.open()) {
      if (!lost_) return false;
      // Nobody else will write it. A word of others is theirs, and others wait for it: the copy then fails, and says why.
      if (!gate.company) {
        *const_cast<volatile uint32_t*>(gate.gate.word) = gate.gate.value;
        hopeless.push_back(gate.op);
        return true;
      }
      gate.company->hopeless.store(true, std::memory_order_release);
    }
    ready.push_back(gate.op);
    return true;
  });
  waits_.store(!gates_.empty(), std::memory_order_relaxed);
  if (!ready.empty()) host_.go_on(ready.data(), ready.size());
  if (!hopeless.empty()) host_.go_on(hopeless.data(), hopeless.size(), lost_);
  return !ready.empty() || !hopeless.empty();
}

}  // namespace aiocomm::cuda
