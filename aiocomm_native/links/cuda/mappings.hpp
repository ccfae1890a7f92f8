// Memory of other processes as it is mapped here.
//
// Rules
//  * A mapping is known by its owner's process, the allocation's base and its buffer id. An address that was freed and
//    allocated anew has another id, so it is never read through the old mapping; the old one is dropped when its owner
//    says that it has freed the memory, or when the new one is asked for. Ranges of blocks (exports.hpp) may overlap: of
//    these only the owner knows which are gone.
//  * Opening takes up to milliseconds: it is done by the helper's thread, and the transfers that wait for it hear of it. One
//    that fails is tried again after a while (refusal.hpp), by whoever asks then.
//  * At most `limit` mappings are kept; the one that was used longest ago goes first. One in use stays until its last
//    transfer has ended.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/device.hpp"
#include "links/cuda/driver.hpp"
#include "links/cuda/refusal.hpp"

namespace aiocomm::cuda {

// A thread for driver calls that may take long, and for what is done from time to time.
class Helper {
 public:
  // `look` is called in between and answers after how long to be called again, in ms; 0: after the next task. `failed`
  // is told what one of them throws; the thread goes on, since others wait for what they have submitted.
  Helper(const Driver& driver, std::function<int()> look, std::function<void(const char* why)> failed)
      : driver_(driver), look_(std::move(look)), failed_(std::move(failed)) {}
  ~Helper() { stop(); }
  bool submit(std::function<void()> task);  // false: stopped
  // By a task that has held the driver's lock since `began`, for which copies that are being issued wait: there is a pause
  // before the next one.
  void rest_after(std::chrono::steady_clock::time_point began);
  void stop();  // after what was submitted

 private:
  void run();
  const Driver& driver_;
  const std::function<int()> look_;
  const std::function<void(const char* why)> failed_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::chrono::steady_clock::time_point rests_until_{};  // its thread only
  std::thread thread_;
};

class Mappings {
 public:
  Mappings(const Driver& driver, MoverHost& host, Helper& helper, size_t limit)
      : driver_(driver), host_(host), helper_(helper), limit_(limit) {}
  // `process`: theirs, as the kernel numbers it here.
  Reach reach(CUcontext context, int device, const DevicePlace& theirs, int process, OpId waiter);
  bool knows(int device, const DevicePlace& theirs);
  void forget(uint64_t owner);
  void forget(uint64_t owner, const Gone& memory);
  void clear();
  size_t size();

 private:
  struct Key {
    uint64_t owner, base, buffer_id;
    int device;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const noexcept {
      uint64_t h = key.owner ^ key.base * 0x9e3779b97f4a7c15ull ^ key.buffer_id * 0xff51afd7ed558ccdull;
      return static_cast<size_t>(h ^ h >> 29) + static_cast<size_t>(key.device);
    }
  };
  struct Mapping;
  struct Entry {
    Reach::State state = Reach::State::opening;
    std::string reason;
    std::shared_ptr<Mapping> mapping;
    std::vector<OpId> waiters;
    std::list<Key>::iterator age;
    uint64_t extent = 0;
    Export exported = Export::none;
    Refusal refusal = {};
  };

  struct Attempt;
  void open(CUcontext context, Key key, DevicePlace theirs, int process);
  void map_blocks(Attempt& attempt, Mapping& mapping, int device, const DevicePlace& theirs, int process);
  void drop(std::unordered_map<Key, Entry, Hash>::iterator it);

  const Driver& driver_;
  MoverHost& host_;
  Helper& helper_;
  const size_t limit_;
  const std::shared_ptr<std::atomic<size_t>> closing_ = std::make_shared<std::atomic<size_t>>(0);
  std::mutex mutex_;
  std::unordered_map<Key, Entry, Hash> entries_;
  std::list<Key> ages_;  // used longest ago first
};

}  // namespace aiocomm::cuda
