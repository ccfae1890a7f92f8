#include "links/cuda/mappings.hpp"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/guarded.hpp"
#include "links/cuda/exports.hpp"
#include "links/cuda/reaper.hpp"

namespace aiocomm::cuda {

namespace {
constexpr int kRestFactor = 60;
constexpr std::chrono::microseconds kLeastRest{2000}, kMostRest{20000};
constexpr std::chrono::milliseconds kPatience{1000}, kMoment{1};
constexpr int kTries = 6;
}  // namespace

bool Helper::submit(std::function<void()> task) {
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return false;
    tasks_.push_back(std::move(task));
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  }
  wake_.notify_one();
  return true;
}

void Helper::rest_after(std::chrono::steady_clock::time_point began) {
  const auto now = std::chrono::steady_clock::now();
  const auto took = std::chrono::duration_cast<std::chrono::microseconds>(now - began);
  rests_until_ = now + std::clamp(kRestFactor * took, kLeastRest, kMostRest);
}

void Helper::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Helper::run() {
  pthread_setname_np(pthread_self(), "aiocomm-gpumap");
  int capture_mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver_.cuThreadExchangeStreamCaptureMode(&capture_mode);  // as in Device::Current
  auto called = [this] { return stopping_ || !tasks_.empty(); };
  for (;;) {
    std::function<void()> task;
    int pause_ms = 0;
    guarded([&] { pause_ms = look_(); }, failed_);
    {
      std::unique_lock lock(mutex_);
      wake_.wait_until(lock, rests_until_, [this] { return stopping_; });
      if (pause_ms)
        wake_.wait_for(lock, std::chrono::milliseconds(pause_ms), called);
      else
        wake_.wait(lock, called);
      if (tasks_.empty() && stopping_) return;
      if (tasks_.empty()) continue;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    guarded(task, failed_);
  }
}

// Closed, not by the thread that lets go of it, once the last transfer that uses it has ended.
struct Mappings::Mapping {
  Mapping(const Driver& driver, CUcontext context, std::shared_ptr<std::atomic<size_t>> closing)
      : driver_(driver), context_(context), closing_(std::move(closing)) {}
  ~Mapping() {
    if (!base) return;
    ++*closing_;
    auto close = [&driver = driver_, closing = closing_, base = base, reserved = reserved, blocks = blocks] {
      if (reserved) {
        uint64_t at = base;
        for (uint64_t size : blocks) {
          driver.cuMemUnmap(at, size);
          at += size;
        }
        driver.cuMemAddressFree(base, reserved);
      } else {
        driver.cuIpcCloseMemHandle(base);
      }
      --*closing;
    };
    Reaper::of_process().submit(context_, close);
  }
  CUdeviceptr base = 0;
  size_t reserved = 0;           // VMM: bytes of the address range
  std::vector<uint64_t> blocks;  // VMM: bytes of what is mapped there, one after the other

 private:
  const Driver& driver_;
  const CUcontext context_;
  const std::shared_ptr<std::atomic<size_t>> closing_;  // how many wait for that
};

bool Mappings::knows(int device, const DevicePlace& theirs) {
  std::lock_guard lock(mutex_);
  return entries_.count({theirs.owner, theirs.base, theirs.buffer_id, device}) != 0;
}

Reach Mappings::reach(CUcontext context, int device, const DevicePlace& theirs, int process, OpId waiter) {
  Key key{theirs.owner, theirs.base, theirs.buffer_id, device};
  std::lock_guard lock(mutex_);
  if (auto it = entries_.find(key); it != entries_.end()) {
    Entry& entry = it->second;
    ages_.splice(ages_.end(), ages_, entry.age);
    if (entry.state == Reach::State::refused && !entry.refusal.holds()) {
      entry.state = Reach::State::opening;
      helper_.submit([this, context, key, theirs, process] { open(context, key, theirs, process); });
    }
    if (entry.state == Reach::State::opening) entry.waiters.push_back(waiter);
    if (entry.state != Reach::State::ready) return {entry.state, 0, nullptr, entry.reason};
    return {entry.state, entry.mapping->base, entry.mapping, {}};
  }
  for (auto it = entries_.begin(); it != entries_.end();) {
    auto next = std::next(it);
    bool same = it->first.owner == key.owner && it->first.device == device;
    bool overlaps =
        it->first.base < theirs.base + theirs.extent && theirs.base < it->first.base + it->second.extent;
    bool blocks = it->second.exported == Export::descriptor && theirs.exported == Export::descriptor;
    if (same && overlaps && !blocks && it->second.state != Reach::State::opening)
      drop(it);  // freed by its owner
    it = next;
  }
  while (entries_.size() >= limit_) {
    auto oldest = ages_.begin();
    while (oldest != ages_.end() && entries_.at(*oldest).state == Reach::State::opening) ++oldest;
    if (oldest == ages_.end()) break;
    drop(entries_.find(*oldest));
  }
  Entry& entry = entries_[key];
  entry.age = ages_.insert(ages_.end(), key);
  entry.extent = theirs.extent;
  entry.exported = theirs.exported;
  entry.waiters.push_back(waiter);
  helper_.submit([this, context, key, theirs, process] { open(context, key, theirs, process); });
  return {Reach::State::opening, 0, nullptr, {}};
}

void Mappings::drop(std::unordered_map<Key, Entry, Hash>::iterator it) {
  ages_.erase(it->second.age);
  entries_.erase(it);
}

// The first step that fails, and how.
struct Mappings::Attempt {
  CUresult code = CUDA_SUCCESS;
  std::string step;
  bool tried(const char* what, CUresult result) {
    if (code == CUDA_SUCCESS && result != CUDA_SUCCESS) code = result, step = what;
    return code == CUDA_SUCCESS;
  }
};

namespace {

// Another process's descriptors, by its table of them (exports.hpp).
class TakenBlocks {
 public:
  TakenBlocks(const DevicePlace& theirs, int process) {
    BlockHandle handle;
    std::memcpy(&handle, theirs.handle.data(), sizeof handle);
    process_ = static_cast<int>(syscall(SYS_pidfd_open, process, 0));
    if (process_ < 0) return;
    const int shared = take(handle.table);
    if (shared < 0) return;
    taken_.push_back(shared);
    if (!valid(shared, handle.number) || table_.count == 0 || table_.count > kMostBlocks) return;
    const BlockTable read = table_;
    uint64_t total = 0;
    for (uint32_t i = 0; i < read.count; ++i) {
      const int one = take(read.descriptors[i]);
      if (one < 0) return;
      taken_.push_back(one);
      total += read.sizes[i];
    }
    // Its owner clears the number before it closes any of them: those that were taken are what the place means.
    good_ = valid(shared, handle.number) && total == theirs.extent;
    table_ = read;
  }
  ~TakenBlocks() {
    for (int one : taken_) ::close(one);
    if (process_ >= 0) ::close(process_);
  }
  TakenBlocks(const TakenBlocks&) = delete;
  TakenBlocks& operator=(const TakenBlocks&) = delete;

  bool good() const { return good_; }
  size_t count() const { return table_.count; }
  uint64_t size(size_t i) const { return table_.sizes[i]; }
  int descriptor(size_t i) const { return taken_[i + 1]; }

 private:
  int take(int theirs) { return static_cast<int>(syscall(SYS_pidfd_getfd, process_, theirs, 0)); }
  bool valid(int shared, uint64_t number) {
    return pread(shared, &table_, sizeof table_, 0) == static_cast<ssize_t>(sizeof table_) && number != 0 &&
           table_.number == number;
  }
  int process_ = -1;
  BlockTable table_;
  std::vector<int> taken_;  // the table's, then the blocks'
  bool good_ = false;
};

}  // namespace

void Mappings::map_blocks(Attempt& attempt, Mapping& mapping, int device, const DevicePlace& theirs,
                          int process) {
  TakenBlocks blocks(theirs, process);
  if (!blocks.good()) {
    attempt.tried("pidfd_getfd", CUDA_ERROR_INVALID_HANDLE);
    return;
  }
  CUdeviceptr base = 0;
  if (!attempt.tried("cuMemAddressReserve", driver_.cuMemAddressReserve(&base, theirs.extent, 0, 0, 0)))
    return;
  mapping.base = base;
  mapping.reserved = theirs.extent;
  uint64_t at = base;
  for (size_t i = 0; i < blocks.count(); ++i) {
    CUmemGenericAllocationHandle handle = 0;
    auto descriptor = reinterpret_cast<void*>(static_cast<intptr_t>(blocks.descriptor(i)));
    if (!attempt.tried("cuMemImportFromShareableHandle",
                       driver_.cuMemImportFromShareableHandle(&handle, descriptor,
                                                              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)))
      return;
    const bool mapped = attempt.tried("cuMemMap", driver_.cuMemMap(at, blocks.size(i), 0, handle, 0));
    driver_.cuMemRelease(handle);  // the mapping holds the memory
    if (!mapped) return;
    mapping.blocks.push_back(blocks.size(i));
    at += blocks.size(i);
  }
  CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  attempt.tried("cuMemSetAccess", driver_.cuMemSetAccess(base, theirs.extent, &access, 1));
}

void Mappings::open(CUcontext context, Key key, DevicePlace theirs, int process) {
  driver_.cuCtxSetCurrent(context);
  // They gather behind a device that is busy for long.
  if (*closing_ >= limit_) Reaper::of_process().wait(kPatience);
  auto mapping = std::make_shared<Mapping>(driver_, context, closing_);
  Attempt attempt;
  const auto began = std::chrono::steady_clock::now();
  if (theirs.exported == Export::ipc) {
    CUipcMemHandle handle;
    std::memcpy(handle.reserved, theirs.handle.data(), sizeof handle.reserved);
    CUdeviceptr base = 0;
    CUresult code = CUDA_ERROR_ALREADY_MAPPED;
    // What lay there before, and its owner has freed, is mapped until its last copy has ended and it was closed.
    for (int tries = 0; tries < kTries && code == CUDA_ERROR_ALREADY_MAPPED; ++tries) {
      if (tries) Reaper::of_process().wait(kPatience);
      if (tries > 1) std::this_thread::sleep_for(kMoment);
      code = driver_.cuIpcOpenMemHandle(&base, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    }
    if (attempt.tried("cuIpcOpenMemHandle", code)) mapping->base = base;
  } else {
    map_blocks(attempt, *mapping, key.device, theirs, process);
  }
  if (host_.urgent_lately()) helper_.rest_after(began);  // urgent messages are to meet it rarely
  const CUresult code = attempt.code;
  std::vector<OpId> waiters;
  {
    std::lock_guard lock(mutex_);
    auto it = entries_.find(key);
    if (it == entries_.end()) return;
    Entry& entry = it->second;
    waiters.swap(entry.waiters);
    if (code == CUDA_SUCCESS) {
      entry.state = Reach::State::ready;
      entry.mapping = std::move(mapping);
    } else {
      entry.state = Reach::State::refused;
      entry.refusal.refused();
      entry.reason =
          "the peer's GPU memory cannot be mapped: " + attempt.step + " gives " + driver_.describe(code);
      if (code == CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)
        entry.reason += "; the two GPUs have no peer access (nvidia-smi topo -p2p r)";
      else if (code == CUDA_ERROR_INVALID_DEVICE || code == CUDA_ERROR_NO_DEVICE)
        entry.reason += "; its GPU is hidden from this process (CUDA_VISIBLE_DEVICES)";
      else
        entry.reason += "; containers need a common IPC and process namespace (--ipc=host --pid=host)";
    }
  }
  host_.go_on(waiters.data(), waiters.size());
}

void Mappings::forget(uint64_t owner) {
  std::vector<OpId> waiters;  // kernels: what moves between a pair has ended with it
  std::lock_guard lock(mutex_);
  for (auto it = entries_.begin(); it != entries_.end();) {
    auto next = std::next(it);
    if (it->first.owner == owner) {
      waiters.insert(waiters.end(), it->second.waiters.begin(), it->second.waiters.end());
      drop(it);
    }
    it = next;
  }
  if (!waiters.empty())
    helper_.submit([this, waiters = std::move(waiters)] { host_.go_on(waiters.data(), waiters.size()); });
}

// One that is being opened is for a transfer under way, which has it first.
void Mappings::forget(uint64_t owner, const Gone& memory) {
  std::lock_guard lock(mutex_);
  for (auto it = entries_.begin(); it != entries_.end();) {
    auto next = std::next(it);
    const Key& key = it->first;
    if (key.owner == owner && key.base == memory.base && key.buffer_id == memory.buffer_id) {
      if (it->second.state != Reach::State::opening)
        drop(it);
      else
        helper_.submit([this, owner, memory] { forget(owner, memory); });
    }
    it = next;
  }
}

void Mappings::clear() {
  std::lock_guard lock(mutex_);
  ages_.clear();
  entries_.clear();
}

size_t Mappings::size() {
  std::lock_guard lock(mutex_);
  return entries_.size();
}

}  // namespace aiocomm::cuda
