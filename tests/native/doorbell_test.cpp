// needs:
// A thread that is rung between its last look and its sleep does not sleep.

#include "core/doorbell.hpp"

#include <poll.h>

#include <atomic>
#include <thread>

#include "check.hpp"

namespace {

using aiocomm::OwnBell;

bool would_sleep(int fd) {
  pollfd one{fd, POLLIN, 0};
  return poll(&one, 1, 0) == 0;
}

void rung_after_the_look() {
  OwnBell bell;
  bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  bell.answer();
  CHECK(would_sleep(bell));
  bell.ring();
  CHECK(!would_sleep(bell));
  bell.ring();  // by others, who find it rung
  aiocomm::clear_fd(bell);
  CHECK(would_sleep(bell));
  bell.answer();
  bell.ring();
  CHECK(!would_sleep(bell));
}

// Whatever one thread asks for, the other sees before it sleeps for good.
void none_is_overlooked() {
  constexpr int kTimes = 20000;
  OwnBell bell;
  bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  std::atomic<int> asked{0}, seen{0};
  std::thread sleeper([&] {
    while (seen.load() < kTimes) {
      bell.answer();
      seen = asked.load();
      if (seen.load() == kTimes) break;
      pollfd one{bell, POLLIN, 0};
      poll(&one, 1, -1);
      aiocomm::clear_fd(bell);
    }
  });
  for (int k = 1; k <= kTimes; ++k) {
    asked = k;
    bell.ring();
    if (k % 7 == 0)
      while (seen.load() < k) std::this_thread::yield();
  }
  sleeper.join();
}

}  // namespace

int main() {
  rung_after_the_look();
  none_is_overlooked();
}
