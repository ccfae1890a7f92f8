#include "faults.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <sstream>
#include <utility>

namespace fake {

namespace {

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, by);) parts.push_back(part);
  return parts;
}

constexpr std::chrono::seconds kPatience{10};

[[noreturn]] void refuse(const char* variable, const std::string& item) {
  std::fprintf(stderr, "simulated driver: cannot read %s: %s\n", variable, item.c_str());
  std::abort();
}

}  // namespace

Faults::Faults() {
  if (const char* text = std::getenv("FAKE_CUDA_FAIL")) {
    for (const auto& item : split(text, ',')) {
      auto parts = split(item, ':');
      if (parts.size() != 3) refuse("FAKE_CUDA_FAIL", item);
      bool forever = parts[1].ends_with('+');
      fail(parts[0], std::strtoull(parts[1].c_str(), nullptr, 10),
           static_cast<CUresult>(std::atoi(parts[2].c_str())), forever);
    }
  }
  if (const char* text = std::getenv("FAKE_CUDA_LOST")) {
    for (const auto& item : split(text, ',')) {
      auto parts = split(item, ':');
      if (parts.empty() || parts.size() > 2) refuse("FAKE_CUDA_LOST", item);
      lose(std::atoi(parts[0].c_str()), parts.size() == 2 ? static_cast<CUresult>(std::atoi(parts[1].c_str()))
                                                          : CUDA_ERROR_DEVICE_UNAVAILABLE);
    }
  }
}

void Faults::fail(const std::string& name, uint64_t nth, CUresult code, bool forever) {
  std::lock_guard lock(mutex_);
  plans_.push_back({name, nth ? nth : 1, code, forever});
}

void Faults::clear() {
  std::lock_guard lock(mutex_);
  plans_.clear();
  lost_.clear();
}

void Faults::lose(int device, CUresult code) {
  std::lock_guard lock(mutex_);
  lost_[device] = code;
}

void Faults::hold(const std::string& name) {
  std::lock_guard lock(mutex_);
  held_ = name;
  hold_ = Hold::wanted;
}

bool Faults::wait_held() {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, kPatience, [this] { return hold_ == Hold::held; });
}

bool Faults::let_go() {
  std::lock_guard lock(mutex_);
  const bool in_time = std::exchange(hold_, Hold::none) != Hold::late;
  changed_.notify_all();
  return in_time;
}

void Faults::hold_up(const char* name) {
  std::unique_lock lock(mutex_);
  if (hold_ != Hold::wanted || held_ != name) return;
  hold_ = Hold::held;
  changed_.notify_all();
  if (!changed_.wait_for(lock, kPatience, [this] { return hold_ != Hold::held; })) hold_ = Hold::late;
}

constexpr int kThrows =
    -1;  // instead of a code: what no driver does, as if the memory ran out around the call

CUresult Faults::on_call(const char* name) {
  std::lock_guard lock(mutex_);
  ++calls_[name];
  CUresult verdict = CUDA_SUCCESS;
  for (auto plan = plans_.begin(); plan != plans_.end();) {
    if (plan->name != name && plan->name != "*") {
      ++plan;
      continue;
    }
    if (plan->left > 1) {
      --plan->left;
      ++plan;
      continue;
    }
    verdict = plan->code;
    plan = plan->forever ? plan + 1 : plans_.erase(plan);
  }
  if (static_cast<int>(verdict) == kThrows) throw std::bad_alloc();
  return verdict;
}

CUresult Faults::lost(int device) {
  std::lock_guard lock(mutex_);
  auto found = lost_.find(device);
  return found == lost_.end() ? CUDA_SUCCESS : found->second;
}

uint64_t Faults::calls(const std::string& name) {
  std::lock_guard lock(mutex_);
  auto found = calls_.find(name);
  return found == calls_.end() ? 0 : found->second;
}

void Faults::violation(const std::string& what) {
  std::lock_guard lock(mutex_);
  violations_.push_back(what);
  if (const char* path = std::getenv("FAKE_CUDA_REPORT")) {
    std::string line = "process " + std::to_string(getpid()) + ": " + what + "\n";
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, line.data(), line.size()) < 0)
      std::fprintf(stderr, "simulated driver: %s", line.c_str());
    if (fd >= 0) close(fd);
  }
}

std::vector<std::string> Faults::take_violations() {
  std::lock_guard lock(mutex_);
  return std::exchange(violations_, {});
}

void Faults::count(const std::string& what, uint64_t by) {
  std::lock_guard lock(mutex_);
  counters_[what] += by;
}

uint64_t Faults::counter(const std::string& what) {
  std::lock_guard lock(mutex_);
  auto found = counters_.find(what);
  return found == counters_.end() ? 0 : found->second;
}

Faults& faults() {
  static auto* one = new Faults;  // never freed: threads outlive the end of main
  return *one;
}

const char* error_name(CUresult code) {
#define FAKE_NAME(name) \
  case name:            \
    return #name;
  switch (code) {
    FAKE_NAME(CUDA_SUCCESS)
    FAKE_NAME(CUDA_ERROR_INVALID_VALUE)
    FAKE_NAME(CUDA_ERROR_OUT_OF_MEMORY)
    FAKE_NAME(CUDA_ERROR_NOT_INITIALIZED)
    FAKE_NAME(CUDA_ERROR_DEINITIALIZED)
    FAKE_NAME(CUDA_ERROR_STUB_LIBRARY)
    FAKE_NAME(CUDA_ERROR_DEVICE_UNAVAILABLE)
    FAKE_NAME(CUDA_ERROR_NO_DEVICE)
    FAKE_NAME(CUDA_ERROR_INVALID_DEVICE)
    FAKE_NAME(CUDA_ERROR_INVALID_CONTEXT)
    FAKE_NAME(CUDA_ERROR_MAP_FAILED)
    FAKE_NAME(CUDA_ERROR_ALREADY_MAPPED)
    FAKE_NAME(CUDA_ERROR_NOT_MAPPED)
    FAKE_NAME(CUDA_ERROR_ECC_UNCORRECTABLE)
    FAKE_NAME(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)
    FAKE_NAME(CUDA_ERROR_OPERATING_SYSTEM)
    FAKE_NAME(CUDA_ERROR_INVALID_HANDLE)
    FAKE_NAME(CUDA_ERROR_NOT_FOUND)
    FAKE_NAME(CUDA_ERROR_NOT_READY)
    FAKE_NAME(CUDA_ERROR_ILLEGAL_ADDRESS)
    FAKE_NAME(CUDA_ERROR_MISALIGNED_ADDRESS)
    FAKE_NAME(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED)
    FAKE_NAME(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED)
    FAKE_NAME(CUDA_ERROR_CONTEXT_IS_DESTROYED)
    FAKE_NAME(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
    FAKE_NAME(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
    FAKE_NAME(CUDA_ERROR_LAUNCH_FAILED)
    FAKE_NAME(CUDA_ERROR_NOT_PERMITTED)
    FAKE_NAME(CUDA_ERROR_NOT_SUPPORTED)
    FAKE_NAME(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)
    FAKE_NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
    FAKE_NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
    FAKE_NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
    FAKE_NAME(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
    FAKE_NAME(CUDA_ERROR_CAPTURED_EVENT)
    FAKE_NAME(CUDA_ERROR_UNKNOWN)
    default:
      return nullptr;
  }
#undef FAKE_NAME
}

}  // namespace fake
