// Matcher for Python: what the property tests drive. The engine uses the class itself.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <utility>

#include "core/match.hpp"

namespace nb = nanobind;

void bind_match(nb::module_& m) {
  using aiocomm::Matcher;
  using ArrivalTuple = std::tuple<uint64_t, aiocomm::ChannelId, aiocomm::Rank, aiocomm::Tag, uint64_t>;
  using PurgedPair = std::pair<std::vector<aiocomm::OpId>, std::vector<uint64_t>>;

  nb::class_<Matcher>(m, "Matcher")
      .def(nb::init<>())
      .def("post_recv", &Matcher::post_recv, nb::arg("op"), nb::arg("channel"), nb::arg("src"),
           nb::arg("tag"))
      .def(
          "arrive",
          [](Matcher& self, uint64_t id, aiocomm::ChannelId channel, aiocomm::Rank src, aiocomm::Tag tag,
             uint64_t nbytes) { return self.arrive({id, channel, src, tag, nbytes}); },
          nb::arg("id"), nb::arg("channel"), nb::arg("src"), nb::arg("tag"), nb::arg("nbytes"))
      .def("cancel_recv", &Matcher::cancel_recv, nb::arg("op"))
      .def("drop_arrival", &Matcher::drop_arrival, nb::arg("id"))
      .def(
          "peek",
          [](Matcher& self, aiocomm::ChannelId channel, aiocomm::Rank src,
             aiocomm::Tag tag) -> std::optional<ArrivalTuple> {
            const auto found = self.peek(channel, src, tag);
            if (!found) return std::nullopt;
            return ArrivalTuple{found->id, found->channel, found->src, found->tag, found->nbytes};
          },
          nb::arg("channel"), nb::arg("src"), nb::arg("tag"))
      .def(
          "remove_source",
          [](Matcher& self, aiocomm::Rank src, bool drop_arrivals) -> PurgedPair {
            auto purged = self.remove_source(src, drop_arrivals);
            return {std::move(purged.recvs), std::move(purged.arrivals)};
          },
          nb::arg("src"), nb::arg("drop_arrivals"))
      .def(
          "remove_channel",
          [](Matcher& self, aiocomm::ChannelId channel) -> PurgedPair {
            auto purged = self.remove_channel(channel);
            return {std::move(purged.recvs), std::move(purged.arrivals)};
          },
          nb::arg("channel"))
      .def("forget", &Matcher::forget, nb::arg("channel"))
      .def("any_source_recvs", &Matcher::any_source_recvs)
      .def("all_recvs", &Matcher::all_recvs)
      .def_prop_ro("posted", &Matcher::posted)
      .def_prop_ro("unexpected", &Matcher::unexpected)
      .def_prop_ro("unexpected_bytes", &Matcher::unexpected_bytes)
      .def_prop_ro("capacity", &Matcher::capacity);
}
