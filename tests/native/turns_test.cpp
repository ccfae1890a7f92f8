// needs:
//
// Other tasks have their turn once the time is over, and then not before it is over again, whoever asks.

#include "bindings/turns.hpp"

#include "check.hpp"

using aiocomm::py::Turns;

int main() {
  constexpr uint64_t kMs = 1000000;
  Turns turns;
  turns.had(100 * kMs);
  CHECK(!turns.due(100 * kMs + 1900000, 2 * kMs));
  CHECK(turns.due(100 * kMs + 2100000, 2 * kMs));
  CHECK(!turns.due(100 * kMs + 2100000, 2 * kMs));
  CHECK(!turns.due(103 * kMs));  // a call of another kind, that waits for less
  CHECK(turns.due(103 * kMs + 100000));
}
