// needs: links/rdma/transport.cpp
//
// How long a queue pair tries, what classes map to, which rail takes a chunk, and which frames are acknowledged.

#include "links/rdma/transport.hpp"

#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "links/rdma/acks.hpp"
#include "links/rdma/gpu.hpp"
#include "links/rdma/lanes.hpp"

using namespace aiocomm::rdma;

namespace {

bool refused(const std::string& services) {
  Transport transport;
  try {
    transport.map_classes(services, "0");
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void tries_as_long_as_asked() {
  for (double seconds : {0.01, 0.1, 0.5, 2.0, 10.0, 100.0}) {
    Transport transport;
    transport.try_for(seconds, 0);
    CHECK(transport.retry_s() <= seconds);
    CHECK(transport.retry_s() > seconds / 2);
    CHECK(transport.patience_ns == static_cast<uint64_t>(transport.retry_s() * 1e9) + 500000000);
  }
  Transport transport;
  transport.try_for(2.0, 4 << 20);
  CHECK(transport.timeout == 16);
  transport.try_for(0.0, 0);
  CHECK(transport.timeout == 1);  // 0 would be for ever
  transport.try_for(1e9, 0);
  CHECK(transport.timeout == 31);
  transport.try_for(2.0, 1 << 30);  // a request that takes long is not a device that says nothing
  CHECK(transport.patience_ns > 100000000000);
}

void maps_classes() {
  Transport transport;
  transport.map_classes("", "");
  CHECK(transport.bulk.size() == 1 && transport.bulk[0] == Level{});
  transport.map_classes("3", "104");
  CHECK(transport.bulk.size() == 1 && (transport.bulk[0] == Level{3, 104}));
  for (uint8_t level : transport.level) CHECK(level == 0);
  transport.map_classes("0, 0,1,2", "8,8,8,8");
  CHECK(transport.bulk.size() == 3);
  CHECK((transport.level == std::array<uint8_t, kClasses>{0, 0, 1, 2}));
  CHECK((transport.bulk[2] == Level{2, 8}));
  transport.map_classes("1", "0,1,0,1");
  CHECK((transport.level == std::array<uint8_t, kClasses>{0, 1, 0, 1}));
  for (const char* wrong : {"1,2", "1,2,3,4,5", "x", "1,,2,3", "-1", "256", "1 2", "1,2,3,x"})
    CHECK(refused(wrong));
}

void takes_the_rail_that_is_through_first() {
  auto choose = [](std::vector<LaneLoad> lanes, uint64_t nbytes, int node = kNoNode) {
    return choose_lane(lanes.data(), lanes.size(), nbytes, node);
  };
  CHECK(choose({}, 1) == kNoLane);
  CHECK(choose({{false}, {false}}, 1) == kNoLane);
  CHECK(choose({{true}, {true}}, 100) == 0);  // of equals the first
  CHECK(choose({{true, kNoNode, 100}, {true}}, 100) == 1);
  CHECK(choose({{true, kNoNode, 100, 4.0}, {true, kNoNode, 0, 1.0}}, 100) == 0);  // the faster one
  CHECK(choose({{false, kNoNode, 0, 4.0}, {true}}, 100) == 1);
  // Near ones first, until they have more than they drain; then a far one that is through sooner all the same.
  constexpr uint64_t kFull = 100'000;  // at one byte per ns
  CHECK(choose({{true, 0}, {true, 1}}, 100, 1) == 1);
  CHECK(choose({{true, 0}, {true, 1, kFull}}, 100, 1) == 1);
  CHECK(choose({{true, 0}, {true, 1, kFull + 1}}, 100, 1) == 0);
  CHECK(choose({{true, 0}, {true, 1, 2 * kFull, 4.0}}, 100, 1) == 1);  // a faster one drains more
  CHECK(choose({{true, 0, kFull}, {true, 1, kFull + 1}}, 100, 1) == 1);
  CHECK(choose({{true, 0}, {true, 1, kFull + 1}, {true, 1, kFull}}, 100, 1) == 2);
  CHECK(choose({{true, 0}, {true, 1, 60}, {true, 1, 50}}, 100, 1) == 2);
  CHECK(choose({{true, 0}, {false, 1}}, 100, 1) == 0);
  // Where nobody knows, none is far.
  CHECK(choose({{true, 0}, {true, 1}}, 100, kNoNode) == 0);
  CHECK(choose({{true, kNoNode}, {true, 1}}, 100, 1) == 0);
}

void reaches_the_memory_of_gpus() {
  auto way = [](bool exports, bool registers, bool takes, bool peer_memory) {
    return choose_gpu_way({exports, registers, takes, peer_memory});
  };
  CHECK(way(true, true, true, true).way == GpuWay::dma_buf);
  CHECK(way(true, true, true, false).way == GpuWay::dma_buf);
  for (int lacking = 0; lacking < 3; ++lacking) {
    bool has[3] = {lacking != 0, lacking != 1, lacking != 2};
    CHECK(way(has[0], has[1], has[2], true).way == GpuWay::peer_memory);
    CHECK(way(has[0], has[1], has[2], false).way == GpuWay::host);
  }
  CHECK(std::string(way(false, true, true, false).lacks).find("exports no dma-buf") != std::string::npos);
  CHECK(std::string(way(true, false, true, false).lacks).find("rdma-core 34") != std::string::npos);
  CHECK(std::string(way(true, true, false, true).lacks).find("refuses") != std::string::npos);
}

void exports_whole_pages() {
  auto pages = [](uint64_t address, uint64_t nbytes, uint64_t page, uint64_t from, uint64_t to) {
    GpuPages found = gpu_pages(address, nbytes, page);
    return found.from == from && found.to == to;
  };
  CHECK(pages(0x5200, 0x100, 0x1000, 0x5000, 0x6000));
  CHECK(pages(0x5200, 0xe01, 0x1000, 0x5000, 0x7000));
  CHECK(pages(0x5000, 0x1000, 0x1000, 0x5000, 0x6000));
  CHECK(pages(0x25200, 0x100, 0x10000, 0x20000, 0x30000));
}

void acknowledges_in_any_order() {
  Acks acks;
  CHECK(acks.all_before() == 0);
  acks.one(1);
  acks.one(2);
  CHECK(acks.all_before() == 0);
  acks.one(0);
  CHECK(acks.all_before() == 3);
  acks.one(1);   // went out twice
  acks.one(40);  // more than may be open
  CHECK(acks.all_before() == 3);
  acks.one(5);
  acks.before(5);
  CHECK(acks.all_before() == 6);
  acks.before(4);  // old word
  CHECK(acks.all_before() == 6);
  acks.one(37);
  acks.before(37);
  CHECK(acks.all_before() == 38);
  for (uint32_t seq = 38; seq != 100; ++seq) acks.one(seq);
  CHECK(acks.all_before() == 100);
}

void acknowledges_around_the_end_of_numbers() {
  Acks acks;
  for (uint32_t seq = 0; seq < 0xf0000000; seq += 0x10000000) acks.before(seq + 0x10000000);
  acks.before(0xfffffff0);
  CHECK(acks.all_before() == 0xfffffff0);
  for (uint32_t seq = 0xfffffff1; seq != 4; ++seq) acks.one(seq);
  CHECK(acks.all_before() == 0xfffffff0);
  acks.one(0xfffffff0);
  CHECK(acks.all_before() == 4);
}

}  // namespace

int main() {
  tries_as_long_as_asked();
  maps_classes();
  takes_the_rail_that_is_through_first();
  reaches_the_memory_of_gpus();
  exports_whole_pages();
  acknowledges_in_any_order();
  acknowledges_around_the_end_of_numbers();
}
