// Registers and gives back memory aside: the kernel finds and pins every page, which for large memory takes milliseconds
// to seconds, and neither the engine's token nor an event loop may wait for that.
//
// Two threads per link, each started at its first job: one registers, and what is given back does not stand behind
// that. Each does its jobs in order. What has been registered, or given back under a number, is taken by the token's
// holder, who is rung for it. Nobody is rung for what else was given back, but whoever asked when all is done.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/segments.hpp"
#include "links/rdma/port.hpp"

namespace aiocomm::rdma {

using Regions = std::array<ibv_mr*, kMaxRails>;  // by rail; null: that rail has none

// What is to be registered, with which rails, and what came of it.
struct Registering {
  uint32_t id = 0;
  std::byte* base = nullptr;
  uint64_t nbytes = 0;
  int access = 0;
  std::array<ibv_pd*, kMaxRails> domains{};
  bool by_node = false;
  std::shared_ptr<Segment> segment;  // that it is part of: stays mapped meanwhile
  // Of device memory: its dma-buf, to be closed; -1: the driver refuses. Empty: registered by its address.
  std::function<int()> open;
  uint64_t offset = 0;  // into that, of `base`

  Regions regions{};
  int node = -1;  // of NUMA, where the first page lies
  int error = 0;  // errno: none of the rails has it
  std::string reason;
};

void deregister(const Verbs& verbs, const Regions& regions);

// Registers it with all of its rails, or with none.
void register_now(const Verbs& verbs, Registering& job);

class Registrar {
 public:
  // `ring`: something is done; `failed`: it ends with an exception. Called by the thread.
  Registrar(const Verbs& verbs, std::function<void()> ring, std::function<void(const char* why)> failed)
      : verbs_(verbs), ring_(std::move(ring)), failed_(std::move(failed)) {}
  ~Registrar();  // gives back what is to be given back first
  void submit(Registering job);
  void give_back(const Regions& regions, uint32_t number = 0);
  std::vector<Registering> take();          // what has been registered, or has failed, since the last call
  std::vector<uint32_t> take_given_back();  // numbers, likewise
  bool busy();  // something is submitted and not done; if so, it rings once all is done

 private:
  struct Unwanted {
    Regions regions{};
    uint32_t number = 0;  // 0: nobody waits for it
  };
  void run(void (Registrar::*jobs)()) noexcept;
  void register_all();
  void give_back_all();
  void end_job(std::unique_lock<std::mutex>& lock, bool tells);

  const Verbs& verbs_;
  const std::function<void()> ring_;
  const std::function<void(const char* why)> failed_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Registering> wanted_;
  std::deque<Unwanted> unwanted_;
  std::vector<Registering> done_;
  std::vector<uint32_t> given_back_;
  int working_ = 0;  // threads
  bool stopping_ = false, asked_ = false;
  std::thread registering_, giving_back_;
};

}  // namespace aiocomm::rdma
