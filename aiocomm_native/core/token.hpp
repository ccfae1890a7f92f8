// Scoped ownership of the engine's token; see engine.hpp.
#pragma once

#include "core/engine.hpp"

namespace aiocomm {

class Engine::Token {
 public:
  // For threads that must not sleep over the fractions of a microsecond for which a spinning loop holds the token.
  struct Spin {};
  Token(Engine& engine, Spin) : engine_(engine) {
    int left = engine.spin_tries_;
    while (!engine_.token_.try_lock())
      if (left-- <= 0) {
        engine_.token_.lock();
        break;
      }
    engine_.in_loop_thread_ = false;
    engine_.drain_submissions();
  }
  explicit Token(Engine& engine, bool loop_thread = false) : engine_(engine) {
    if (loop_thread)
      engine_.token_.lock_first();
    else
      engine_.token_.lock();
    engine_.in_loop_thread_ = loop_thread;
    engine_.drain_submissions();
  }
  ~Token() {
    engine_.in_loop_thread_ = false;
    engine_.token_.unlock();
    engine_.after_unlock();
  }
  Token(const Token&) = delete;
  Token& operator=(const Token&) = delete;

 private:
  Engine& engine_;
};

}  // namespace aiocomm
