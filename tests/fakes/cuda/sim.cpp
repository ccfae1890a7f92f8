#include "sim.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

namespace fake {

namespace {

constexpr auto kPoll = std::chrono::microseconds(50);

std::vector<int> visible(int count) {
  std::vector<int> out;
  const char* text = std::getenv("CUDA_VISIBLE_DEVICES");
  if (!text) {
    for (int i = 0; i < count; ++i) out.push_back(i);
    return out;
  }
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) {
    char* end = nullptr;
    long index = std::strtol(part.c_str(), &end, 10);
    if (end == part.c_str() || index < 0 || index >= count) break;  // as the real one: the rest is not shown
    out.push_back(static_cast<int>(index));
  }
  return out;
}

uint64_t number(const char* name, uint64_t fallback) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 0) : fallback;
}

}  // namespace

Sim::Sim()
    : version(static_cast<int>(number("FAKE_CUDA_VERSION", 13000))),
      peers_allowed(number("FAKE_CUDA_PEERS", 1) != 0) {
  auto shown = visible(static_cast<int>(number("FAKE_CUDA_DEVICES", 4)));
  memory = std::make_unique<Memory>(static_cast<int>(shown.size()), number("FAKE_CUDA_MEMORY", 4ull << 30));
  for (size_t i = 0; i < shown.size(); ++i) {
    auto device = std::make_unique<Device>();
    int index = static_cast<int>(i);
    device->physical = shown[i];
    device->context.handle = reinterpret_cast<CUcontext>(fresh_handle());
    device->context.device = index;
    device->context.legacy = std::make_shared<Stream>();
    device->context.legacy->context = &device->context;
    device->context.legacy->blocking = true;
    device->default_pool = std::make_unique<Pool>();
    device->default_pool->device = index;
    device->default_pool->is_default = true;
    device->default_pool->exportable = false;
    device->default_pool->arena = &memory->arena(index);
    devices.push_back(std::move(device));
  }
  // FAKE_CUDA_PAUSE: "device:engine" by comma, with the engines' numbers.
  if (const char* text = std::getenv("FAKE_CUDA_PAUSE")) {
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, ',');) {
      size_t device = 0, engine = 0;
      if (std::sscanf(part.c_str(), "%zu:%zu", &device, &engine) == 2 && device < devices.size() &&
          engine < kEngines)
        devices[device]->engines[engine].paused = true;
    }
  }
  for (int32_t i = kEvents; i-- > 0;) event_slots.push_back(i);
}

Sim& sim() {
  static auto* one = new Sim;  // never freed: its threads outlive the end of main
  return *one;
}

CUresult Sim::health(const Context& context) const {
  if (CUresult code = faults().lost(context.device)) return code;
  return context.error;
}

Context* Sim::context_of(CUcontext handle) {
  for (auto& device : devices)
    if (device->context.handle == handle) return &device->context;
  return nullptr;
}

StreamPtr Sim::make_stream(Context& context, bool blocking, int priority) {
  auto stream = std::make_shared<Stream>();
  stream->handle = reinterpret_cast<CUstream>(fresh_handle());
  stream->context = &context;
  stream->blocking = blocking;
  stream->priority = priority;
  return stream;
}

CUresult Sim::submit(Lock& lock, const StreamPtr& stream, Op op) {
  if (CUresult code = health(*stream->context)) return code;
  if (stream->capture != CU_STREAM_CAPTURE_STATUS_NONE) {
    if (op.event && op.kind == Op::Kind::record) op.event->captured = true;
    return stream->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE ? CUDA_SUCCESS
                                                              : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  }
  Context& context = *stream->context;
  if (op.kind == Op::Kind::copy || op.kind == Op::Kind::fill || op.kind == Op::Kind::kernel ||
      op.kind == Op::Kind::record)
    changed.wait(lock, [&] { return !context.giving_back || health(context); });
  // The legacy stream waits for all blocking ones of its context, and they for it.
  if (stream == context.legacy) {
    for (auto& other : active_)
      if (other->context == &context && other->blocking && other != stream)
        op.after.emplace_back(other, other->submitted);
  } else if (stream->blocking && context.legacy->submitted > context.legacy->completed) {
    op.after.emplace_back(context.legacy, context.legacy->submitted);
  }
  bool pageable = false;
  if (op.kind == Op::Kind::copy) {
    for (auto [address, pitch] : {std::pair{op.to, op.to_pitch}, std::pair{op.from, op.from_pitch}}) {
      std::vector<Piece> pieces;
      if (!memory->pieces(address, (op.height - 1) * pitch + op.width, pieces))
        return CUDA_ERROR_INVALID_VALUE;
      for (auto& piece : pieces) {
        pageable |= !piece.range;
        if (piece.range) op.uses.push_back(piece.range);
      }
    }
  }
  for (auto& range : op.uses) ++range->pending;
  op.sequence = ++sequence_;
  if (stream->queue.empty()) active_.push_back(stream);
  stream->queue.push_back(std::move(op));
  uint64_t mine = ++stream->submitted;
  pump();
  if (!pageable) return CUDA_SUCCESS;
  faults().count("pageable_copies");
  return wait(lock, stream, mine);
}

CUresult Sim::wait(Lock& lock, const StreamPtr& stream, uint64_t until) {
  CUresult code = CUDA_SUCCESS;
  changed.wait(lock, [&] { return (code = health(*stream->context)) || stream->completed >= until; });
  return code;
}

CUresult Sim::wait_all(Lock& lock, Context& context) {
  CUresult code = CUDA_SUCCESS;
  changed.wait(lock, [&] {
    if ((code = health(context))) return true;
    for (auto& stream : active_)
      if (stream->context == &context) return false;
    return true;
  });
  return code;
}

CUresult Sim::come_to_rest(Lock& lock, Context& context) {
  ++context.giving_back;
  const CUresult code = wait_all(lock, context);
  --context.giving_back;
  changed.notify_all();
  return code;
}

bool Sim::is_done(const StreamPtr& stream) const {
  if (stream->completed != stream->submitted) return false;
  return stream != stream->context->legacy || std::none_of(active_.begin(), active_.end(), [&](auto& other) {
           return other->context == stream->context && other->blocking;
         });
}

void Sim::heal(Lock& lock) {
  std::set<Context*> broken;
  for (auto& device : devices)
    if (health(device->context)) broken.insert(&device->context);
  for (Context* context : broken) {
    auto& engines = devices[context->device]->engines;
    auto still = [&] {
      return std::none_of(engines.begin(), engines.end(), [](auto& one) { return one.busy; });
    };
    changed.wait(lock, still);
    for (auto& engine : engines) engine.ready.clear();
    context->error = CUDA_SUCCESS;
  }
  faults().clear();
  for (auto& stream : active_) {
    if (!broken.count(stream->context)) continue;
    while (!stream->queue.empty()) {
      Op& op = stream->queue.front();
      if (op.kind == Op::Kind::record || op.kind == Op::Kind::free_memory) complete_at_once(*stream, op);
      finish(*stream);
    }
  }
  pump();
}

void Sim::pump() {
  polled_ = false;
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < active_.size(); ++i) moved |= advance(StreamPtr(active_[i]));
    std::erase_if(active_, [](const StreamPtr& stream) { return stream->queue.empty(); });
  }
  if (polled_ && !std::exchange(poller_started_, true))
    std::thread([this] {
      pthread_setname_np(pthread_self(), "fake-poller");  // else it has its maker's
      poll();
    }).detach();
  changed.notify_all();
}

bool Sim::advance(const StreamPtr& stream) {
  bool moved = false;
  while (!stream->queue.empty() && !stream->offered) {
    if (health(*stream->context)) return moved;
    Op& op = stream->queue.front();
    if (!ready(op)) return moved;
    if (op.kind == Op::Kind::copy || op.kind == Op::Kind::fill || op.kind == Op::Kind::kernel ||
        op.kind == Op::Kind::host_function) {
      int device = stream->context->device;
      auto& engine = devices[device]->engines[static_cast<size_t>(op.engine)];
      engine.ready.emplace(op.sequence, stream);
      stream->offered = true;
      if (!std::exchange(engine.started, true))
        std::thread([this, device, kind = op.engine] {
          pthread_setname_np(pthread_self(), "fake-engine");  // else it has its maker's
          run_engine(device, kind);
        }).detach();
      return true;
    }
    complete_at_once(*stream, op);
    finish(*stream);
    moved = true;
  }
  return moved;
}

bool Sim::ready(const Op& op) {
  for (auto& [stream, until] : op.after)
    if (stream->completed < until) return false;
  if (op.kind == Op::Kind::wait_event &&
      op.event->cell->completed.load(std::memory_order_acquire) < op.ticket) {
    polled_ |= op.event->slot >= 0 || op.event->peer;
    return false;
  }
  if (op.kind != Op::Kind::wait_value) return true;
  std::vector<Piece> pieces;
  if (!memory->pieces(op.to, op.nbytes, pieces) || pieces.size() != 1)
    return true;  // complete_at_once says so
  auto compare = [&]<typename Word, typename Signed>(Word found, Signed) {
    auto value = static_cast<Word>(op.value);
    switch (op.flags & 3) {
      case CU_STREAM_WAIT_VALUE_GEQ:
        return static_cast<Signed>(found - value) >= 0;
      case CU_STREAM_WAIT_VALUE_EQ:
        return found == value;
      case CU_STREAM_WAIT_VALUE_AND:
        return (found & value) != 0;
      default:
        return static_cast<Word>(~(found | value)) != 0;
    }
  };
  bool met = op.nbytes == 4
                 ? compare(reinterpret_cast<std::atomic<uint32_t>*>(pieces[0].bytes)->load(), int32_t{})
                 : compare(reinterpret_cast<std::atomic<uint64_t>*>(pieces[0].bytes)->load(), int64_t{});
  polled_ |= !met;
  return met;
}

void Sim::complete_at_once(Stream& stream, Op& op) {
  Context& context = *stream.context;
  switch (op.kind) {
    case Op::Kind::record:
      if (op.event->cell->completed.load() < op.ticket) op.event->cell->completed.store(op.ticket);
      return;
    case Op::Kind::write_value:
    case Op::Kind::wait_value: {
      std::vector<Piece> pieces;
      bool stale = false;
      if (translate(*devices[context.device], op.to, op.nbytes, pieces, stale) || pieces.size() != 1) {
        context.error = CUDA_ERROR_ILLEGAL_ADDRESS;
      } else if (op.kind == Op::Kind::write_value && !stale) {
        // Release: who reads the value sees the bytes that were copied before it.
        if (op.nbytes == 4)
          reinterpret_cast<std::atomic<uint32_t>*>(pieces[0].bytes)
              ->store(static_cast<uint32_t>(op.value), std::memory_order_release);
        else
          reinterpret_cast<std::atomic<uint64_t>*>(pieces[0].bytes)
              ->store(op.value, std::memory_order_release);
      }
      return;
    }
    case Op::Kind::free_memory:
      --op.uses.front()->pending;
      memory->release(op.uses.front());
      op.uses.clear();
      return;
    default:
      return;
  }
}

void Sim::finish(Stream& stream) {
  for (auto& range : stream.queue.front().uses) --range->pending;
  stream.queue.pop_front();
  stream.offered = false;
  ++stream.completed;
}

void Sim::poll() {
  Lock lock(mutex);
  for (;;) {
    changed.wait(lock, [this] { return polled_; });
    lock.unlock();
    std::this_thread::sleep_for(kPoll);  // another process or the host writes what is waited for
    lock.lock();
    pump();
  }
}

}  // namespace fake
