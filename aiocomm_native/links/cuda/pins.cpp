#include "links/cuda/pins.hpp"

#include <algorithm>
#include <chrono>
#include <deque>
#include <utility>

#include "links/cuda/reaper.hpp"

namespace aiocomm::cuda {

namespace {
constexpr uint64_t kBlock = 16 << 20;
}

// The blocks of one memory, each of which is pinned once it was asked for.
class PinnedMemory::Blocks final : public PeerMemory::Pins {
 public:
  Blocks(const Driver& driver, CUcontext context, const PeerMemory& memory,
         std::shared_ptr<std::atomic<uint64_t>> pinned)
      : driver_(driver),
        context_(context),
        base_(memory.base),
        nbytes_(memory.nbytes),
        pinned_(std::move(pinned)),
        states_((memory.nbytes + kBlock - 1) / kBlock) {}

  enum class State : uint8_t { none, asked, pinned, refused };

  // True: all that hold these bytes are pinned. Else those that are not are asked for, if `limit` allows; `begins`: the
  // first of them in a while.
  bool covers(uint64_t offset, uint64_t nbytes, uint64_t limit, bool& begins) {
    bool all = true;
    for (uint64_t i = offset / kBlock; i * kBlock < offset + nbytes; ++i) {
      State state = states_[i].load(std::memory_order_acquire);  // pairs with pin_next()
      if (state == State::pinned) continue;
      all = false;
      if (state != State::none || pinned_->load(std::memory_order_relaxed) + size(i) > limit) continue;
      pinned_->fetch_add(size(i), std::memory_order_relaxed);
      states_[i].store(State::asked, std::memory_order_relaxed);
      std::lock_guard lock(mutex_);
      begins = begins || asked_.empty();
      asked_.push_back(i);
    }
    return all;
  }

  bool pin_next() {  // true: there are more
    std::lock_guard lock(mutex_);
    if (ended_ || asked_.empty()) return false;
    const uint64_t i = asked_.front();
    driver_.cuCtxSetCurrent(context_);
    const bool done =
        driver_.cuMemHostRegister(base_ + i * kBlock, size(i), CU_MEMHOSTREGISTER_PORTABLE) == CUDA_SUCCESS;
    if (!done) pinned_->fetch_sub(size(i), std::memory_order_relaxed);
    states_[i].store(done ? State::pinned : State::refused, std::memory_order_release);
    asked_.pop_front();
    return !asked_.empty();
  }

  void undo(std::function<void()> then) override {
    std::lock_guard lock(mutex_);
    const bool first = !std::exchange(ended_, true);
    std::vector<std::byte*> blocks;
    for (uint64_t i = 0; first && i < states_.size(); ++i) {
      const State state = states_[i].exchange(State::refused);
      if (state == State::pinned) blocks.push_back(base_ + i * kBlock);
      if (state == State::pinned || state == State::asked)
        pinned_->fetch_sub(size(i), std::memory_order_relaxed);
    }
    // Its device may be given back by the second time.
    Reaper::of_process().submit(first ? context_ : nullptr,
                                [&driver = driver_, blocks = std::move(blocks), then = std::move(then)] {
                                  for (std::byte* block : blocks) driver.cuMemHostUnregister(block);
                                  if (then) then();
                                });
  }

 private:
  uint64_t size(uint64_t i) const { return std::min(kBlock, nbytes_ - i * kBlock); }

  const Driver& driver_;
  const CUcontext context_;
  std::byte* const base_;
  const uint64_t nbytes_;
  const std::shared_ptr<std::atomic<uint64_t>> pinned_;  // bytes, of all memory
  std::vector<std::atomic<State>> states_;
  std::mutex mutex_;
  std::deque<uint64_t> asked_;
  bool ended_ = false;
};

bool PinnedMemory::covers(CUcontext context, const std::shared_ptr<PeerMemory>& memory, uint64_t offset,
                          uint64_t nbytes) {
  if (!memory->pins) {
    auto fresh = std::make_shared<Blocks>(driver_, context, *memory, nbytes_);
    std::erase_if(all_, [](const auto& blocks) { return blocks.expired(); });
    all_.push_back(fresh);
    memory->pins = std::move(fresh);
  }
  bool begins = false;
  const bool all = static_cast<Blocks&>(*memory->pins).covers(offset, nbytes, limit_, begins);
  if (begins) helper_.submit([this, memory] { pin_next(memory); });
  return all;
}

// One block at a time: other tasks of the helper come in between.
void PinnedMemory::pin_next(const std::shared_ptr<PeerMemory>& memory) {
  const auto began = std::chrono::steady_clock::now();
  const bool more = static_cast<Blocks&>(*memory->pins).pin_next();
  if (host_.urgent_lately()) helper_.rest_after(began);
  if (more) helper_.submit([this, memory] { pin_next(memory); });
}

void PinnedMemory::clear() {
  for (const auto& blocks : std::exchange(all_, {}))
    if (const auto left = blocks.lock()) left->undo({});
}

int copy_in_blocks(const Driver& driver, const MoveJob& job, CUstream stream) {
  const uint64_t host = (job.lane == Lane::out ? job.to : job.from) - job.pinned_from;
  for (uint64_t done = 0; done < job.nbytes;) {
    const uint64_t n = std::min(job.nbytes - done, kBlock - (host + done) % kBlock);
    const int code = driver.cuMemcpyAsync(job.to + done, job.from + done, n, stream);
    if (code != CUDA_SUCCESS) {
      if (done) driver.cuStreamSynchronize(stream);  // what was queued may be under way
      return code;
    }
    done += n;
  }
  return CUDA_SUCCESS;
}

}  // namespace aiocomm::cuda
