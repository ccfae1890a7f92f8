#include "links/rdma/link.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "core/device.hpp"
#include "core/doorbell.hpp"
#include "links/rdma/gpu.hpp"
#include "links/rdma/peer.hpp"

namespace aiocomm::rdma {

namespace {

constexpr uint64_t kLookNs = 1000000000;
static_assert(std::endian::native == std::endian::little, "frames travel in little-endian order");

Selection selection_of(Host& host) {
  Selection selection;
  std::istringstream names(host.text_setting("rdma_devices"));
  for (std::string name; std::getline(names, name, ',');) {
    std::erase_if(name, [](unsigned char c) { return std::isspace(c); });
    if (!name.empty()) selection.names.push_back(name);
  }
  std::istringstream nodes(host.text_setting("rdma_nodes"));  // checked by the settings
  for (std::string pair; std::getline(nodes, pair, ',');)
    if (size_t at = pair.find('='); at != std::string::npos)
      selection.nodes[pair.substr(0, at)] = std::atoi(pair.c_str() + at + 1);
  selection.gid_index = static_cast<int>(host.setting("rdma_gid_index", -1));
  return selection;
}

}  // namespace

RdmaLink::RdmaLink(Host& host) : host_(host), verbs_(Verbs::get(host.text_setting("libibverbs"))) {
  std::vector<ibv_pd*> domains = open_rails();
  news_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  registrations_ = std::make_unique<Registrations>(
      verbs_, std::move(domains), static_cast<uint64_t>(host.setting("rdma_cache_bytes", 1ull << 30)),
      std::any_of(ports_.begin(), ports_.end(),
                  [&](const Port& port) { return port.node != ports_[0].node; }),
      [this] { ring_fd(news_); }, [this](const char* why) { thread_failed(why); });
  connector_ = std::make_unique<Connector>([this] { ring_fd(news_); },
                                           [this](const char* why) { thread_failed(why); });
  host_.watch(news_, EPOLLIN, this, false);
  nodes_ = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
  if (nodes_ >= 0 && inotify_add_watch(nodes_, "/dev/infiniband", IN_DELETE) < 0)
    ::close(std::exchange(nodes_, -1));
  if (nodes_ >= 0) host_.watch(nodes_, EPOLLIN, this, false);
  for (auto& rail : rails_) {
    Rail& one = *rail;
    rail->on_gone = [this, &one](const char* why) {
      one.leave(why);
      ring_fd(news_);
    };
    rail->on_failed = [this](const char* why) { thread_failed(why); };
    rail->handle = [&host] {
      if (!host.look()) ring(host.wake_page().engine, host.engine_fd());
    };
    host.watch_polled(rail->express_fd(), rail.get());
    rail->start();
  }
}

// One that works is enough: devices run out of what rails take, and not all at once. Throws LinkFailure.
std::vector<ibv_pd*> RdmaLink::open_rails() {
  Transport transport;
  auto byte = [&](const char* name) { return static_cast<uint8_t>(host_.setting(name, 0)); };
  transport.frames = {byte("rdma_urgent_service_level"), byte("rdma_urgent_traffic_class")};
  transport.map_classes(host_.text_setting("rdma_service_level"), host_.text_setting("rdma_traffic_class"));
  transport.try_for(host_.setting("rdma_retry_s", 2.0),
                    static_cast<uint64_t>(host_.setting("chunk_max", 4 << 20)));
  std::vector<ibv_pd*> domains;
  std::string reasons;
  int error = 0;
  for (const Port& port : choose_ports(verbs_, selection_of(host_), left_out_)) {
    try {
      rails_.push_back(std::make_unique<Rail>(verbs_, port, transport));
    } catch (const LinkFailure& failure) {
      reasons += (reasons.empty() ? "" : "; ") + std::string(failure.what());
      error = failure.code;
      left_out_.push_back({port.device + ":" + std::to_string(port.number), failure.what()});
      continue;
    }
    ports_.push_back(port);
    domains.push_back(rails_.back()->domain());
  }
  if (rails_.empty()) throw LinkFailure("rdma: " + reasons, error);
  return domains;
}

RdmaLink::~RdmaLink() { close(); }

void RdmaLink::close() {
  for (auto& rail : rails_) {
    if (rail->express_fd() >= 0) host_.unwatch_polled(rail->express_fd());
    rail->stop();
  }
  connector_.reset();  // its threads ring, as do those of the other
  registrations_.reset();
  for (int* fd : {&news_, &nodes_})
    if (int open = std::exchange(*fd, -1); open >= 0) {
      host_.unwatch(open, false);
      ::close(open);
    }
  rails_.clear();
}

// By a thread of this link's, which ends. Who waits for its end may hold the token: the engine's thread is told instead.
void RdmaLink::thread_failed(const char* why) noexcept {
  {
    std::lock_guard lock(fault_mutex_);
    if (!fault_[0]) std::snprintf(fault_.data(), fault_.size(), "a thread of the rdma link: %s", why);
  }
  ring_fd(news_);
}

// Nothing goes on without that thread: the engine ends as if it had thrown this itself.
void RdmaLink::see_fault() {
  std::lock_guard lock(fault_mutex_);
  if (fault_[0]) throw std::runtime_error(fault_.data());
}

void RdmaLink::on_ready(uint32_t) {
  clear_fd(news_);
  see_fault();
  for (uint32_t id : registrations_->take_released()) host_.sink().on_released(*this, id);
  for (const Registered& news : registrations_->take()) {
    // Of all memory, not of this allocation only, which may be in several pieces.
    if (news.of_device && (news.error == EOPNOTSUPP || news.error == ENOSYS || news.error == EINVAL))
      takes_dma_buf_ = false;
    host_.sink().on_held(*this, news.id, news.error, news.reason);
  }
  while (auto job = connector_->next()) job->lane.peer.connected(*job);
  alignas(inotify_event) char text[4096];
  for (ssize_t n; nodes_ >= 0 && (n = ::read(nodes_, text, sizeof text)) > 0;)
    for (ssize_t at = 0; at < n;) {
      auto event = reinterpret_cast<inotify_event*>(text + at);
      at += static_cast<ssize_t>(sizeof *event + event->len);
      for (auto& rail : rails_)
        if (event->len && rail->node() == event->name) rail->leave();
    }
  retire_rails();
}

void RdmaLink::look_for_devices(uint64_t now_ns) {
  if (now_ns < looked_ns_ + kLookNs) return;
  looked_ns_ = now_ns;
  for (auto& rail : rails_)
    if (!rail->gone() && !rail->present()) rail->leave();
  retire_rails();
}

void RdmaLink::retire_rails() {
  for (size_t i = 0; i < rails_.size(); ++i) {
    if (!rails_[i]->idle_without_device()) continue;
    if (connector_->uses(*rails_[i]) || registrations_->busy()) return;  // with their devices: they ring
    if (rails_[i]->runs_here()) {
      ring_fd(news_);
      continue;
    }
    host_.unwatch_polled(rails_[i]->express_fd());
    registrations_->forget_rail(i);
    rails_[i]->retire();
  }
}

uint32_t RdmaLink::hold(const std::byte* data, uint64_t nbytes, Access access) {
  return nbytes ? registrations_->acquire(data, nbytes, access).id : 0;
}

uint32_t RdmaLink::hold_device(const DevicePlace& place, uint64_t nbytes, Access access, Mover& mover) {
  auto [known, fresh] = gpus_.try_emplace(place.device);
  if (fresh) known->second = {mover.exports(place.device), mover.node(place.device)};
  auto [exports, node] = known->second;
  auto is_there = [](const char* path) { return ::access(path, F_OK) == 0; };
  static const bool peer_memory =
      is_there("/sys/module/nvidia_peermem") || is_there("/sys/kernel/mm/memory_peers/nv_mem");
  GpuChoice choice = choose_gpu_way({exports, verbs_.reg_dmabuf_mr != nullptr, takes_dma_buf_, peer_memory});
  if (choice.way == GpuWay::host)
    throw LinkFailure(std::string(choice.lacks) + ", and nvidia_peermem is not loaded", EOPNOTSUPP);
  DeviceRange range{place.address, nbytes, place.base, place.extent, place.buffer_id, node, {}};
  if (choice.way == GpuWay::dma_buf)
    range.open = [&mover, device = place.device](uint64_t address, uint64_t bytes) {
      return mover.export_pages(device, address, bytes);
    };
  return registrations_->acquire_device(range, access).id;
}

bool RdmaLink::held(uint32_t id) {
  Registration* registration = registrations_->get(id);
  return !registration || registration->ready;
}

// One rail that has a way is enough. Throws LinkFailure.
void RdmaLink::see_routes(const std::vector<Address>& theirs) {
  std::string reasons;
  int error = 0;
  for (size_t i = 0; i < theirs.size(); ++i) {
    try {
      return check_route(ports_[i], theirs[i]);
    } catch (const LinkFailure& failure) {
      reasons += (reasons.empty() ? "" : "; ") + std::string(failure.what());
      error = failure.code;
    }
  }
  if (error) throw LinkFailure("rdma: " + reasons, error);
}

std::shared_ptr<LinkPeer> RdmaLink::attach(Rank rank, uint64_t generation, const std::vector<int>& fds,
                                           std::string_view card, bool initiator) {
  std::vector<Address> theirs;
  try {
    if (fds.size() != 1)
      throw LinkFailure("rdma needs one connection, got " + std::to_string(fds.size()), EINVAL);
    theirs = decode_card(card);
    theirs.resize(std::min(theirs.size(), ports_.size()));
    for (size_t i = 0; i < theirs.size(); ++i) check_reach(ports_[i], theirs[i]);
    see_routes(theirs);
  } catch (const LinkFailure&) {
    for (int fd : fds) ::close(fd);
    throw;
  }
  int on = 1;
  ::fcntl(fds[0], F_SETFL, ::fcntl(fds[0], F_GETFL) | O_NONBLOCK);
  ::setsockopt(fds[0], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  auto peer = std::make_shared<RdmaPeer>(*this, rank, generation, fds[0],
                                         initiator);  // the socket is its from here on
  peer->open(theirs);
  return peer;
}

std::map<std::string, uint64_t> RdmaLink::counters() {
  std::map<std::string, uint64_t> all;
  for (auto& rail : rails_) {
    Rail::Counters& c = rail->counters;
    auto add = [&](const char* name, const std::atomic<uint64_t>& value) {
      all[name] += value.load(std::memory_order_relaxed);
      all[rail->port().device + "." + name] += value.load(std::memory_order_relaxed);
    };
    add("sends", c.sends);
    add("inline_sends", c.inline_sends);
    add("ring_writes", c.ring_writes);
    add("writes", c.writes);
    add("reads", c.reads);
    add("send_completions", c.send_completions);
    add("frames_received", c.received);
    add("immediates_received", c.immediates);
    add("wakeups", c.wakeups);
  }
  all["ring_frames_received"] = ring_frames;
  all["resent"] = resent;
  all["repeated"] = repeated;
  all["lanes_failed"] = lanes_failed;
  all["lanes_recovered"] = lanes_recovered;
  if (registrations_) {
    const RegistrationCounters& c = registrations_->counters();
    all["registrations_made"] = c.made;
    all["registrations_found"] = c.found;
    all["registrations_evicted"] = c.evicted;
    all["registrations_aside"] = c.aside;
    all["registrations_of_devices"] = c.of_devices;
    all["registered_bytes"] = c.pinned_bytes;
  }
  return all;
}

namespace {

const LinkRegistration registration{
    "rdma", 10, [](Host& host) -> std::unique_ptr<Link> { return std::make_unique<RdmaLink>(host); }, true};

}  // namespace
}  // namespace aiocomm::rdma
