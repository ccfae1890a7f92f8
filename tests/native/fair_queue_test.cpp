// needs: core/fair_queue.cpp
//
// Random histories of a fair queue, beside a list that is searched for the least tag: who is next is the same at every
// step, whichever nodes enter, leave, resume, are charged or are given their charge back.

#include "core/fair_queue.hpp"

#include <algorithm>
#include <deque>
#include <random>
#include <vector>

#include "seeded.hpp"

using namespace aiocomm;

namespace {

struct Model {
  std::vector<long long> start;
  std::vector<bool> queued;
  long long furthest = 0;

  int top() const {
    int best = -1;
    for (size_t i = 0; i < start.size(); ++i)
      if (queued[i] && (best < 0 || start[i] < start[static_cast<size_t>(best)])) best = static_cast<int>(i);
    return best;
  }
  long long now() const { return top() < 0 ? furthest : start[static_cast<size_t>(top())]; }
};

void history() {
  std::mt19937 random(g_seed);
  const size_t most = 1 + random() % 12;
  FairQueue queue;
  std::deque<FairNode> nodes;
  for (size_t i = 0; i < most; ++i) nodes.emplace_back(i);
  Model model{std::vector<long long>(most), std::vector<bool>(most)};
  std::vector<long long> charged(most);  // since it was queued last, so that refunds undo charges
  for (int step = 0; step < 2000; ++step) {
    const size_t i = random() % most;
    const auto amount = static_cast<long long>(random() % 50);
    if (random() % 3 == 0) {
      queue.charge(nodes[i], static_cast<uint64_t>(amount));
      model.start[i] += amount;
      charged[i] += amount;
      model.furthest = std::max(model.furthest, model.start[i]);
    } else if (random() % 4 == 0) {
      const long long back = std::min(amount, charged[i]);
      queue.refund(nodes[i], static_cast<uint64_t>(back));
      model.start[i] -= back;
      charged[i] -= back;
    } else if (model.queued[i]) {
      queue.leave(nodes[i]);
      model.queued[i] = false;
    } else {
      const unsigned how = random() % 3;
      if (how == 0) {
        model.start[i] = std::max(model.start[i], model.now());
        queue.enter(nodes[i]);
      } else if (how == 1) {
        model.start[i] = std::max(model.start[i], model.now() - amount);
        queue.resume(nodes[i], static_cast<uint64_t>(amount));
      } else {
        queue.re_enter(nodes[i]);
      }
      charged[i] = 0;
      model.queued[i] = true;
    }
    CHECK(nodes[i].queued() == model.queued[i]);
    CHECK(queue.size() == static_cast<size_t>(std::count(model.queued.begin(), model.queued.end(), true)));
    CHECK(queue.empty() == (model.top() < 0));
    if (!queue.empty()) CHECK(queue.top() == &nodes[static_cast<size_t>(model.top())]);
  }
}

}  // namespace

int main() {
  for (g_seed = 1; g_seed <= 50; ++g_seed) history();
}
