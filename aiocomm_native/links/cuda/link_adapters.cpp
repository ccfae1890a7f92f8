// What links whose adapters reach device memory ask of the driver.

#include <cstdio>
#include <fstream>

#include "links/cuda/link.hpp"

namespace aiocomm::cuda {

bool CudaLink::exports(int device) {
  const Driver& driver = state().driver;
  int yes = 0;
  return driver.cuMemGetHandleForAddressRange &&
         driver.cuDeviceGetAttribute(&yes, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, device) == CUDA_SUCCESS &&
         yes;
}

int CudaLink::export_pages(int device, uint64_t address, uint64_t nbytes) {
  State& state = this->state();
  Device::Current current(state.device(device));
  int fd = -1;
  CUresult code = state.driver.cuMemGetHandleForAddressRange(&fd, address, nbytes,
                                                             CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0);
  return code == CUDA_SUCCESS ? fd : -1;
}

int CudaLink::node(int device) {
  const Driver& driver = state().driver;
  int domain = 0, bus = 0, slot = 0, node = -1;
  driver.cuDeviceGetAttribute(&domain, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID, device);
  driver.cuDeviceGetAttribute(&bus, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, device);
  driver.cuDeviceGetAttribute(&slot, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, device);
  char path[96];
  std::snprintf(path, sizeof path, "/sys/bus/pci/devices/%04x:%02x:%02x.0/numa_node", domain, bus, slot);
  std::ifstream(path) >> node;
  return node;
}

void CudaLink::flush(int device) {
  State& state = this->state();
  if (!state.driver.cuFlushGPUDirectRDMAWrites) return;
  Device::Current current(state.device(device));
  state.driver.cuFlushGPUDirectRDMAWrites(CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
                                          CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER);
}

}  // namespace aiocomm::cuda
