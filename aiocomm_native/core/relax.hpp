// For loops that spin: tells the core so.
#pragma once

namespace aiocomm {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace aiocomm
