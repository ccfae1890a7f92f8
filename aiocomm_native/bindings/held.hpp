// Copies and launches that are begun together.
#pragma once

#include "core/device.hpp"

namespace aiocomm::py {

// Has what is submitted meanwhile launched by this thread, once it goes.
class Held {
 public:
  Held(Mover& mover, int device) : mover_(mover), device_(device) { mover_.hold(device_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { mover_.let_go(device_); }

 private:
  Mover& mover_;
  const int device_;
};

}  // namespace aiocomm::py
