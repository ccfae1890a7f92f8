// Registration of the shm link: one host, host memory.

#include <unistd.h>

#include "links/shm/peer.hpp"

namespace aiocomm::shm {
namespace {

class ShmLink final : public Link {
 public:
  explicit ShmLink(Host& host) : host_(host) {}
  std::string_view name() const override { return "shm"; }
  StreamNeed streams() const override { return {"unix", 1}; }
  bool polled() const override { return true; }
  std::shared_ptr<LinkPeer> attach(Rank rank, uint64_t generation, const std::vector<int>& fds,
                                   std::string_view, bool initiator) override {
    if (fds.size() != 1) {
      for (int fd : fds) ::close(fd);
      throw LinkFailure("shm takes one Unix socket per pair", 0);
    }
    auto peer = std::make_shared<ShmPeer>(host_, fds[0], initiator);
    peer->rank = rank;
    peer->generation = generation;
    return peer;
  }

 private:
  Host& host_;
};

const LinkRegistration kRegistration{
    "shm", 10, [](Host& host) -> std::unique_ptr<Link> { return std::make_unique<ShmLink>(host); }};

}  // namespace
}  // namespace aiocomm::shm
