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

  bool covers(uint64_t offset, uint64_t nbytes) const {
    for (uint64_t i = offset / kBlock; i * kBlock < offset + nbytes; ++i)
      if (states_[i].load(std::memory_order_acquire) != State::pinned) return false;  // pairs with pin_next()
    return true;
  }

  // True: all that hold these bytes are pinned. Else those that are not are asked for, if `limit` allows; `begins`: the
  // first of them in a while.
  bool ask(uint64_t offset, uint64_t nbytes, uint64_t limit, bool& begins) {
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

  // By the helper alone, and never beside undo(). True: there are more.
  bool pin_next() {
    const uint64_t i = next_asked();
    driver_.cuCtxSetCurrent(context_);
    const bool done =
        driver_.cuMemHostRegister(base_ + i * kBlock, size(i), CU_MEMHOSTREGISTER_PORTABLE) == CUDA_SUCCESS;
    if (!done) pinned_->fetch_sub(size(i), std::memory_order_relaxed);
    states_[i].store(done ? State::pinned : State::refused, std::memory_order_release);
    std::lock_guard lock(mutex_);  // not before: who holds the token takes it
    asked_.pop_front();
    return !asked_.empty();
  }

  void undo(std::function<void()> then) override {
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
  uint64_t next_asked() {
    std::lock_guard lock(mutex_);
    return asked_.front();
  }
  uint64_t size(uint64_t i) const { return std::min(kBlock, nbytes_ - i * kBlock); }

  const Driver& driver_;
  const CUcontext context_;
  std::byte* const base_;
  const uint64_t nbytes_;
  const std::shared_ptr<std::atomic<uint64_t>> pinned_;  // bytes, of all memory
  std::vector<std::atomic<State>> states_;
  std::mutex mutex_;
  std::deque<uint64_t> asked_;  // the first of which is being pinned
  bool ended_ = false;
};

bool PinnedMemory::covers(CUcontext context, const std::shared_ptr<PeerMemory>& memory,
                          const Extent& extent) {
  if (!memory->pins) {
    auto fresh = std::make_shared<Blocks>(driver_, context, *memory, nbytes_);
    std::lock_guard lock(mutex_);
    std::erase_if(all_, [](const auto& blocks) { return blocks.expired(); });
    all_.push_back(fresh);
    memory->pins = std::move(fresh);
  }
  Blocks& blocks = static_cast<Blocks&>(*memory->pins);
  if (blocks.covers(extent.offset, extent.nbytes)) return true;
  bool begins = false, all = true;
  auto ask = [&](uint64_t at, uint64_t nbytes) {
    all = blocks.ask(extent.offset + at, nbytes, limit_, begins) && all;
  };
  if (extent.rows) {
    extent.rows->cut(0, extent.rows->nbytes(), [&](const Rows& rows) {
      const auto [at, step] =
          extent.outgoing ? std::pair{rows.to, rows.to_step} : std::pair{rows.from, rows.from_step};
      for (uint64_t i = 0; i < rows.count; ++i) ask(at + i * static_cast<uint64_t>(step), rows.nbytes);
    });
  } else {
    ask(0, extent.nbytes);
  }
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
  std::lock_guard lock(mutex_);
  for (const auto& blocks : std::exchange(all_, {}))
    if (const auto left = blocks.lock()) left->undo({});
}

void cut_by_block(const MoveJob& job, const Rows& rows, const std::function<void(const Rows&)>& take) {
  const bool outgoing = job.lane == Lane::out;
  const uint64_t first = outgoing ? job.to + rows.to : job.from + rows.from;
  const int64_t step = outgoing ? rows.to_step : rows.from_step;
  auto part = [&](uint64_t row, uint64_t start, uint64_t nbytes, uint64_t count) {
    take({rows.from + row * static_cast<uint64_t>(rows.from_step) + start,
          rows.to + row * static_cast<uint64_t>(rows.to_step) + start, rows.from_step, rows.to_step, nbytes,
          count});
  };
  for (uint64_t row = 0; row < rows.count;) {
    const uint64_t at = first + row * static_cast<uint64_t>(step) - job.pinned_from;
    uint64_t room = kBlock - at % kBlock;
    if (room < rows.nbytes) {  // over the end of one, or of several
      for (uint64_t done = 0; done < rows.nbytes; done += std::exchange(room, kBlock))
        part(row, done, std::min(room, rows.nbytes - done), 1);
      ++row;
      continue;
    }
    const uint64_t more = step > 0 ? (room - rows.nbytes) / static_cast<uint64_t>(step) : 0;
    const uint64_t count = std::min(1 + more, rows.count - row);
    part(row, 0, rows.nbytes, count);
    row += count;
  }
}

int copy_in_blocks(const Driver& driver, const MoveJob& job, CUstream stream) {
  int code = CUDA_SUCCESS;
  cut_by_block(job, {.nbytes = job.nbytes, .count = 1}, [&](const Rows& part) {
    if (code != CUDA_SUCCESS) return;
    code = driver.cuMemcpyAsync(job.to + part.to, job.from + part.from, part.nbytes, stream);
    if (code != CUDA_SUCCESS && part.to) driver.cuStreamSynchronize(stream);  // those before may be under way
  });
  return code;
}

}  // namespace aiocomm::cuda
