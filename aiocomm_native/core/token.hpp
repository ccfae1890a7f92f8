// Scoped ownership of the engine's token, and what becomes of an exception that a thread of ours ends with; see engine.hpp.
#pragma once

#include <mutex>

#include "core/engine.hpp"
#include "core/guarded.hpp"

namespace aiocomm {

class Engine::Token {
 public:
  explicit Token(Engine& engine, bool loop_thread = false) : engine_(engine) {
    if (loop_thread)
      engine_.token_.lock_first();
    else
      engine_.token_.lock(engine.spin_tries_);
    begin(loop_thread);
  }
  // It is this thread's by now, as by try_lock().
  Token(Engine& engine, std::adopt_lock_t, bool loop_thread) : engine_(engine) { begin(loop_thread); }
  ~Token() {
    engine_.in_loop_thread_ = false;
    engine_.token_.unlock();
    engine_.after_unlock();
  }
  Token(const Token&) = delete;
  Token& operator=(const Token&) = delete;

 private:
  void begin(bool loop_thread) {
    // Before that: what ends of it rings, since the loop's thread may be in a call that takes no ends over.
    engine_.drain_submissions();
    engine_.in_loop_thread_ = loop_thread;
  }
  Engine& engine_;
};

// Without the token. What `f` throws ends what the engine does, and not the process.
void Engine::guarded(auto&& f) noexcept {
  aiocomm::guarded(f, [this](const char* why) { failed(why); });
}

}  // namespace aiocomm
