// Collectives through an arena, for Python.

#include "bindings/shared_call_py.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace aiocomm::py {

void bind_shared(nb::module_& m) {
  bind_arena_results(m);
  nb::class_<Meeting>(m, "Arena", "Memory that the ranks of a group on one host share.")
      .def_static(
          "create",
          [](size_t ranks) {
            if (ranks < 2 || ranks > Arena::kRanks) throw nb::value_error("not that many ranks");
            return std::make_shared<Meeting>(Arena::create(ranks), 0);
          },
          "ranks"_a, "Make one, as rank 0 of the group.")
      .def_static(
          "open",
          [](const std::tuple<int, int, uint64_t>& place, size_t rank, size_t ranks) -> nb::object {
            if (ranks < 2 || ranks > Arena::kRanks || rank >= ranks)
              throw nb::value_error("not that many ranks");
            auto [owner, fd, nonce] = place;
            auto arena = Arena::open(owner, fd, nonce, ranks);
            return arena ? nb::cast(std::make_shared<Meeting>(std::move(arena), rank)) : nb::none();
          },
          "place"_a, "rank"_a, "ranks"_a, "Open the one that another process has made. None: it cannot be.")
      .def_prop_ro(
          "place",
          [](const Meeting& self) {
            return std::make_tuple(getpid(), self.arena->fd(), self.arena->nonce());
          },
          "Where others find it: process, descriptor, and what tells it from others.")
      .def("set_processes", &Meeting::set_processes, "processes"_a,
           "Tell which processes the ranks are, so that bytes may go from array to array; -1: not that one.");
  nb::class_<PySharedCall>(m, "SharedCall", "One rank's part of a collective of one shape through an arena.")
      .def(nb::init<std::shared_ptr<Meeting>, int, size_t, std::vector<uint64_t>, bool, uint64_t,
                    const std::string&, const std::string&, nb::bytes>(),
           "arena"_a, "kind"_a, "root"_a, "sizes"_a, "in_place"_a, "item"_a, "format"_a, "op"_a, "header"_a)
      .def(
          "attempt",
          [](PySharedCall& self, PyEngine& engine, uint64_t number, nb::handle given, nb::handle out) {
            return self.attempt(engine, number, given, out);
          },
          "engine"_a, "number"_a, "given"_a.none(), "out"_a.none(),
          "Do the call. 0: it is to be made by messages; 1: done; 2: done, and other tasks should have a "
          "turn; "
          "3: going on; 4: the same, and others are waited for; 5: another rank has given it up; 6: not all "
          "have come "
          "yet.")
      .def("proceed", &PySharedCall::proceed, "seconds"_a, "Go on with it; as `attempt`.")
      .def("abandon", &PySharedCall::abandon,
           "Give it up, for all ranks. False: another one still touches the arrays, call again.")
      .def_prop_ro("error", &PySharedCall::error,
                   "Errno of memory that cannot be reached after all; 0: none.")
      .def_prop_ro(
          "way", &PySharedCall::way,
          "How the call that has met last went. 0: by rings; from array to array, 1: of shared segments, "
          "2: others among them.")
      .def_prop_ro("moved", &PySharedCall::moved, "Bytes that it copies to or from the arena here.");
}

}  // namespace aiocomm::py
