// By which way an adapter reaches the memory of a GPU. Pure; `aiocomm doctor` chooses alike (aiocomm/links/_rdma_gpu.py).
#pragma once

#include <cstdint>

namespace aiocomm::rdma {

// dma_buf: the driver exports the memory, the verbs library registers the export. peer_memory: a module of the driver
// (nvidia_peermem) lets GPU addresses be registered like any others. host: copied to the host, and sent from there.
enum class GpuWay : uint8_t { dma_buf, peer_memory, host };

struct GpuReach {
  bool exports = false;      // the GPU's driver exports memory as a dma-buf
  bool registers = false;    // the verbs library has ibv_reg_dmabuf_mr (rdma-core 34)
  bool takes = false;        // the adapter's driver has not refused such a registration
  bool peer_memory = false;  // the module is loaded
};

struct GpuChoice {
  GpuWay way;
  const char* lacks;  // why it is not dma-buf
};

// dma-buf first: kernels support it by themselves, and it follows the life of the memory.
inline GpuChoice choose_gpu_way(const GpuReach& reach) {
  if (reach.exports && reach.registers && reach.takes) return {GpuWay::dma_buf, ""};
  const char* lacks = !reach.exports ? "the GPU's driver exports no dma-buf"
                      : !reach.registers
                          ? "the verbs library has no ibv_reg_dmabuf_mr: install rdma-core 34 or newer"
                          : "the adapter's driver refuses dma-buf registrations";
  return {reach.peer_memory ? GpuWay::peer_memory : GpuWay::host, lacks};
}

// A dma-buf is of whole pages of the host's: 64 KiB on some of those that GPUs are in.
struct GpuPages {
  uint64_t from, to;
};

inline GpuPages gpu_pages(uint64_t address, uint64_t nbytes, uint64_t page) {
  return {address / page * page, (address + nbytes + page - 1) / page * page};
}

}  // namespace aiocomm::rdma
