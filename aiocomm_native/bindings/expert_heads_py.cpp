#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "bindings/expert_heads.hpp"
#include "bindings/unlocked.hpp"
#include "core/expert_tables.hpp"
#include "core/routing.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

using Memory = SeenMemory;
using Head = ExpertHead;
using Came = CameExperts;

void fill(Head& head, const nb::bytes& header, nb::handle place) {
  require(header.size() == sizeof head.header);
  std::memcpy(head.header, header.c_str(), sizeof head.header);
  if (place.is_none()) return;
  require(PyBytes_Check(place.ptr()) && PyBytes_GET_SIZE(place.ptr()) == sizeof head.place);
  std::memcpy(head.place, PyBytes_AS_STRING(place.ptr()), sizeof head.place);
}

nb::bytes new_message(size_t nbytes) {
  PyObject* message = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes));
  if (!message) throw nb::python_error();
  return nb::steal<nb::bytes>(message);
}

}  // namespace

std::optional<std::tuple<Starts, Starts, nb::object>> route_messages(
    const SeenBytes& of_ids, const SeenBytes& of_weights, size_t count, const SeenBytes& of_owner, size_t me,
    const nb::bytes& header, uint64_t ended, uint64_t region, uint64_t extent, const nb::list& places,
    uint64_t slot_bytes, const RoutedParts& routed) {
  const auto& [to_tokens, to_counts, to_experts, to_routed] = routed;
  const auto given = of_ids.of<int64_t>();
  const auto weigh = of_weights.of<float>();
  const size_t n = nb::len(places), most = given.size();
  require(count && most % count == 0 && weigh.size() == most && me < n);
  require(to_tokens.of<int64_t>().size() >= most && to_counts.of<uint16_t>().size() >= most &&
          to_experts.of<int32_t>().size() >= most && to_routed.of<float>().size() >= most);
  const Routed into{
      reinterpret_cast<int64_t*>(to_tokens.bytes()), reinterpret_cast<uint16_t*>(to_counts.bytes()),
      reinterpret_cast<int32_t*>(to_experts.bytes()), reinterpret_cast<float*>(to_routed.bytes())};
  Starts rows, assignments;
  bool fine = false;
  {
    const Unlocked unlocked(most);
    fine = aiocomm::route_tokens(given.data(), weigh.data(), count, most / count, of_owner.of<int64_t>(), n,
                                 into, rows, assignments);
  }
  if (!fine) return std::nullopt;
  nb::list messages;
  for (size_t peer = 0; peer < n; ++peer) {
    const auto first = static_cast<size_t>(rows[peer]), from = static_cast<size_t>(assignments[peer]);
    Head head{};
    head.rows = static_cast<uint64_t>(rows[peer + 1]) - first;
    head.assignments = static_cast<uint64_t>(assignments[peer + 1]) - from;
    if (peer == me) {
      messages.append(nb::none());
      continue;
    }
    head.flags = kListsRide;
    head.ended = ended;
    fill(head, header, head.rows ? nb::handle(places[peer]) : nb::handle(Py_None));
    if (head.rows) head.region = region, head.extent = extent;
    const uint64_t nbytes = sizeof head + 4 * head.rows + padded(head.rows) + 8 * head.assignments;
    if (nbytes > slot_bytes) return std::make_tuple(rows, assignments, nb::object(nb::none()));
    nb::bytes message = new_message(nbytes);
    char* at = PyBytes_AS_STRING(message.ptr());
    auto write = [&at](const void* source, size_t size) {
      if (size) std::memcpy(at, source, size);
      at += size;
    };
    write(&head, sizeof head);
    for (size_t row = first; row < first + head.rows; ++row) {
      const auto index = static_cast<uint32_t>(into.tokens[row]);
      write(&index, sizeof index);
    }
    write(into.counts + first, 2 * head.rows);
    const uint32_t zeros = 0;
    write(&zeros, padded(head.rows) - 2 * head.rows);
    write(into.experts + from, 4 * head.assignments);
    write(into.weights + from, 4 * head.assignments);
    messages.append(message);
  }
  return std::make_tuple(rows, assignments, nb::object(messages));
}

nb::list sum_messages(std::span<const int64_t> begins, uint64_t row, size_t me, const nb::bytes& header,
                      uint64_t ended, uint64_t region, const nb::list& places) {
  const size_t n = nb::len(places);
  require(begins.size() == n + 1);
  nb::list messages;
  for (size_t peer = 0; peer < n; ++peer) {
    if (peer == me) {
      messages.append(nb::none());
      continue;
    }
    Head head{};
    head.rows = static_cast<uint64_t>(begins[peer + 1] - begins[peer]);
    head.ended = ended;
    const bool gives = head.rows && row;
    fill(head, header, gives ? nb::handle(places[peer]) : nb::handle(Py_None));
    if (gives) {
      head.region = region;
      head.start = static_cast<uint64_t>(begins[peer]) * row;
      head.extent = head.rows * row;
    }
    nb::bytes message = new_message(sizeof head);
    std::memcpy(PyBytes_AS_STRING(message.ptr()), &head, sizeof head);
    messages.append(message);
  }
  return messages;
}

namespace {

// (rows, assignments, flags, ended, region, start, extent, place) of each rank but `me`; None: headers differ.
nb::object read_heads(nb::handle slots, uint64_t slot_bytes, size_t me, size_t n, const nb::bytes& header) {
  const Memory of_slots(slots);
  require(header.size() == sizeof Head::header);
  nb::list heads;
  static const char nowhere[sizeof Head::place] = {};
  for (size_t peer = 0; peer < n; ++peer) {
    if (peer == me) {
      heads.append(nb::none());
      continue;
    }
    const Came came(of_slots, slot_bytes, peer);
    const Head& head = came.head;
    if (std::memcmp(head.header, header.c_str(), sizeof head.header) != 0) return nb::none();
    const bool placed = std::memcmp(head.place, nowhere, sizeof nowhere) != 0;
    heads.append(nb::make_tuple(head.rows, head.assignments, head.flags, head.ended, head.region, head.start,
                                head.extent, nb::bytes(head.place, placed ? sizeof head.place : 0)));
  }
  return heads;
}

}  // namespace

std::optional<std::vector<uint64_t>> list_came(const SeenBytes& of_slots, uint64_t slot_bytes, size_t me,
                                               size_t n, const SeenBytes& of_own, const SeenBytes& table) {
  auto* next = reinterpret_cast<MoveEntry*>(table.bytes());
  size_t left = table.nbytes() / sizeof(MoveEntry);
  std::vector<uint64_t> extents;
  uint32_t place = 0;
  auto list = [&](size_t peer, auto indices) {
    require(indices.size() <= left);
    extents.push_back(aiocomm::list_moves(static_cast<uint32_t>(peer), indices, place, next));
    next += indices.size();
    left -= indices.size();
    place += static_cast<uint32_t>(indices.size());
  };
  for (size_t peer = 0; peer < n; ++peer) {
    if (peer == me) {
      list(peer, of_own.of<int64_t>());
      continue;
    }
    const Came came(of_slots, slot_bytes, peer);
    if (!came.fits) return std::nullopt;
    list(peer, came.indices());
  }
  return extents;
}

bool arrange_came(const SeenBytes& of_slots, uint64_t slot_bytes, size_t me, const RoutedParts& own,
                  const SeenBytes& of_local, size_t held, const ArrangedParts& arranged,
                  const SeenBytes& of_sent, const Starts& sent_starts, size_t tokens,
                  const SeenBytes& tables) {
  const auto& [starts, rows, offsets, weighs, order, first] = arranged;
  const auto &counts = own.counts, &experts = own.experts, &weights = own.weights;
  require(!sent_starts.empty());
  const size_t n = sent_starts.size() - 1;
  std::vector<CamePart> parts;
  size_t all = 0, total = 0;
  require(experts.of<int32_t>().size() == weights.of<float>().size());
  for (size_t peer = 0; peer < n; ++peer) {
    if (peer == me) {
      parts.push_back({counts.of<uint16_t>(), experts.of<int32_t>(), weights.of<float>().data()});
    } else {
      const Came came(of_slots, slot_bytes, peer);
      if (!came.fits) return false;
      parts.push_back({came.counts(), came.experts(), came.weights()});
    }
    all += parts.back().counts.size();
    total += parts.back().experts.size();
  }
  require(starts.of<int64_t>().size() == n + 1 && offsets.of<int64_t>().size() == held + 1 &&
          first.of<int64_t>().size() == all + 1);
  require(rows.of<int64_t>().size() == total && weighs.of<float>().size() == total &&
          order.of<int64_t>().size() == total);
  auto numbers = [](const SeenBytes& memory) { return reinterpret_cast<int64_t*>(memory.bytes()); };
  const Unlocked unlocked(total);
  if (!aiocomm::arrange_parts(parts, of_local.of<int64_t>(), held,
                              {numbers(starts), numbers(rows), numbers(offsets),
                               reinterpret_cast<float*>(weighs.bytes()), numbers(order), numbers(first)}))
    return false;
  std::vector<std::span<const int64_t>> given;
  const auto of_rank = of_sent.of<int64_t>();
  for (size_t rank = 0; rank < n; ++rank) {
    const auto begin = static_cast<size_t>(sent_starts[rank]),
               end = static_cast<size_t>(sent_starts[rank + 1]);
    require(begin <= end && end <= of_rank.size());
    given.push_back(of_rank.subspan(begin, end - begin));
  }
  const aiocomm::SumTables at(total, all, tokens, n);
  require(tables.nbytes() >= at.nbytes && reinterpret_cast<uintptr_t>(tables.bytes()) % 16 == 0);
  return aiocomm::write_sum_tables(at, order.of<int64_t>(), first.of<int64_t>(), weighs.of<float>(), given,
                                   tokens, tables.bytes());
}

}  // namespace aiocomm::py

void bind_expert_heads(nb::module_& m) {
  using namespace nb::literals;
  using namespace aiocomm::py;
  m.attr("DEVICE_HEAD_BYTES") = sizeof(Head);
  m.def(
      "route_messages",
      [](nb::handle ids, nb::handle weights, size_t count, nb::handle owner, size_t me,
         const nb::bytes& header, uint64_t ended, uint64_t region, uint64_t extent, const nb::list& places,
         uint64_t slot_bytes, nb::handle tokens, nb::handle counts, nb::handle experts, nb::handle routed) {
        const Memory to_tokens(tokens, true), to_counts(counts, true), to_experts(experts, true),
            to_routed(routed, true);
        return route_messages(Memory(ids), Memory(weights), count, Memory(owner), me, header, ended, region,
                              extent, places, slot_bytes, {to_tokens, to_counts, to_experts, to_routed});
      },
      "ids"_a, "weights"_a, "count"_a, "owner"_a, "me"_a, "header"_a, "ended"_a, "region"_a, "extent"_a,
      "places"_a, "slot_bytes"_a, "tokens"_a, "counts"_a, "experts"_a, "routed"_a,
      "As `route_tokens`; returns also each rank's message, or None: some rank's does not fit into its "
      "slot. None instead of all: an expert is not there.");
  m.def(
      "sum_messages",
      [](nb::handle starts, uint64_t row, size_t me, const nb::bytes& header, uint64_t ended, uint64_t region,
         const nb::list& places) {
        const Memory of_starts(starts);
        return sum_messages(of_starts.of<int64_t>(), row, me, header, ended, region, places);
      },
      "starts"_a, "row"_a, "me"_a, "header"_a, "ended"_a, "region"_a, "places"_a,
      "Each rank's message of a combine.");
  m.def("read_heads", read_heads, "slots"_a, "slot_bytes"_a, "me"_a, "size"_a, "header"_a,
        "What the messages begin with. None: some header is another.");
  m.def(
      "list_came",
      [](nb::handle slots, uint64_t slot_bytes, size_t me, size_t n, nb::handle own, nb::handle into) {
        return list_came(Memory(slots), slot_bytes, me, n, Memory(own), Memory(into, true));
      },
      "slots"_a, "slot_bytes"_a, "me"_a, "size"_a, "own"_a, "into"_a,
      "As `list_moves` of the messages of all ranks. None: some message has not all of its lists.");
  m.def(
      "arrange_came",
      [](nb::handle slots, uint64_t slot_bytes, size_t me, const std::vector<nb::object>& own,
         nb::handle local, size_t held, const std::vector<nb::object>& arranged, nb::handle sent,
         const Starts& sent_starts, size_t tokens, nb::handle into) {
        require(own.size() == 3 && arranged.size() == 6);
        const Memory of_sent(sent), counts(own[0]), experts(own[1]), weights(own[2]);
        const Memory starts(arranged[0], true), rows(arranged[1], true), offsets(arranged[2], true),
            weighs(arranged[3], true), order(arranged[4], true), first(arranged[5], true);
        return arrange_came(Memory(slots), slot_bytes, me, {of_sent, counts, experts, weights}, Memory(local),
                            held, {starts, rows, offsets, weighs, order, first}, of_sent, sent_starts, tokens,
                            Memory(into, true));
      },
      "slots"_a, "slot_bytes"_a, "me"_a, "own"_a, "local"_a, "held"_a, "arranged"_a, "sent"_a,
      "sent_starts"_a, "tokens"_a, "into"_a,
      "As `arrange_parts` of the messages of all ranks, and `write_sum_tables`. False: lists that "
      "contradict each other.");
}
