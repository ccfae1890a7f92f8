// needs: core/notes.cpp
//
// Random histories of notifications: frames in order, writes in any order and some of them twice. Whatever happens, each
// is told once, not before its write, and in its channel's order.

#include "core/notes.hpp"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "seeded.hpp"

using namespace aiocomm;

namespace {

template <class F>
bool illegal(F&& f) {
  try {
    f();
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

void history(uint32_t first) {
  std::mt19937 random(g_seed);
  auto pick = [&](size_t n) { return random() % n; };
  NotesDue due;
  for (uint32_t i = 0; i < first; ++i) {  // numbers begin again some day
    CHECK(due.announced(i, {1, 0, ""}).empty());
    CHECK(due.written(i).size() == 1);
  }
  constexpr size_t kNotes = 60;
  std::vector<uint32_t> writes;
  std::vector<bool> written(kNotes);
  std::vector<int> told(kNotes);
  std::map<ChannelId, size_t> last;
  size_t framed = 0, posted = 0;
  auto number_of = [&](size_t i) { return static_cast<uint32_t>((first + i) % NotesDue::kNumbers); };
  auto hear = [&](const std::vector<Note>& notes) {
    for (const Note& note : notes) {
      auto i = static_cast<size_t>(std::stoul(note.payload));
      CHECK(written[i] && i < framed);
      CHECK(++told[i] == 1);
      CHECK(note.nbytes == i && note.channel == i % 3);
      if (auto it = last.find(note.channel); it != last.end()) CHECK(it->second < i);
      last[note.channel] = i;
    }
  };
  while (framed < kNotes || !writes.empty() || posted < kNotes) {
    switch (pick(3)) {
      case 0:
        if (framed < kNotes) {
          size_t i = framed++;
          hear(due.announced(number_of(i), {i % 3, i, std::to_string(i)}));
        }
        break;
      case 1:
        if (posted < kNotes) {
          writes.push_back(static_cast<uint32_t>(posted));
          if (pick(4) == 0) writes.push_back(static_cast<uint32_t>(posted));
          ++posted;
        }
        break;
      default:
        if (writes.empty()) break;
        size_t at = pick(writes.size());
        size_t i = writes[at];
        writes.erase(writes.begin() + static_cast<long>(at));
        written[i] = true;
        hear(due.written(number_of(i)));
    }
  }
  for (int count : told) CHECK(count == 1);
  CHECK(due.pending() == 0);
}

}  // namespace

int main() {
  for (g_seed = 1; g_seed <= 2000; ++g_seed) history(0);
  history(NotesDue::kNumbers - 20);

  NotesDue due;
  CHECK(illegal([&] { due.announced(1, {}); }));
  for (uint32_t i = 0; i < NotesDue::kPending; ++i) due.announced(i, {});
  CHECK(illegal([&] { due.announced(NotesDue::kPending, {}); }));
  NotesDue early;
  for (uint32_t i = 0; i < NotesDue::kPending; ++i) early.written(i);
  CHECK(illegal([&] { early.written(NotesDue::kPending); }));
  CHECK(early.announced(0, {}).size() == 1);

  CHECK(is_note(kNoteMark | 5) && note_of(kNoteMark | 5) == 5 && !is_note(4094u << 20 | 0xfffff));
  std::puts("ok");
}
