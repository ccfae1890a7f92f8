#include "core/engine.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <utility>

#include "core/clock.hpp"
#include "core/slice.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kNever = ~0ull;
constexpr int kTurns = 4;
constexpr uint64_t kLookEvery_ns = 20'000;  // at descriptors, by a thread that is busy otherwise

double number(const EngineConfig& config, const std::string& name, double fallback) {
  auto it = config.numbers.find(name);
  return it == config.numbers.end() ? fallback : it->second;
}

int open_or_throw(int fd, const char* what) {
  if (fd < 0) {
    const int error = errno;
    throw LinkFailure(
        std::string("cannot make ") + what + (error == EMFILE ? std::string(": ") + kOutOfFiles : ""), error);
  }
  return fd;
}
}  // namespace

Engine::Engine(EngineConfig config)
    : config_(std::move(config)),
      eager_max_(static_cast<uint64_t>(number(config_, "eager_max", 64 << 10))),
      unexpected_max_(static_cast<uint64_t>(number(config_, "unexpected_bytes", 16 << 20))),
      drain_ns_(static_cast<uint64_t>(number(config_, "drain_timeout_s", 2.0) * 1e9)),
      spin_ns_(static_cast<uint64_t>(number(config_, "engine_spin_s", 0) * 1e9)),
      rest_ns_(static_cast<uint64_t>(number(config_, "pair_idle_s", 0) * 1e9)),
      queue_depth_(static_cast<size_t>(number(config_, "queue_depth", 65536))),
      submissions_(queue_depth_),
      completed_(16384) {
  page_fd_ = open_or_throw(memfd_create("aiocomm-wake", MFD_CLOEXEC | MFD_ALLOW_SEALING),
                           "a shared page (memfd_create)");
  if (ftruncate(page_fd_, 4096) != 0) throw LinkFailure("cannot size a shared page", errno);
  fcntl(page_fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);  // peers map it only so
  void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, page_fd_, 0);
  if (page == MAP_FAILED) throw LinkFailure("cannot map a shared page", errno);
  page_.reset(new (page) WakePage);
  loop_fd_ = open_or_throw(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "an eventfd");
  engine_fd_ = open_or_throw(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "an eventfd");
  engine_epoll_ = open_or_throw(epoll_create1(EPOLL_CLOEXEC), "an epoll set");
  express_epoll_ = open_or_throw(epoll_create1(EPOLL_CLOEXEC), "an epoll set");
  epoll_event event{EPOLLIN, {nullptr}};
  epoll_ctl(engine_epoll_, EPOLL_CTL_ADD, engine_fd_, &event);

  int threads = std::max(1, static_cast<int>(number(config_, "copy_threads", 2)));
  cores_ = static_cast<uint32_t>(number(config_, "cores", 1));
  copier_ = std::make_unique<Copier>(
      threads, [this](CopyJob& job) { guarded([&] { job_done(job); }); }, [this] { ring_engine(); });

  const auto preempt_ns = static_cast<uint64_t>(number(config_, "preempt_s", 100e-6) * 1e9);
  SchedConfig sched;
  sched.max_chunk = static_cast<uint64_t>(number(config_, "chunk_max", 4 << 20));
  sched.min_share = number(config_, "min_share", 0.05);
  auto wanted = [this](const std::string& name) {
    return config_.links.empty() || name == "self" ||
           std::find(config_.links.begin(), config_.links.end(), name) != config_.links.end();
  };
  for (const LinkEntry& entry : link_registry()) {
    if (!wanted(entry.name)) continue;
    if (entry.by_name && config_.links.empty()) continue;
    std::unique_ptr<Link> link = entry.factory(*this);
    if (!link) continue;
    if (link->mover()) {
      device_.use(link->mover(), static_cast<uint8_t>(links_.size()), preempt_ns);
      spin_tries_ = setting("gpu_spin_s", 0) > 0 ? 1000 : 0;
    }
    link_names_.push_back(entry.name);
    links_.push_back(std::move(link));
    SchedConfig own = sched;
    ChunkLimits limits = links_.back()->chunk_limits();
    own.max_chunk = std::min(own.max_chunk, limits.max_chunk);
    own.min_chunk = std::min(own.max_chunk, limits.min_chunk);
    own.max_window = std::max(own.max_window, 2 * own.max_chunk);
    own.min_window = limits.min_window;
    schedulers_.push_back(std::make_unique<Scheduler>(own));
    for (uint8_t cls = 0; cls < Scheduler::kClasses; ++cls) schedulers_.back()->set_preempt(cls, preempt_ns);
    flows_.push_back(std::make_unique<Flows>(*schedulers_.back(), flows_.size()));
  }
  counters_.resize(links_.size());
  declare(channels_.standard().cls);
  thread_ = std::thread([this] { guarded([this] { run(); }); });
}

Engine::~Engine() {
  close();
  // close() has waited for the copy threads; what is freed here is seen by no other thread.
  peers_.clear();
  retired_.clear();
  links_.clear();
  release_descriptors();
}

void Engine::release_descriptors() {
  Token token(*this);
  if (!closed_) return;
  retired_.clear();  // close() has ended the threads that could be inside one of them
  for (auto& peer : peers_)
    if (peer) peer->link.reset();
  for (Descriptor* fd : {&loop_fd_, &engine_epoll_, &express_epoll_, &page_fd_}) fd->close();
  engine_fd_.close();
}

void Engine::close() {
  {
    Token token(*this);
    if (closed_) return;
    closed_ = true;
    for (auto& peer : peers_)
      if (peer && peer->state == Peer::State::up && peer->rank != rank_) {
        FrameHeader bye{};
        bye.kind = FrameKind::goodbye;
        send_control(*peer, bye, Wake::engine);
      }
    std::vector<Op*> live;
    ops_.for_each_live([&](Op& op) { live.push_back(&op); });
    served_.for_each_live([&](Op& op) { live.push_back(&op); });
    for (Op* op : live)
      if (op->live) {
        op->awaits_fin = false;
        end_early(*op, Code::closed);
      }
  }
  device_.finish_writers();
  stopping_ = true;
  ring_engine();
  if (thread_.joinable()) thread_.join();
  copier_->stop();  // running chunks end; nothing touches a buffer after this
  device_.stop();
  Token token(*this);
  for (auto& peer : peers_)
    if (peer && peer->link) {
      peer->link->close();
      peer->state = Peer::State::lost;
      forget_holder(peer->rank);
    }
  polled_.clear();
  // What a device or a peer was working on has been let go of with its link.
  std::vector<Op*> left;
  ops_.for_each_live([&](Op& op) { left.push_back(&op); });
  served_.for_each_live([&](Op& op) { left.push_back(&op); });  // whoever closes their region waits for them
  for (Op* op : left) {
    if (!op->live) continue;
    drop_inflight(*op);
    op->awaits_fin = false;
    settle(*op);
  }
  for (auto& link : links_) link->close();
  let_go({});
}

void Engine::set_identity(Rank rank, uint64_t generation) {
  Token token(*this);
  rank_ = rank;
  generation_ = generation;
}

std::vector<std::string> Engine::link_names() const {
  std::vector<std::string> names;
  for (const auto& name : link_names_)
    if (name != "self") names.push_back(name);
  return names;
}

Link& Engine::link(const std::string& name) { return *links_[link_index(name)]; }

uint64_t Engine::now() const { return now_ns(); }

double Engine::setting(std::string_view name, double fallback) const {
  return number(config_, std::string(name), fallback);
}

std::string Engine::text_setting(std::string_view name) const {
  auto it = config_.texts.find(std::string(name));
  return it == config_.texts.end() ? std::string() : it->second;
}

// ---------------------------------------------------------------- the loop's thread

bool Engine::submit(Op* op) {
  op->submitted_ns = now();
  // A send_nowait is answered by its call: it waits the microseconds for which another thread holds the token.
  if (op->no_wait) token_.lock_first();
  if (op->no_wait || token_.try_lock()) {
    Token token(*this, std::adopt_lock, true);
    inline_op_ = op;
    op->live = true;
    start(*op);
    const bool ended = op->state == OpState::ended;
    inline_op_ = nullptr;
    return ended;
  }
  while (!submissions_.push(op)) {
    Token token(*this);  // emptied by the token
  }
  after_unlock();
  return false;
}

void Engine::begin_submitted() { Token token(*this, true); }

bool Engine::cancel(Op* op, Code why) {
  Token token(*this, true);
  if (!op->live) return false;
  // The other end knows that it is done; only its memory is still with a device or a link.
  if (op->state == OpState::draining && op->code == Code::ok) return false;
  if (why == Code::cancelled) op->cancel_requested = true;
  end_early(*op, why);
  return true;
}

void Engine::progress(bool rung, bool may_linger) {
  if (rung) clear_fd(loop_fd_);
  prepare_sleep(page_->loop);  // what comes after this look rings
  bool more = true;
  for (int round = 0; more && round < kTurns; ++round) {
    more = false;
    guarded([&] {
      Token token(*this, true);
      if (!round && !page_->loop_spins.load(std::memory_order_relaxed))
        tell_peers_of_sleep();  // else the loop will say so
      more = poll_links() >= kPollBudget;
      if (has_express() || express_polled_.load(std::memory_order_relaxed) > 0)
        dispatch_fds(express_epoll_, 0, true);
    });
  }
  if (more) return ring(page_->loop, loop_fd_);
  if (may_linger) device_.linger();
}

bool Engine::take_completed(Op*& op) {
  if (completed_.pop(op)) return true;
  if (!overflowed_.load(std::memory_order_acquire)) return false;
  Token token(*this, true);
  while (!overflow_.empty() && completed_.push(overflow_.front())) overflow_.pop_front();
  if (overflow_.empty()) overflowed_.store(false, std::memory_order_release);
  return completed_.pop(op);
}

std::vector<EngineEvent> Engine::take_events() {
  Token token(*this, true);
  has_events_.store(false, std::memory_order_release);
  return std::exchange(events_, {});
}

std::vector<Rank> Engine::take_connect_wanted() {
  Token token(*this, true);
  has_wanted_.store(false, std::memory_order_release);
  return std::exchange(wanted_, {});
}

// ---------------------------------------------------------------- progress

void Engine::drain_submissions() noexcept {
  Op* op;
  while (submissions_.pop(op)) {
    op->live = true;
    start(*op);
  }
}

void Engine::after_unlock() noexcept {
  // Pairs with submit(): either its try_lock saw the token free, or this look sees its op.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  while (!submissions_.empty() && token_.try_lock()) {
    drain_submissions();
    token_.unlock();
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
}

bool Engine::look() {
  if (stopping_.load(std::memory_order_acquire)) return true;
  if (!token_.try_lock()) return false;
  guarded([this] {
    Token token(*this, std::adopt_lock, false);
    if (!closed_) poll_links();
  });
  return true;
}

void Engine::leave_token() {
  token_.unlock();
  after_unlock();
}

void Engine::enter_token() {
  token_.lock();
  in_loop_thread_ = false;
  drain_submissions();
}

int Engine::poll_links() {
  int did = 0;
  for (size_t i = 0; i < polled_.size(); ++i) did += polled_[i]->poll(kPollBudget);
  return did;
}

void Engine::wake_loop() {
  if (!in_loop_thread_) ring(page_->loop, loop_fd_);
}

void Engine::emit(EngineEvent event) {
  events_.push_back(std::move(event));
  has_events_.store(true, std::memory_order_release);
  wake_loop();
}

void Engine::start_deadline(Op& op) { start_timer(op.id, op.deadline_ns); }

void Engine::start_timer(uint64_t id, uint64_t at_ns) {
  timers_.add(id, at_ns);
  if (engine_sleeps_until_ == 0 || at_ns < engine_sleeps_until_) ring_engine();
}

void Engine::expire(uint64_t now) {
  std::vector<uint64_t> due;
  timers_.expire(now, due);
  for (uint64_t id : due) {
    if (id & kRegionTimer) {
      ask_again(id & ~kRegionTimer);
      continue;
    }
    Op* op = find(id);
    if (!op) continue;
    if (op->state == OpState::draining) {
      if (op->outlasts) {
        op->written = false;
        settle(*op);
        continue;
      }
      if (op->gpu && (op->gpu->kernel || op->gpu->packing))
        continue;  // holds up nobody, and ends with its GPU's work
      if (Peer* peer = find_peer(op->peer); peer && !let_go_by_link(*op, *peer))
        tear_down(*peer, "a cancelled transfer was not let go of within drain_timeout");
    } else {
      end_early(*op, Code::deadline);
    }
  }
}

void Engine::fallback(Rank rank, const std::string& path, const std::string& reason) {
  if (Peer* peer = find_peer(rank)) ++counters_[peer->link_index].fallbacks;
  emit({EngineEvent::Kind::fallback, rank, 0, path, reason});
}

void Engine::part_down(Rank rank, const std::string& part, const std::string& reason) {
  emit({EngineEvent::Kind::link_down, rank, 0, part, reason});
}

void Engine::part_up(Rank rank, const std::string& part) {
  emit({EngineEvent::Kind::link_up, rank, 0, part, {}});
}

void Engine::run() {
  pthread_setname_np(pthread_self(), "aiocomm-engine");
  take_short_slices();
  const auto heartbeat_ns = static_cast<uint64_t>(setting("heartbeat_s", 1.0) * 1e9);
  uint64_t next_tick = kNever, spin_until = 0, look_again = 0;
  while (!stopping_.load(std::memory_order_acquire)) {
    awake(page_->engine);
    engine_fd_.answer();
    int did;
    std::vector<std::shared_ptr<LinkPeer>> gone;  // what they map is given back without the token
    {
      Token token(*this);
      gone.swap(retired_);  // no event of theirs is in this thread's hands here
      if (!gone.empty())
        for (auto& peer : peers_)
          if (peer && peer->state == Peer::State::lost) peer->link.reset();
      did = poll_links();
      uint64_t t = now();
      expire(t);
      bool ticking = false;
      for (auto& peer : peers_)
        if (peer && peer->state == Peer::State::up) {
          bool ticks = peer->link->needs_ticks(), rests = rest_ns_ && peer->rank != rank_;
          ticking = ticking || ticks || rests;
          if (t < next_tick) continue;
          if (ticks) peer->link->tick(t);
          if (rests && peer->state == Peer::State::up) look_at_rest(*peer, t, heartbeat_ns);
        }
      if (!ticking)
        next_tick = kNever;
      else if (next_tick == kNever || t >= next_tick)
        next_tick = t + heartbeat_ns;
      for (size_t i = 0; i < schedulers_.size(); ++i) pump(static_cast<uint8_t>(i));
      if (did)
        spin_until = t + spin_ns_;
      else if (t < spin_until || t < device_.engine_due())
        did = 1;
    }
    gone.clear();
    // One chunk at a time: its end may queue the next, for as long as a transfer takes. In between come deadlines, and what
    // is told by descriptors.
    if (copier_->run_one()) did = 1;
    if (did) {
      if (const uint64_t t = now(); t >= look_again) {
        dispatch_fds(engine_epoll_, 0, false);
        look_again = t + kLookEvery_ns;
      }
      continue;
    }
    prepare_sleep(page_->engine);
    uint64_t next;
    {
      Token token(*this);
      did = poll_links();
      next = std::min(timers_.next().value_or(kNever), next_tick);
      engine_sleeps_until_ = next == kNever ? 0 : next;
    }
    if (did || stopping_.load(std::memory_order_acquire)) continue;
    int timeout = -1;
    if (next != kNever) {
      uint64_t t = now();
      timeout = next <= t ? 0 : static_cast<int>(std::min<uint64_t>((next - t) / 1000000 + 1, 1 << 30));
    }
    dispatch_fds(engine_epoll_, timeout, false);
  }
}

}  // namespace aiocomm
