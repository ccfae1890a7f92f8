#include "links/cuda/device.hpp"

#include <pthread.h>
#include <sys/prctl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <optional>
#include <utility>

#include "core/guarded.hpp"
#include "core/link.hpp"
#include "core/relax.hpp"
#include "links/cuda/pins.hpp"
#include "links/cuda/reaper.hpp"

namespace aiocomm::cuda {

namespace {
constexpr size_t kWords = 16384;    // the first are the streams', one per cache line; then gates
constexpr size_t kFirstGate = 256;  // words
constexpr size_t kQueue = 256;      // which stay in a cache; what finds no room waits with the engine
constexpr size_t kGateQueue = 16384;
constexpr int kMostUrgent = -1000;  // of streams; the driver takes the nearest that it has
constexpr size_t kBatch = 16;       // small copies that share one written value
constexpr uint64_t kTellFrom = 256 << 10;
// Of copies that follow each other, in order: what is asked of the driver together, and whose end is told by itself.
constexpr uint64_t kJoined = 1 << 20, kTellInOrder = 4 << 20;
constexpr size_t kInflight = 256;     // per stream: the driver blocks where about a thousand wait
constexpr uint64_t kEarlyNs = 20000;  // that a copy takes at most whose end is announced at once
constexpr double kMostRate = 400;     // between devices, in bytes per ns
constexpr uint32_t kStandBack = 64;   // turns of a thread that does not spin, beside a loop that does

bool is_small(const MoveJob& job) {
  return job.lane == Lane::peer && job.nbytes < kTellFrom && !job.rows && !job.kernel;
}

void add(std::atomic<uint64_t>& sum, uint64_t ns) {  // one writer
  sum.store(sum.load(std::memory_order_relaxed) + ns, std::memory_order_relaxed);
}
}  // namespace

Device::Current::Current(const Device& device) : device_(device) {
  device.driver.cuThreadExchangeStreamCaptureMode(&capture_mode_);  // for its own and back again
  device.driver.cuCtxGetCurrent(&before_);
  if (before_ != device.context) device.driver.cuCtxSetCurrent(device.context);
}

Device::Current::~Current() {
  if (before_ != device_.context) device_.driver.cuCtxSetCurrent(before_);
  device_.driver.cuThreadExchangeStreamCaptureMode(&capture_mode_);
}

Device::Device(const Driver& d, int o, MoverHost& host, uint64_t spin_ns)
    : driver(d),
      ordinal(o),
      host_(host),
      spin_ns_(spin_ns),
      peer_rate_(kMostRate),
      jobs_(kQueue),
      gate_queue_(kGateQueue) {
  auto check = [&](CUresult code, const char* what) {
    if (code == CUDA_SUCCESS) return;
    throw LinkFailure("GPU " + std::to_string(ordinal) + ": cannot " + what + ": " + driver.describe(code),
                      code);
  };
  CUdevice device;
  check(driver.cuDeviceGet(&device, ordinal), "find the device");
  CUuuid id;
  check(driver.cuDeviceGetUuid(&id, device), "read its UUID");
  std::memcpy(uuid.data(), id.bytes, sizeof id.bytes);
  check(driver.cuDevicePrimaryCtxRetain(&context, device), "take its primary context");
  try {
    Current current(*this);
    void* words = nullptr;
    check(driver.cuMemHostAlloc(&words, kWords * sizeof(uint32_t),
                                CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP),
          "pin host memory");
    std::memset(words, 0, kWords * sizeof(uint32_t));
    words_ = static_cast<volatile uint32_t*>(words);
    check(driver.cuMemHostGetDevicePointer(&words_at_, words, 0), "map host memory");
    for (size_t i = 0; i < kKernels; ++i)
      check(driver.cuStreamCreateWithPriority(&streams_[i].handle, CU_STREAM_NON_BLOCKING, 0),
            "make a stream");
    bell_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (bell_ < 0) throw LinkFailure("cannot make an eventfd", errno);
  } catch (...) {
    {
      Current current(*this);
      give_up()();
    }
    driver.cuDevicePrimaryCtxRelease(ordinal);
    if (bell_ >= 0) ::close(bell_);
    throw;
  }
  for (auto i = static_cast<uint32_t>(kWords); i-- > kFirstGate;) free_gates_.push_back(i);
  thread_ = std::thread([this] {
    guarded([this] { run(); },
            [this](const char* why) {
              host_.failed(why);
              fail_all();
            });
  });
}

Device::~Device() {
  stop();
  Reaper::of_process().submit(context, [give = give_up(), &driver = driver, ordinal = ordinal] {
    give();
    driver.cuDevicePrimaryCtxRelease(ordinal);
  });
  if (bell_ >= 0) ::close(bell_);
}

std::function<void()> Device::give_up() {
  std::array<CUstream, kStreams> streams;
  for (size_t i = 0; i < kStreams; ++i) streams[i] = std::exchange(streams_[i].handle, nullptr);
  auto tables = std::make_shared<RowCopies>(std::move(row_copies_));
  std::lock_guard lock(gate_mutex_);
  return [&driver = driver, streams, tables, aside = aside_.give_up(driver),
          words = std::exchange(words_, nullptr)] {
    aside();
    for (CUstream stream : streams)
      if (stream) driver.cuStreamDestroy(stream);
    if (words) driver.cuMemFreeHost(const_cast<uint32_t*>(words));
    tables->clear(driver);
  };
}

void Device::stop() {
  stopping_.store(true, std::memory_order_release);
  ring_fd(bell_);
  if (thread_.joinable()) thread_.join();
}

bool Device::post(const MoveJob& job) {
  if (!jobs_.push(job)) return false;
  if (held_.load(std::memory_order_seq_cst)) {
    unrung_.store(true, std::memory_order_seq_cst);
    if (held_.load(std::memory_order_seq_cst)) return true;
  }
  ring(wake_, bell_);
  return true;
}

void Device::let_go() {
  if (unrung_.load(std::memory_order_relaxed)) take_turn();  // by whom it was posted, so it is seen
  held_.fetch_sub(1, std::memory_order_seq_cst);
  if (unrung_.exchange(false, std::memory_order_seq_cst)) ring(wake_, bell_);
}

// ---------------------------------------------------------------- the thread

size_t Device::stream_of(const MoveJob& job) {
  if (job.kernel) return kKernels;
  if (job.joint) return job.cls > 1 ? kUrgent : 0;
  if (job.local) return kLocal;
  if (job.lane == Lane::out) return kOut;
  if (job.lane == Lane::in) return kIn;
  if (job.cls > 1) return kUrgent;
  return bulk_stream(job);
}

// With one other device, copies take turns on two streams: while one writes its number, the other copies. Long ones are all
// on one: on some machines those of two streams share the way and end together, and what follows is asked for too late.
// Each of several other devices has a stream: behind each other, copies to them would wait where the ways do not meet.
size_t Device::bulk_stream(const MoveJob& job) {
  const auto end = others_.begin() + static_cast<std::ptrdiff_t>(known_others_);
  auto place = std::find(others_.begin(), end, job.other);
  if (place == end) {
    if (known_others_ == kBulkStreams) return job.other % kBulkStreams;
    *place = job.other;
    ++known_others_;
  }
  if (known_others_ > 1) return static_cast<size_t>(place - others_.begin());
  return job.nbytes >= kLong ? 0 : bulk_ ^= 1;
}

bool Device::idle() const {
  return gates_.empty() && left_.empty() &&
         std::all_of(streams_.begin(), streams_.end(),
                     [](const Stream& stream) { return stream.inflight.empty(); });
}

void Device::run() {
  pthread_setname_np(pthread_self(), ("aiocomm-gpu" + std::to_string(ordinal)).c_str());
  prctl(PR_SET_TIMERSLACK, 1000UL);  // else the kernel adds 50 us to every sleep
  driver.cuCtxSetCurrent(context);
  int capture_mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver.cuThreadExchangeStreamCaptureMode(&capture_mode);  // as in Current
  uint64_t spin_until = 0;
  bool assisting = false;
  uint32_t seen_turns = 0;
  for (uint32_t turn = 0;; ++turn) {
    uint64_t now = now_ns();
    if (!waits_.load(std::memory_order_relaxed) && stands_back(now)) continue;
    bool did = (spin_ns_ || !host_.loop_looks() || turn % kStandBack == 0) && work(true);
    const uint32_t turns = looks_.useful.load(std::memory_order_relaxed);
    did = did || turns != seen_turns;
    seen_turns = turns;
    if (assisting && turn % 4 == 0) did = host_.assist() || did;
    if (did) {
      spin_until = now + spin_ns_;
      assisting = spin_ns_ != 0;
      continue;
    }
    {
      std::unique_lock lock(turn_, std::try_to_lock);
      if (!lock.owns_lock()) continue;
      plan_full_turn(now);
      if (stopping_.load(std::memory_order_acquire)) {
        gates_.clear();  // the transfers have ended without them
        if (idle() && jobs_.empty()) break;
      }
      if (now < spin_until || (spin_ns_ && ends_soon(now))) {
        announce_end(now);
        lock.unlock();
        relax();
        continue;
      }
    }
    if (assisting && host_.end_assist()) {
      spin_until = now + spin_ns_;
      continue;
    }
    assisting = false;
    sleep(now);
  }
  if (assisting) host_.end_assist();
}

void Device::ask() {
  looks_.asks.store(true, std::memory_order_relaxed);
  ring(wake_, bell_);
}

bool Device::work(bool by_thread) {
  std::unique_lock lock(turn_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  if (by_thread && looks_.asks.load(std::memory_order_relaxed))
    looks_.asks.store(false, std::memory_order_relaxed);  // set under the lock, as what it is about
  bool did = issue(by_thread);
  const uint64_t now = now_ns();
  did = collect(now, by_thread) || did;
  if (by_thread && !gates_.empty()) watch_gates(now);
  return open_gates() || did;
}

void Device::turn() {
  looks_.count.store(looks_.count.load(std::memory_order_relaxed) + 1,
                     std::memory_order_relaxed);  // one writer
  take_turn();
}

void Device::take_turn() {
  if (work(false)) looks_.useful.fetch_add(1, std::memory_order_relaxed);
}

// The loop issues only what no driver waits in: to ordinary host memory, say, it copies before it comes back.
bool Device::issue(bool by_thread) {
  if (!by_thread && (!left_.empty() || jobs_.empty())) return false;
  std::optional<Reaper::Undisturbed> undisturbed;
  std::optional<Current> current;
  if (!by_thread) {
    if (!undisturbed.emplace(Reaper::of_process())) return false;
    current.emplace(*this);
  }
  bool did = false;
  MoveJob job;
  uint16_t touched = 0;
  if (by_thread)
    for (Stream& stream : streams_)
      if (std::exchange(stream.untold, false) && stream.told != stream.issued) tell(stream, true);
  for (size_t n = 0; n < kBatch; ++n) {
    if (std::any_of(streams_.begin(), streams_.end(),
                    [](const Stream& stream) { return stream.inflight.size() >= kInflight; }))
      break;
    if (!left_.empty()) {
      job = left_.front();
      left_.pop_front();
    } else if (!jobs_.pop(job)) {
      break;
    }
    did = true;
    if (!by_thread && (job.rows || job.lane != Lane::peer || (job.kernel && !launched(*job.kernel)))) {
      left_.push_back(job);
      ask();
      break;
    }
    size_t index = stream_of(job);
    Stream& stream = streams_[index];
    int code = lost_;
    const bool early = job.early && spin_ns_ &&
                       std::all_of(streams_.begin(), streams_.begin() + kBulkStreams,
                                   [](const Stream& bulk) { return bulk.inflight.empty(); });
    const bool first = early && by_thread && !host_.loop_looks();
    if (first) host_.ends_soon(job.op, kEarlyNs);  // waking up takes longer than the copy
    const uint64_t taken_ns = now_ns();
    Stream* const collected = joined_;
    try {
      if (!code && job.joint && job.nbytes <= kJoined) {
        if (joined_ != &stream) send_joined();  // those of another stream
        joined_ = &stream;
        code = row_copies_.join(driver, job, stream.handle);
      } else {
        send_joined();
        if (!code) code = copy(job, stream);
      }
    } catch (const std::exception&) {  // nobody else knows of this job; and what was collected is gone
      code = CUDA_ERROR_OUT_OF_MEMORY;
      row_copies_.forget();
      joined_ = nullptr;
      fail(stream, code);
      if (collected && collected != &stream) fail(*collected, code);
    }
    job.issued_ns = now_ns();
    if (is_small(job)) {
      add(small.handed, taken_ns - job.posted_ns);
      add(small.issued, job.issued_ns - taken_ns);
    }
    if (code != CUDA_SUCCESS) {
      job.error = code;
      job.ended_ns = now_ns();
      finished_.push_back(job);
      if (is_lost(code)) lost_ = code;
      touched |= static_cast<uint16_t>(1u << index);  // those before it may have counted on it
      continue;
    }
    job.order = ++issued_;
    stream.inflight.emplace_back(++stream.issued, job);
    if (!by_thread) add(small.by_loop, 1);
    if (early && !first) early_.push_back(job.op);
    if (job.nbytes >= (job.joint ? kTellInOrder : kTellFrom)) {
      send_joined();
      if (!job.followed || index != 0 || !tell_aside(stream)) tell(stream, by_thread);
    } else if (!job.more) {
      touched |= static_cast<uint16_t>(1u << index);
    }
    if (job.rows || job.followed) break;  // these take long: what has ended meanwhile is told before the next
  }
  send_joined();
  for (size_t i = 0; i < kStreams; ++i)
    if (touched >> i & 1 && streams_[i].told != streams_[i].issued) tell(streams_[i], by_thread);
  for (OpId op : early_) host_.ends_soon(op, kEarlyNs);
  early_.clear();
  return did;
}

// Copies that were collected, as one call of the driver.
void Device::send_joined() {
  if (!joined_) return;
  Stream& stream = *std::exchange(joined_, nullptr);
  if (const CUresult code = row_copies_.send(driver, stream.handle); code != CUDA_SUCCESS) fail(stream, code);
}

// Before: the first launch of a function may have the driver load it.
bool Device::launched(const KernelCall& kernel) const {
  return std::find(launched_.begin(), launched_.end(), kernel.function) != launched_.end();
}

int Device::copy(MoveJob& job, Stream& stream) {
  if (KernelCall* kernel = job.kernel) {
    if (!stream.handle) {  // most processes launch none
      const int made = driver.cuStreamCreateWithPriority(&stream.handle, CU_STREAM_NON_BLOCKING, kMostUrgent);
      if (made != CUDA_SUCCESS) return made;
    }
    void* argument = kernel->argument.data();
    const int code = driver.cuLaunchKernel(reinterpret_cast<CUfunction>(kernel->function), kernel->blocks, 1,
                                           1, kernel->threads, 1, 1, 0, stream.handle, &argument, nullptr);
    if (code == CUDA_SUCCESS && !launched(*kernel)) launched_.push_back(kernel->function);
    return code;
  }
  if (job.pinned_from && !job.rows) return copy_in_blocks(driver, job, stream.handle);
  if (!job.rows) return driver.cuMemcpyAsync(job.to, job.from, job.nbytes, stream.handle);
  int code = row_copies_.queue(driver, job, stream.handle);
  if (code != CUDA_SUCCESS) driver.cuStreamSynchronize(stream.handle);  // some may be under way
  return code;
}

// Has the stream write how far it is, behind what it was given. Where that fails, the stream is waited for: not by a loop.
void Device::tell(Stream& stream, bool by_thread) {
  auto index = static_cast<size_t>(&stream - streams_.data());
  CUresult code = driver.cuStreamWriteValue32(stream.handle, words_at_ + index * kLine * sizeof(uint32_t),
                                              stream.issued, CU_STREAM_WRITE_VALUE_DEFAULT);
  if (code == CUDA_SUCCESS) {
    stream.told = stream.issued;
  } else if (by_thread) {
    fail(stream, code);
  } else {
    stream.untold = true;
    ask();
  }
}

// The same where more is to follow at once, by an event. False: the driver refuses that.
bool Device::tell_aside(Stream& stream) {
  if (aside_.tell(driver, stream.handle, stream.issued) != CUDA_SUCCESS) return false;
  stream.told = stream.issued;
  return true;
}

// What the stream has may still run: it is waited for as far as the driver can tell.
void Device::fail(Stream& stream, int error) {
  driver.cuStreamSynchronize(stream.handle);
  for (auto& [number, job] : stream.inflight) {
    job.error = error;
    job.ended_ns = now_ns();
    finished_.push_back(job);
  }
  stream.inflight.clear();
  if (is_lost(error)) lost_ = error;
}

bool Device::collect(uint64_t now, bool by_thread) {
  for (size_t i = 0; i < kStreams; ++i) {
    Stream& stream = streams_[i];
    if (stream.inflight.empty()) continue;
    // acquire: what the copies wrote is there once the number is
    uint32_t done = __atomic_load_n(&word(i * kLine), __ATOMIC_ACQUIRE);
    if (i == 0 && !aside_.empty()) done = told_aside(done, by_thread);
    while (!stream.inflight.empty() && static_cast<int32_t>(done - stream.inflight.front().first) >= 0) {
      MoveJob& job = stream.inflight.front().second;
      job.ended_ns = stream.done_ns = now;
      if (i < kPeerStreams) rate(job);
      finished_.push_back(job);
      stream.inflight.pop_front();
    }
    if (by_thread && !stream.inflight.empty()) watch(stream, now);
  }
  if (finished_.empty()) return false;
  finish();
  return true;
}

// The loop asks for no event while memory is given back: it would wait for that.
uint32_t Device::told_aside(uint32_t done, bool by_thread) {
  if (by_thread) return aside_.latest(driver, done);
  const Reaper::Undisturbed undisturbed(Reaper::of_process());
  if (!undisturbed) return done;
  const Current current(*this);
  return aside_.latest(driver, done);
}

void Device::finish() {
  std::vector<MoveJob> jobs;
  jobs.swap(finished_);
  for (const MoveJob& job : jobs) row_copies_.ended(job);
  host_.moved(jobs.data(), jobs.size());
  if (is_small(jobs.front())) {
    add(small.count, 1);
    add(small.seen, jobs.front().ended_ns - jobs.front().issued_ns);
    add(small.told, now_ns() - jobs.front().ended_ns);
  }
  jobs.clear();
  if (finished_.empty()) finished_.swap(jobs);  // keeps its memory
}

// A stream that has failed writes nothing.
void Device::watch(Stream& stream, uint64_t now) {
  const MoveJob& first = stream.inflight.front().second;
  if (now < first.posted_ns + kOverdueNs + first.nbytes + 2 * first.slow_ns ||
      now < stream.looked_ns + kLookNs)
    return;
  stream.looked_ns = now;
  CUresult code = driver.cuStreamQuery(stream.handle);
  if (code != CUDA_SUCCESS && code != CUDA_ERROR_NOT_READY) fail(stream, code);
}

}  // namespace aiocomm::cuda
