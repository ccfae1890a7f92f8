// What of other processes' memory this one's devices reach, and what of ours theirs do.

#include <cstdint>
#include <exception>
#include <mutex>

#include "links/cuda/link.hpp"

namespace aiocomm::cuda {

void CudaLink::offer(DeviceBuffer& buffer, LinkPeer& peer) {
  auto& mine = static_cast<CudaBuffer&>(buffer);
  if (mine.place.exported != Export::none) return;
  if (peer.process() == pid_) {
    // Its address is enough. Other memory may not be mapped for the other's GPU: it is ours that moves it.
    if (mine.place.plain) mine.place.exported = Export::ipc;
  } else if (peer.process() >= 0 && mine.ipc) {
    if (state_->exports.handle_of(mine.place, *state_->started(mine.device), mine.place.handle))
      mine.place.exported = Export::ipc;
  } else if (peer.process() >= 0 && peer.pull_path({}) == Path::cma) {
    // Whoever may read this process's memory may take its descriptors; that we may read theirs is the sign.
    if (state_->exports.blocks_of(mine.place, mine.nbytes)) mine.place.exported = Export::descriptor;
  }
}

Reach CudaLink::reach(int device, const DevicePlace& theirs, LinkPeer& peer, OpId waiter) {
  if (peer.process() == pid_) return within_process(device, theirs, waiter);
  if (peer.process() < 0) return {Reach::State::refused, 0, nullptr, "the peer's GPU is on another host"};
  if (theirs.exported == Export::none)
    return {Reach::State::refused, 0, nullptr,
            "the memory cannot be shared between processes (of a pool of cudaMallocAsync, VMM memory without "
            "descriptors or in many blocks, or AIOCOMM_CMA is off): allocate it by cudaMalloc"};
  Device* own = state_->started(device);
  return state_->mappings.reach(own->context, device, theirs, peer.process(), waiter);
}

bool CudaLink::reach_shared(int device, const std::shared_ptr<PeerMemory>& memory, uint64_t offset,
                            uint64_t nbytes, const RowList* rows, bool outgoing) {
  const CUcontext context = state_->started(device)->context;
  return state_->pinned.covers(context, memory, {offset, nbytes, rows, outgoing});
}

// Communicators of one process, and messages to oneself.
Reach CudaLink::within_process(int device, const DevicePlace& theirs, OpId waiter) {
  if (theirs.device == device || theirs.device >= state_->driver.devices)
    return {Reach::State::ready, theirs.base, {}, {}};
  if (!theirs.plain) {
    unsigned long long flags = 0;
    CUmemLocation here{CU_MEM_LOCATION_TYPE_DEVICE, device};
    CUresult code = state_->driver.cuMemGetAccess(&flags, &here, theirs.address);
    if (code == CUDA_SUCCESS && flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
      return {Reach::State::refused, 0, nullptr,
              "the memory is mapped for its own GPU only (cuMemSetAccess): allocate it by cudaMalloc"};
  }
  uint64_t pair = static_cast<uint64_t>(device) << 32 | theirs.device;
  {
    std::lock_guard lock(mutex_);
    auto [it, fresh] = peered_.try_emplace(pair, Peering::opening);
    // Asked for by another transfer: copies work meanwhile, by a detour.
    if (!fresh) return {Reach::State::ready, theirs.base, {}, {}, it->second == Peering::direct};
  }
  int other = theirs.device;
  state_->helper.submit([this, state = state_.get(), device, other, pair, waiter] {
    Peering peering = Peering::detour;
    try {
      Device& mine = state->device(device);
      Device& their = state->device(other);
      state->driver.cuCtxSetCurrent(mine.context);
      CUresult code = state->driver.cuCtxEnablePeerAccess(their.context, 0);
      if (code == CUDA_SUCCESS || code == CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) peering = Peering::direct;
    } catch (const std::exception&) {
      // the copy itself will say what is wrong
    }
    {
      std::lock_guard lock(mutex_);
      peered_[pair] = peering;
    }
    state->host.go_on(&waiter, 1);
  });
  return {Reach::State::opening, 0, nullptr, {}};
}

}  // namespace aiocomm::cuda
