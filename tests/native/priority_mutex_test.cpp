// needs:
// Who gets a mutex that a loop which spins takes again and again.

#include "core/priority_mutex.hpp"

#include <atomic>
#include <thread>

#include "check.hpp"

namespace {

using aiocomm::PriorityMutex;

// Once somebody waits, it is not taken again before they have had it.
void who_spins_stands_back() {
  for (int round = 0; round < 200; ++round) {
    PriorityMutex mutex;
    std::atomic<bool> had{false};
    CHECK(mutex.try_lock_last());
    std::thread other([&] {
      mutex.lock();
      had = true;
      mutex.unlock();
    });
    while (mutex.asked() == 0) std::this_thread::yield();
    mutex.unlock();
    while (!had) {
      if (!mutex.try_lock_last()) continue;
      CHECK(had);
      mutex.unlock();
    }
    other.join();
    CHECK(mutex.try_lock_last());
    mutex.unlock();
  }
}

// Whoever waits: a loop that has to have it goes first, and all get it.
void all_get_it() {
  PriorityMutex mutex;
  int count = 0;
  std::atomic<bool> done{false};
  std::thread spins([&] {
    while (!done)
      if (mutex.try_lock_last()) mutex.unlock();
  });
  auto work = [&](bool first) {
    for (int i = 0; i < 5000; ++i) {
      first ? mutex.lock_first() : mutex.lock();
      ++count;
      mutex.unlock();
    }
  };
  std::thread one([&] { work(false); }), two([&] { work(true); });
  one.join();
  two.join();
  done = true;
  spins.join();
  CHECK(count == 10000);
}

}  // namespace

int main() {
  who_spins_stands_back();
  all_get_it();
}
