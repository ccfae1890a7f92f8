// needs: core/c[hlm]*.cpp core/copier.cpp core/de*.cpp core/engine.cpp core/f[al][io]*.cpp core/li[ns]*.cpp core/match.cpp
// needs: core/notes.cpp core/offers.cpp core/op.cpp core/pairs.cpp core/protocol_*.cpp core/rows.cpp core/sched*.cpp
// needs: core/spin.cpp core/statistics.cpp
//
// What was submitted while another thread held the token begins with whoever has it next. Where that is the loop's thread in
// a call that takes no ends over, the loop is told of what has ended by that.

#include <poll.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "check.hpp"
#include "core/engine.hpp"

using namespace aiocomm;

// An explicit instantiation may name what is private.
PriorityMutex& token_of(Engine& engine);
template <auto Member>
struct Private {
  friend PriorityMutex& token_of(Engine& engine) { return engine.*Member; }
};
template struct Private<&Engine::token_>;

namespace {

class TakingPeer final : public LinkPeer {
 public:
  Post post(const FrameHeader&, const std::byte*, const std::byte*, Wake) override { return Post::ok; }
  Post post_data(const FrameHeader&, const std::byte*, uint8_t) override { return Post::ok; }
  void close() override {}
};

class TakingLink final : public Link {
 public:
  std::string_view name() const override { return "taking"; }
  StreamNeed streams() const override { return {}; }
  std::shared_ptr<LinkPeer> attach(Rank, uint64_t, const std::vector<int>&, std::string_view, bool) override {
    return std::make_shared<TakingPeer>();
  }
};

const LinkRegistration kTaking{"taking", 1,
                               [](Host&) -> std::unique_ptr<Link> { return std::make_unique<TakingLink>(); }};

bool is_rung(const Engine& engine) {
  pollfd loop{engine.loop_fd(), POLLIN, 0};
  return ::poll(&loop, 1, 0) > 0;
}

void told_after(const std::function<void(Engine&)>& call) {
  Engine engine(EngineConfig{{"taking"}, {}, {}});
  engine.set_identity(0, 1);
  const uint32_t channel = engine.open_channel("", 1, 1.0);
  engine.add_peer(1, 2);
  engine.attach(1, 2, "taking", {}, "", true);
  engine.start_pair(1, 2);
  engine.progress(true, false);
  engine.take_events();
  CHECK(!is_rung(engine));

  std::vector<std::byte> memory(8);
  Op* op = engine.new_op();
  op->kind = OpKind::send;
  op->peer = 1;
  op->channel = channel;
  op->data = memory.data();
  op->nbytes = op->capacity = memory.size();
  std::atomic<int> step{0};
  std::thread holder([&] {
    token_of(engine).lock();
    step = 1;
    step.notify_all();
    step.wait(1);
    token_of(engine).unlock();  // and stands still before it looks whether anything was submitted
  });
  step.wait(0);
  CHECK(!engine.submit(op));
  CHECK(!engine.has_completed());
  step = 2;
  step.notify_all();
  holder.join();
  call(engine);
  CHECK(engine.has_completed() && op->code == Code::ok);
  CHECK(is_rung(engine));
  Op* done = nullptr;
  CHECK(engine.take_completed(done) && done == op);
}

}  // namespace

int main() {
  std::byte memory[8];
  told_after([&](Engine& engine) { engine.add_region(memory, sizeof memory, true); });
  told_after([](Engine& engine) { engine.open_channel("other", 1, 1.0); });
  told_after([](Engine& engine) { engine.counters("taking"); });
  told_after([](Engine& engine) { engine.link_of(1); });
  told_after([](Engine& engine) { engine.take_events(); });
}
