// One rank's calls on GPU arrays through an arena, as Python makes them: aiocomm/collectives/device_shared.py.
//
// Rules
//   - The ranks meet in the arena and tell each other where their arrays are. Each then writes what others are to have into
//     their memory, by copies or by a kernel, as operations of its engine; nobody asks and nobody answers.
//   - Before anything is touched each rank has given its word that it may be, once the work on its streams is done, and
//     that it reaches the others' memory. Where one does not, all make the call by messages (Company, core/device.hpp).
//   - What a rank has in place it tells by a word in the arena. So a call has ended here when our own operation has, and
//     what others write to us is in place.
//   - Who has launched has entered the arena until its operation has ended: who gives a call up waits until all have left.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arena_result.hpp"
#include "bindings/combining.hpp"
#include "bindings/device_py.hpp"
#include "bindings/meeting.hpp"
#include "bindings/schedule.hpp"
#include "bindings/transfer.hpp"

namespace aiocomm::py {

// GPU memory, described, and what keeps it.
struct DeviceLent {
  DeviceView view;
  nb::object owner;  // none: there is no array
};

class DeviceCall {
 public:
  using Self = nb::pointer_and_handle<PyEngine>;
  // Whose memory is written (by rank of the group), from where in which buffer of ours, to where in which of theirs.
  using Move = std::tuple<size_t, SpanTuple, int, uint64_t>;
  // Moves, and what has to be in place before: of which ranks how many parts.
  using Part = std::tuple<std::vector<Move>, std::vector<std::tuple<size_t, uint32_t>>>;
  // `awaits`: by rank, how many of its parts write to us. `stays_s`: how long a call waits for ranks that are late, while
  // other tasks run; less where they have not come.
  DeviceCall(std::shared_ptr<Meeting> meeting, std::vector<int> ranks, uint32_t channel, nb::bytes header,
             uint64_t in_bytes, uint64_t out_bytes, uint64_t item, std::vector<Part> parts,
             std::vector<uint32_t> awaits, double stays_s);

  // Our part is a kernel that reads and writes the arrays of all.
  void combine(uint64_t function, int device, uint32_t blocks, uint32_t threads, uint32_t divide_by);

  int attempt(PyEngine& e, uint64_t number, const DeviceLent& given, const DeviceLent& out);
  // `last`: ranks that have not come are not waited for any longer.
  int proceed(Self self, bool last);
  // The operation that is under way, as a transfer: until it has ended `proceed` is not called. None: there is none.
  nb::object take(Self self);
  // It has ended as one of a call that cannot be made so: it is made by messages on all ranks, and so are the next.
  void decline();
  void give_up();        // tells the others
  void let_go();         // our operation has ended
  bool left(Self self);  // nobody touches our arrays any more

 private:
  // In ns: for which ends of small parts are looked for, and of larger ones where the loop spins.
  static constexpr uint64_t kLingerNs = 300000, kSpinNs = 2000000;
  static constexpr uint32_t kMostMisses = 8;
  static constexpr uint64_t kRate = 300;  // bytes per ns between devices, about

  struct Word;
  struct Bound {
    std::unique_ptr<DeviceBuffer> gpu;  // null: there is none
    uint64_t address = 0, nbytes = 0;
    bool overlaps(const Bound& other) const {
      return address < other.address + other.nbytes && other.address < address + nbytes;
    }
  };

  void prepare(Engine& engine);
  ArenaResult begun(PyEngine& e, Meeting::Begun how, bool lingers);
  ArenaResult launch(PyEngine& e);
  std::unique_ptr<DeviceBuffer> copies(Engine& engine) const;
  std::unique_ptr<DeviceBuffer> kernel(Engine& engine) const;
  void post(Engine& engine, std::unique_ptr<DeviceBuffer> gpu);
  ArenaResult run(PyEngine& e, bool lingers);
  void take_ended(Engine& engine);
  ArenaResult finish();
  int settle(PyEngine& e, ArenaResult result);
  void withdraw();
  void over();
  const DeviceBuffer& home() const { return arrays_[kOut].gpu ? *arrays_[kOut].gpu : *arrays_[kIn].gpu; }
  DevicePlace place_of(Engine& engine, const Bound& array, bool& willing) const;

  const std::shared_ptr<Meeting> meeting_;
  const std::vector<int> ranks_;  // of the world, by rank of the group
  const uint32_t channel_;
  const std::string header_;
  const std::array<uint64_t, 2> needs_;
  const uint64_t item_;
  const std::vector<Part> parts_;
  const std::vector<uint32_t> awaits_;
  const uint64_t stays_ns_;
  Combining combining_;
  uint64_t most_moved_ = 0;  // bytes of the largest part, and of all

  // Of the call that runs.
  uint32_t misses_ = 0;   // calls in a row for which not all ranks have come
  uint64_t resumes_ = 0;  // the call from which it is tried again, since not all reached each other's arrays
  bool running_ = false, open_ = false, entered_ = false, trouble_ = false, voted_down_ = false,
       looked_ = false;
  uint64_t number_ = 0, words_ = 0;  // of the call, and of those that have words
  // `waited`: a stream that the call waits for in any case.
  static bool bind(Mover& mover, const DeviceLent& lent, Bound& into, uint64_t waited);
  bool takes(PyEngine& e, const DeviceLent& given, const DeviceLent& out, std::array<Bound, 2>& arrays) const;
  std::array<Bound, 2> arrays_;
  nb::object keeps_;
  std::vector<Arena::Places> places_;
  SilentOp flight_;
  std::vector<Op*> others_;  // operations of others that have ended meanwhile
};

}  // namespace aiocomm::py
