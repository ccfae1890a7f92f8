// The engine's two epoll sets: descriptors that wake its own thread, and those that wake the user's loop.

#include <sys/epoll.h>

#include <cerrno>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

void Engine::watch(int fd, uint32_t events, Pollable* target, bool loop) {
  epoll_event event{events, {target}};
  if (epoll_ctl(loop ? express_epoll_ : engine_epoll_, EPOLL_CTL_ADD, fd, &event) != 0)
    throw LinkFailure("cannot watch a descriptor", errno);
  if (loop) express_watched_.fetch_add(1, std::memory_order_relaxed);
}

void Engine::rewatch(int fd, uint32_t events, Pollable* target, bool loop) {
  epoll_event event{events, {target}};
  epoll_ctl(loop ? express_epoll_ : engine_epoll_, EPOLL_CTL_MOD, fd, &event);
}

void Engine::unwatch(int fd, bool loop) {
  if (epoll_ctl(loop ? express_epoll_ : engine_epoll_, EPOLL_CTL_DEL, fd, nullptr) == 0 && loop)
    express_watched_.fetch_sub(1, std::memory_order_relaxed);
}

void Engine::watch_polled(int fd, Pollable* target) {
  watch(fd, EPOLLIN, target, true);
  express_watched_.fetch_sub(1, std::memory_order_relaxed);
  express_polled_.fetch_add(1, std::memory_order_relaxed);
}

void Engine::unwatch_polled(int fd) {
  unwatch(fd, true);
  express_watched_.fetch_add(1, std::memory_order_relaxed);
  express_polled_.fetch_sub(1, std::memory_order_relaxed);
}

void Engine::dispatch_fds(int epoll, int timeout_ms, bool locked) {
  epoll_event events[32];
  int n = epoll_wait(epoll, events, 32, timeout_ms);
  if (n <= 0) return;
  auto dispatch = [&] {
    for (int i = 0; i < n; ++i) {
      if (events[i].data.ptr)
        static_cast<Pollable*>(events[i].data.ptr)->on_ready(events[i].events);
      else
        clear_fd(engine_fd_);
    }
  };
  if (locked) return dispatch();
  Token token(*this);
  dispatch();
}

}  // namespace aiocomm
