// Scoped ownership of the engine's token; see engine.hpp.
#pragma once

#include "core/engine.hpp"

namespace aiocomm {

class Engine::Token {
 public:
  explicit Token(Engine& engine, bool loop_thread = false) : engine_(engine) {
    if (loop_thread)
      engine_.token_.lock_first();
    else
      engine_.token_.lock(engine.spin_tries_);
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
