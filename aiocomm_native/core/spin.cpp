// How the loop's thread looks for news before it sleeps.

#include <sched.h>

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

void Engine::loop_sleeps() {
  prepare_sleep(page_->loop);
  Token token(*this, true);
  tell_peers_of_sleep();
}

bool Engine::anything_to_poll() {
  Token token(*this, true);
  int did = 0;
  for (size_t i = 0; i < polled_.size(); ++i) did += polled_[i]->poll_told(kPollBudget);
  return did > 0 || has_completed();
}

bool Engine::spin(uint64_t until_ns, Patience& patience, bool yields) {
  awake(page_->loop);
  loop_spins_.store(true, std::memory_order_relaxed);
  uint64_t began = now(), last = began;
  bool patient = patience.may_spin(began);
  const uint64_t asked = until_ns > began ? until_ns - began : 0;
  until_ns = began + patience.stretched(asked);
  const uint64_t own_end = until_ns;
  bool found = false, taken = false, covers = false, met = false;
  while (!(found = has_completed() || has_events())) {
    // Peers need not wake the engine's thread for what is seen here.
    if (page_->engine.word.load(std::memory_order_relaxed) == WakeWord::kAsleep) {
      awake(page_->engine);
      covers = true;
    }
    if (token_.try_lock()) {
      in_loop_thread_ = true;
      drain_submissions();
      for (size_t i = 0; i < polled_.size(); ++i) met |= polled_[i]->poll_spinning(kPollBudget) > 0;
      if (has_express()) dispatch_fds(express_epoll_, 0, true);
      in_loop_thread_ = false;
      bool copies = std::exchange(spin_copies_, false);
      token_.unlock();
      after_unlock();
      if (copies && copier_->run_one()) last = now();
    }
    uint64_t t = now();
    taken = !yields && t - last > kTakenNs;
    if (t >= until_ns || taken || !patient) {
      // A copy that ends soon is worth a longer spin, and says nothing of the peer.
      const uint64_t due = asked && !taken ? device_.take_due() : 0;
      if (due <= t) break;
      until_ns = due, patient = true;
    }
    const bool quick = t - last < kQuickLookNs;
    last = t;
    if (has_completed()) continue;
    if (yields)
      sched_yield();
    else if (quick)  // one that takes longer leaves the other hyperthread enough
      relax();
  }
  if (covers) prepare_sleep(page_->engine);  // what comes after this look rings
  loop_spins_.store(false, std::memory_order_relaxed);
  if (covers) anything_to_poll();
  found = found || has_completed();
  // With GPUs a frame that came (a rendezvous that goes on) would have had to wake the engine's thread.
  if (patient && asked && until_ns == own_end)
    patience.spun(found || (met && spin_tries_), taken, began, last, asked);
  return found;
}

}  // namespace aiocomm
