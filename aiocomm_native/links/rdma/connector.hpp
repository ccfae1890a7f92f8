// Connects queue pairs aside: on Ethernet the kernel asks the network for the peer's address within that call. For one
// that does not answer it waits for a second or more, and neither the engine's token nor an event loop may do so.
//
// A few threads per link, each started where all before it are busy, so that one peer's silence holds no other up. Each
// connection that has ended is taken by the token's holder, who is rung for it. One that is given up while a thread is
// at it is closed by that thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "links/rdma/port.hpp"
#include "links/rdma/rail.hpp"

namespace aiocomm::rdma {

struct Lane;

// The queue pairs of a lane, on their way to those of the peer.
struct Connecting {
  Connecting(Lane& of, Rail& over, const QueuePairs& ours, const Address& where, const Numbers& there,
             bool asked)
      : lane(of), rail(over), pairs(ours), theirs(where), numbers(there), answers(asked) {}

  Lane& lane;
  Rail& rail;
  QueuePairs pairs;
  const Address theirs;
  const Numbers numbers;
  const bool answers;  // the peer has asked for it, and is told of these when they are there
  std::atomic<bool> given_up{false};
  std::string failure;  // empty: they are connected
};

class Connector {
 public:
  static constexpr size_t kMostThreads = 4;

  // `ring`: something is done; `failed`: a thread ends with an exception. Called by the threads.
  Connector(std::function<void()> ring, std::function<void(const char* why)> failed)
      : ring_(std::move(ring)), failed_(std::move(failed)) {}
  ~Connector();  // waits for those that are at work
  void submit(std::shared_ptr<Connecting> job);
  // Nothing is heard of it any more. False: its queue pairs are closed here, else they are the caller's again.
  bool give_up(const std::shared_ptr<Connecting>& job);
  std::shared_ptr<Connecting> next();  // that has ended and was not given up; null: none
  bool uses(const Rail& rail);         // a thread does; it rings when it has ended

 private:
  void work();

  const std::function<void()> ring_;
  const std::function<void(const char* why)> failed_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Connecting>> wanted_, done_;
  std::vector<std::shared_ptr<Connecting>> running_;
  size_t idle_ = 0;  // threads
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace aiocomm::rdma
