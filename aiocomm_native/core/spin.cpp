// How the loop's thread looks for news before it sleeps.

#include <poll.h>
#include <sched.h>

#include <algorithm>
#include <utility>

#include "core/engine.hpp"
#include "core/relax.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kQuickLookNs = 500;
constexpr uint64_t kTakenNs = 300000;  // a gap this long in a spin: the core was given to someone else
}  // namespace

void Engine::tell_peers_of_sleep() {
  for (size_t i = 0; i < polled_.size(); ++i) polled_[i]->loop_sleeps();
}

bool Engine::loop_sleeps() {
  prepare_sleep(page_->loop);
  Token token(*this, true);
  tell_peers_of_sleep();
  return poll_told() > 0 || has_completed();
}

int Engine::poll_told() {
  int did = 0;
  for (size_t i = 0; i < polled_.size(); ++i) did += polled_[i]->poll_told(kPollBudget);
  return did;
}

void Engine::begin_spin() {
  awake(page_->loop);
  loop_spins_.store(true, std::memory_order_relaxed);
  met_ = false;
}

bool Engine::look_spinning() {
  // Peers need not wake the engine's thread for what is seen here.
  if (page_->engine.word.load(std::memory_order_relaxed) == WakeWord::kAsleep) {
    awake(page_->engine);
    covers_engine_ = true;
  }
  if (!token_.try_lock_last()) return false;  // a thread that ended what is waited for may be one that asks
  bool copies = false;
  guarded([&] {
    Token token(*this, std::adopt_lock, true);
    for (size_t i = 0; i < polled_.size(); ++i) met_ |= polled_[i]->poll_spinning(kPollBudget) > 0;
    if (has_express()) dispatch_fds(express_epoll_, 0, true);
    copies = std::exchange(spin_copies_, false);
  });
  const bool copied = copies && copier_->run_one();
  device_.turn();
  return copied;
}

void Engine::end_spin() {
  const bool covers = std::exchange(covers_engine_, false);
  if (covers) prepare_sleep(page_->engine);  // what comes after this look rings
  loop_spins_.store(false, std::memory_order_relaxed);
  if (!covers) return;
  Token token(*this, true);
  if (poll_told() >= kPollBudget) ring_engine();  // who sent the rest saw it awake
}

bool Engine::spin(std::span<Engine* const> engines, uint64_t until_ns, Patience& patience, bool yields,
                  Others* others) {
  for (Engine* engine : engines) engine->begin_spin();
  uint64_t began = engines[0]->now(), last = began;
  bool patient = patience.may_spin(began);
  const uint64_t asked = until_ns > began ? until_ns - began : 0;
  until_ns = began + patience.stretched(asked);
  const uint64_t own_end = until_ns;
  auto any_news = [&] {
    return std::any_of(engines.begin(), engines.end(), [](Engine* one) { return one->has_news(); });
  };
  bool found = any_news(), taken = false, interrupted = false;
  if (found)  // the others are looked at all the same: one may have news each time
    for (Engine* engine : engines)
      if (!engine->has_news()) engine->look_spinning();
  while (!found) {
    for (Engine* engine : engines)
      if (engine->look_spinning()) last = engine->now();
    uint64_t t = engines[0]->now();
    taken = !yields && t - last > kTakenNs;
    if (t >= until_ns || taken || !patient) {
      // A copy that ends soon is worth a longer spin, and says nothing of the peer.
      uint64_t due = 0;
      if (asked && !taken)
        for (Engine* engine : engines) due = std::max(due, engine->device_.take_due());
      if (due <= t) break;
      until_ns = due, patient = true;
    }
    const bool quick = t - last < kQuickLookNs;
    last = t;
    if ((found = any_news())) break;
    if (others && std::any_of(engines.begin(), engines.end(),
                              [](Engine* one) { return one->device_.take_rehearsal(); })) {
      others->rehearses = interrupted = true;
      for (Engine* engine : engines) engine->device_.rehearse();
      break;
    }
    if (others && !others->looked(t)) {
      others->looked_ns = t;
      pollfd one{others->fd, POLLIN, 0};
      if ((interrupted = ::poll(&one, 1, 0) > 0)) break;
    }
    if (yields)
      sched_yield();
    else if (quick)  // one that takes longer leaves the other hyperthread enough
      relax();
  }
  for (Engine* engine : engines) engine->end_spin();
  bool met = false;
  for (Engine* engine : engines) {
    found = found || engine->has_completed();
    // With GPUs a frame that came (a rendezvous that goes on) would have had to wake the engine's thread.
    met = met || (engine->met_ && engine->spin_tries_);
  }
  if (patient && asked && !interrupted && until_ns == own_end)
    patience.spun(found || met, taken, began, last, asked);
  return found;
}

}  // namespace aiocomm
