#include "links/cuda/link.hpp"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "links/cuda/reaper.hpp"

namespace aiocomm::cuda {

namespace {

constexpr std::chrono::milliseconds kPatience{1000};  // of close(), with streams that are busy
constexpr uint64_t kEagerBounce =
    1 << 20;  // smaller: ordinary memory at once rather than pinned memory later

uint64_t random_token() {
  uint64_t token = 0;
  if (getrandom(&token, sizeof token, 0) != sizeof token || token == 0)
    throw LinkFailure("the system gives no random numbers", errno);
  return token;
}

// One for all communicators of a process: to each other they are the same process.
uint64_t process_token() {
  static const uint64_t token = random_token();
  return token;
}

}  // namespace

// ---------------------------------------------------------------- state

State::State(const Driver& d, Host& h)
    : driver(d),
      host(h.mover_host()),
      process(process_token()),
      helper(
          driver, [this] { return look_for_freed(); }, [this](const char* why) { host.failed(why); }),
      mappings(driver, host, helper, static_cast<size_t>(h.setting("gpu_mappings", 1024))),
      exports(driver, [this] { helper.submit([] {}); }),
      bounces(driver, static_cast<uint64_t>(h.setting("pinned_bytes", 1 << 30))),
      relays(driver, static_cast<uint64_t>(h.setting("gpu_relay_bytes", 1 << 30))),
      pinned(driver, host, helper, static_cast<uint64_t>(h.setting("gpu_pinned_bytes", 16e9))),
      spin_ns_(static_cast<uint64_t>(h.setting("gpu_spin_s", 0) * 1e9)) {}

State::~State() {
  stop();
  give_up();  // what buffers had until now
  for (auto& device : devices_) delete device.load();
}

Device& State::device(int ordinal) {
  if (ordinal < 0 || ordinal >= driver.devices || ordinal >= static_cast<int>(kDevices))
    throw DeviceUsage("no GPU " + std::to_string(ordinal) + ": this process sees " +
                      std::to_string(driver.devices) + " (see CUDA_VISIBLE_DEVICES)");
  if (Device* device = started(ordinal)) return *device;
  std::lock_guard lock(mutex_);
  if (Device* device = started(ordinal)) return *device;
  if (stopped_) throw LinkFailure("the communicator is closed", ESHUTDOWN);
  auto fresh = new Device(driver, ordinal, host, spin_ns_);
  devices_[static_cast<size_t>(ordinal)].store(fresh, std::memory_order_release);
  return *fresh;
}

void State::turn() {
  const int most = std::min(driver.devices, static_cast<int>(kDevices));
  for (int i = 0; i < most; ++i)
    if (Device* device = started(i)) device->turn();
}

bool State::due() const {
  const int most = std::min(driver.devices, static_cast<int>(kDevices));
  for (int i = 0; i < most; ++i)
    if (const Device* device = started(i); device && device->due()) return true;
  return false;
}

void State::stop() {
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  for (auto& device : devices_)
    if (Device* started = device.load()) started->stop();
  mappings.clear();
  exports.clear();
  helper.stop();
  pinned.clear();
}

uint64_t State::give_up() {
  uint64_t last = 0;
  for (auto& device : devices_) {
    Device* const started = device.load();
    if (!started) continue;
    if (!last)  // of whichever device
      for (const auto& give : {bounces.give_up(), relays.give_up()})
        Reaper::of_process().submit(started->context, give);
    last = Reaper::of_process().submit(started->context, started->give_up());
  }
  return last;
}

// Twenty times a second while there is something to move, and once a second otherwise.
int State::look_for_freed() {
  using std::chrono::duration_cast, std::chrono::milliseconds, std::chrono::steady_clock;
  constexpr int kSoon = 50, kRarely = 1000;
  Device* any = nullptr;
  for (auto& device : devices_)
    if ((any = device.load(std::memory_order_acquire))) break;
  if (!any || exports.empty()) return 0;
  const uint64_t seen = described.load(std::memory_order_relaxed);
  if (seen != described_then_) pause_ms_ = kSoon;
  described_then_ = seen;
  const auto since = duration_cast<milliseconds>(steady_clock::now() - looked_).count();
  if (since < pause_ms_) return pause_ms_ - static_cast<int>(since);
  driver.cuCtxSetCurrent(any->context);
  const std::vector<Gone> gone = exports.gone();
  if (!gone.empty()) host.freed(gone.data(), gone.size());
  looked_ = steady_clock::now();
  pause_ms_ = std::clamp(2 * pause_ms_, kSoon, kRarely);
  return pause_ms_;
}

CudaBuffer::~CudaBuffer() {
  mapping.reset();  // before the state, whose helper closes it
  if (Device* started = state->started(device); started && !borrows_gate) started->give_back(gate);
  if (bounce) state->bounces.give_back(bounce);
  if (own)
    Reaper::of_process().submit(state->started(device)->context,
                                [&driver = state->driver, memory = own] { driver.cuMemFree(memory); });
  if (relay) state->relays.give_back(device, relay, relay_size);
}

// ---------------------------------------------------------------- the link

std::shared_ptr<LinkPeer> CudaLink::attach(Rank, uint64_t, const std::vector<int>& fds, std::string_view,
                                           bool) {
  for (int fd : fds) ::close(fd);
  throw LinkFailure("the cuda link moves memory beside another link, and joins no processes", EOPNOTSUPP);
}

State& CudaLink::state() {
  std::lock_guard lock(mutex_);
  if (!state_) {
    const Driver& driver = Driver::of_process();
    if (!driver.usable()) throw LinkFailure(driver.refusal, driver.error);
    state_ = std::make_shared<State>(driver, host_);
    turning_.store(state_.get(), std::memory_order_release);
  }
  return *state_;
}

int CudaLink::devices() const {
  const Driver& driver = Driver::of_process();
  if (!driver.usable()) throw LinkFailure(driver.refusal, driver.error);
  return driver.devices;
}

Allocation CudaLink::look_up_known(const Driver& driver, uint64_t address, uint64_t nbytes) {
  Known& known = known_[(address * 0x9e3779b97f4a7c15ull) >> 56];
  const Allocation& last = known.allocation;
  if (known.address == address && last.ipc && address + nbytes <= last.base + last.extent) {
    unsigned long long id = 0;
    if (driver.cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, address) == CUDA_SUCCESS &&
        id == last.buffer_id)
      return last;
  }
  known.allocation = look_up(driver, address, nbytes);
  known.address = address;
  Allocation found = known.allocation;
  found.fresh = true;
  return found;
}

std::unique_ptr<DeviceBuffer> CudaLink::bind(uint64_t address, uint64_t nbytes, int device, uint64_t stream) {
  State& state = this->state();
  auto buffer = std::make_unique<CudaBuffer>(state_);
  buffer->place.address = address;
  buffer->nbytes = nbytes;
  if (nbytes == 0) {
    buffer->device = device < 0 ? 0 : device;
    state.device(buffer->device);
    return buffer;
  }
  state.described.fetch_add(1, std::memory_order_relaxed);
  Allocation found = look_up_known(state.driver, address, nbytes);
  if (device >= 0 && found.device != device)
    throw DeviceUsage("the array says that it is on GPU " + std::to_string(device) +
                      ", and its memory is on GPU " + std::to_string(found.device));
  Device& owner = state.device(found.device);
  buffer->device = found.device;
  buffer->ipc = found.ipc;
  buffer->place.base = found.base;
  buffer->place.extent = found.extent;
  buffer->place.buffer_id = found.buffer_id;
  buffer->place.owner = state.process;
  buffer->place.device = static_cast<uint16_t>(found.device);
  buffer->place.uuid = owner.uuid;
  buffer->place.plain = found.ipc;
  // Exporting takes the driver tens of microseconds: here nobody but the caller waits for it.
  if (found.fresh && found.ipc) state.exports.handle_of(buffer->place, owner, buffer->place.handle);
  if (stream == kNoStream) return buffer;
  Device::Current current(owner);
  auto handle = reinterpret_cast<CUstream>(stream);
  int capturing = 0;
  CUresult code = state.driver.cuStreamIsCapturing(handle, &capturing);
  // IMPLICIT: the legacy stream, while a stream that waits for it is captured.
  if (code == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT ||
      (code == CUDA_SUCCESS && capturing != CU_STREAM_CAPTURE_STATUS_NONE))
    throw DeviceUsage(
        "the stream is being captured into a CUDA graph: a transfer cannot be part of one. Send before or "
        "after the capture, or on another stream");
  if (code == CUDA_ERROR_INVALID_HANDLE)
    throw DeviceUsage("stream= is not a stream of this process (was it destroyed?): " +
                      state.driver.describe(code));
  if (code == CUDA_SUCCESS) code = state.driver.cuStreamQuery(handle);
  if (code == CUDA_ERROR_NOT_READY)
    buffer->gate = owner.gate_behind(handle);
  else if (code != CUDA_SUCCESS)
    throw LinkFailure("work on the array's stream has failed: " + state.driver.describe(code), code);
  return buffer;
}

std::unique_ptr<DeviceBuffer> CudaLink::part(const DeviceBuffer& whole, uint64_t offset, uint64_t nbytes) {
  auto& all = static_cast<const CudaBuffer&>(whole);
  auto buffer = std::make_unique<CudaBuffer>(state_);
  buffer->place = all.place;
  buffer->place.address += offset;
  buffer->nbytes = nbytes;
  buffer->device = all.device;
  buffer->ipc = all.ipc;
  buffer->gate = all.gate;
  buffer->borrows_gate = true;
  return buffer;
}

std::unique_ptr<DeviceBuffer> CudaLink::reserve(int device) {
  State& state = this->state();
  Device& owner = state.device(device);
  auto buffer = std::make_unique<CudaBuffer>(state_);
  buffer->device = device;
  buffer->allocates = true;
  buffer->place.owner = state.process;
  buffer->place.device = static_cast<uint16_t>(device);
  buffer->place.uuid = owner.uuid;
  return buffer;
}

Reach::State CudaLink::allocate(DeviceBuffer& buffer, uint64_t nbytes, OpId waiter) {
  auto& mine = static_cast<CudaBuffer&>(buffer);
  {
    std::lock_guard lock(state_->made_mutex);
    if (auto it = state_->made.find(waiter); it != state_->made.end()) {
      mine.own = it->second;
      state_->made.erase(it);
      if (!mine.own) return Reach::State::refused;
    }
  }
  if (!mine.own) {
    state_->helper.submit([state = state_.get(), nbytes, device = mine.device, waiter] {
      CUdeviceptr memory = 0;
      {
        Device::Current current(*state->started(device));
        if (state->driver.cuMemAlloc(&memory, nbytes) != CUDA_SUCCESS) memory = 0;
      }
      {
        std::lock_guard lock(state->made_mutex);
        state->made[waiter] = memory;
      }
      state->host.go_on(&waiter, 1);
      std::lock_guard lock(state->made_mutex);
      if (auto left = state->made.extract(waiter); left && left.mapped())  // by a receive that has ended
        free_later(device, left.mapped(), false);
    });
    return Reach::State::opening;
  }
  Allocation found;
  try {
    found = look_up(state_->driver, mine.own, nbytes);
  } catch (const std::exception&) {
    return Reach::State::refused;
  }
  mine.nbytes = nbytes;
  mine.ipc = found.ipc;
  mine.place.plain = found.ipc;
  mine.place.address = mine.own;
  mine.place.base = found.base;
  mine.place.extent = found.extent;
  mine.place.buffer_id = found.buffer_id;
  return Reach::State::ready;
}

bool CudaLink::post(const MoveJob& job) { return state_->started(job.device)->post(job); }

void CudaLink::await_gate(const Gate& gate, int device, OpId waiter, std::shared_ptr<Company> company) {
  state_->started(device)->await_gate({gate, waiter, 0, std::move(company)});
}

void CudaLink::turn() {
  if (State* state = turning_.load(std::memory_order_acquire)) state->turn();
}

void CudaLink::rehearse() {
  const State* state = turning_.load(std::memory_order_acquire);
  const int most = state ? std::min(state->driver.devices, WakePage::kDevices) : 0;
  for (int i = 0; i < most; ++i)
    if (Device* device = state->started(i)) device->rehearse();
}

bool CudaLink::due() const {
  const State* state = turning_.load(std::memory_order_acquire);
  return state && state->due();
}

Reach::State CudaLink::take_bounce(DeviceBuffer& buffer, uint64_t nbytes, OpId waiter) {
  auto& mine = static_cast<CudaBuffer&>(buffer);
  Bounces& bounces = state_->bounces;
  mine.bounce = bounces.take(nbytes);
  if (mine.bounce) return Reach::State::ready;
  const bool pins = bounces.may_pin(nbytes);
  // A row of a list that goes to ordinary memory takes the driver 10 us, and blocks it.
  const bool waits = pins && waiter && (nbytes >= kEagerBounce || buffer.packing);
  // Small ones do not wait: what they ask for is for later ones, one at a time.
  if (waits || (pins && !state_->pinning.exchange(true)))
    state_->helper.submit([state = state_.get(), nbytes, device = mine.device, waiter = waits ? waiter : 0] {
      state->driver.cuCtxSetCurrent(state->started(device)->context);
      std::byte* memory = state->bounces.make(nbytes);
      if (memory) state->bounces.give_back(memory);  // at hand for whoever asks next
      if (waiter)
        state->host.go_on(&waiter, 1);
      else
        state->pinning = false;
    });
  if (waits) return Reach::State::opening;
  mine.bounce = bounces.plain(nbytes);
  return mine.bounce ? Reach::State::ready : Reach::State::refused;
}

Reach::State CudaLink::take_relay(DeviceBuffer& buffer, uint64_t nbytes, LinkPeer& peer, OpId waiter) {
  auto& mine = static_cast<CudaBuffer&>(buffer);
  if (peer.process() < 0) return Reach::State::refused;
  mine.relay = state_->relays.take(mine.device, nbytes, mine.relay_size);
  if (!mine.relay) {
    if (!state_->relays.may_make(mine.device, nbytes)) return Reach::State::refused;
    state_->helper.submit([state = state_.get(), nbytes, device = mine.device, waiter] {
      state->driver.cuCtxSetCurrent(state->started(device)->context);
      state->relays.make(device, nbytes);
      state->host.go_on(&waiter, 1);
    });
    return Reach::State::opening;
  }
  // The whole of it is one allocation of ours, which stays until the link is closed.
  mine.place.address = mine.place.base = mine.relay;
  mine.place.extent = mine.relay_size;
  CUresult known =
      state_->driver.cuPointerGetAttribute(&mine.place.buffer_id, CU_POINTER_ATTRIBUTE_BUFFER_ID, mine.relay);
  if (known == CUDA_SUCCESS &&
      !state_->exports.handle_of(mine.place, *state_->started(mine.device), mine.place.handle))
    known = CUDA_ERROR_NOT_SUPPORTED;
  if (known != CUDA_SUCCESS) {
    state_->relays.give_back(mine.device, std::exchange(mine.relay, 0), mine.relay_size);
    return Reach::State::refused;
  }
  mine.place.exported = Export::ipc;
  mine.place.plain = 1;
  return Reach::State::ready;
}

uint64_t CudaLink::load(int device) const {
  return host_.wake_page().load[device].load(std::memory_order_relaxed);
}

void CudaLink::forget(uint64_t owner) {
  if (state_) state_->mappings.forget(owner);
}

void CudaLink::forget(uint64_t owner, const Gone& memory) {
  if (state_) state_->mappings.forget(owner, memory);
}

void CudaLink::stop() {
  std::shared_ptr<State> state;
  {
    std::lock_guard lock(mutex_);
    state = state_;
  }
  if (!state) return;
  state->stop();
  // Behind work of the user's that takes longer it is given back when that has ended.
  Reaper::of_process().wait(state->give_up(), kPatience);
}

// Of small copies between devices: how many were seen to end, and nanoseconds from their posting to the copy thread, with
// the driver, from there until they were seen, and until their transfers had ended; in all. And copies of any size that a
// loop that spins has issued by itself.
std::map<std::string, uint64_t> CudaLink::counters() {
  std::map<std::string, uint64_t> found;
  std::lock_guard lock(mutex_);
  for (int i = 0; state_ && i < WakePage::kDevices; ++i) {
    const Device* device = state_->started(i);
    if (!device) continue;
    const SmallCopies& small = device->small;
    const std::string name = "gpu" + std::to_string(i) + ".small_";
    found["gpu" + std::to_string(i) + ".by_loop"] = small.by_loop.load(std::memory_order_relaxed);
    for (auto [what, sum] : {std::pair{"copies", &small.count},
                             {"handed_ns", &small.handed},
                             {"issued_ns", &small.issued},
                             {"seen_ns", &small.seen},
                             {"told_ns", &small.told}})
      found[name + what] = sum->load(std::memory_order_relaxed);
  }
  return found;
}

std::string CudaLink::describe(int error) const { return Driver::of_process().describe(error); }

namespace {
// Looked for without loading the driver: most processes of a machine without GPUs never ask for it.
bool may_have_gpus() {
  const char* named = std::getenv("AIOCOMM_LIBCUDA");
  return (named && *named) || access("/dev/nvidiactl", F_OK) == 0 || access("/dev/dxg", F_OK) == 0;
}

const LinkRegistration kRegistration{"cuda", 90, [](Host& host) -> std::unique_ptr<Link> {
                                       if (!may_have_gpus()) return nullptr;
                                       return std::make_unique<CudaLink>(host);
                                     }};
}  // namespace
}  // namespace aiocomm::cuda
