// Streams, events, and what is queued on streams.
#include <cstring>

#include "api.hpp"

namespace fake {

StreamPtr stream_of(Call& call, CUstream handle) {
  StreamPtr found;
  if (!handle || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
    if (!call.context) {
      call.code = CUDA_ERROR_INVALID_CONTEXT;
      return nullptr;
    }
    found = call.context->legacy;
    if (handle == CU_STREAM_PER_THREAD) {
      auto& mine = call.context->per_thread[std::this_thread::get_id()];
      if (!mine) mine = sim().make_stream(*call.context, true, 0);
      found = mine;
    }
  } else if (auto at = sim().streams.find(handle); at != sim().streams.end()) {
    found = at->second;
  } else {
    call.code = CUDA_ERROR_INVALID_HANDLE;
    return nullptr;
  }
  call.code = sim().health(*found->context);
  return call.code ? nullptr : found;
}

EventPtr event_of(Call& call, CUevent handle) {
  auto at = sim().events.find(handle);
  if (at != sim().events.end()) return at->second;
  call.code = CUDA_ERROR_INVALID_HANDLE;
  return nullptr;
}

namespace {

bool captures(const Stream& stream) { return stream.capture != CU_STREAM_CAPTURE_STATUS_NONE; }

bool any_capture(const Context& context) {
  for (auto& [handle, stream] : sim().streams)
    if (stream->context == &context && stream->blocking && captures(*stream)) return true;
  return false;
}

CUresult create_stream(const char* name, CUstream* out, unsigned flags, int priority) {
  Call call(name, Needs::context);
  if (call) return call.code;
  if (flags & ~1u) return CUDA_ERROR_INVALID_VALUE;
  auto stream = sim().make_stream(*call.context, !(flags & CU_STREAM_NON_BLOCKING), priority);
  sim().streams[stream->handle] = stream;
  *out = stream->handle;
  return CUDA_SUCCESS;
}

CUresult queue_value(const char* name, Op::Kind kind, CUstream handle, CUdeviceptr at, uint64_t value,
                     int nbytes, unsigned flags) {
  Call call(name, Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (!stream) return call.code;
  std::vector<Piece> pieces;
  // The real one takes registered or device memory only.
  if (at % nbytes || !sim().memory->pieces(at, nbytes, pieces) || pieces.size() != 1 || !pieces[0].range)
    return CUDA_ERROR_INVALID_VALUE;
  Op op(kind);
  op.to = at, op.value = value, op.nbytes = nbytes, op.flags = flags;
  op.uses.push_back(pieces[0].range);
  return sim().submit(call.lock, stream, std::move(op));
}

}  // namespace
}  // namespace fake

using namespace fake;

FAKE_API cuStreamCreate(CUstream* out, unsigned flags) {
  return create_stream("cuStreamCreate", out, flags, 0);
}

FAKE_API cuStreamCreateWithPriority(CUstream* out, unsigned flags, int priority) {
  return create_stream("cuStreamCreateWithPriority", out, flags, priority);
}

FAKE_API cuStreamDestroy_v2(CUstream handle) {
  Call call("cuStreamDestroy", Needs::context);
  if (call) return call.code;
  return sim().streams.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;  // what is queued still runs
}

FAKE_API cuStreamQuery(CUstream handle) {
  Call call("cuStreamQuery", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (!stream) return call.code;
  if (captures(*stream) || (stream == stream->context->legacy && any_capture(*stream->context))) {
    capture_broken();
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return sim().is_done(stream) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

FAKE_API cuStreamSynchronize(CUstream handle) {
  Call call("cuStreamSynchronize", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (!stream) return call.code;
  if (captures(*stream) || (stream == stream->context->legacy && any_capture(*stream->context))) {
    capture_broken();
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return sim().wait(call.lock, stream, stream->submitted);
}

FAKE_API cuStreamGetCtx(CUstream handle, CUcontext* out) {
  Call call("cuStreamGetCtx", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (stream) *out = stream->context->handle;
  return call.code;
}

FAKE_API cuStreamGetId(CUstream handle, unsigned long long* out) {
  Call call("cuStreamGetId", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (stream) *out = reinterpret_cast<unsigned long long>(stream->handle);
  return call.code;
}

FAKE_API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  Call call("cuStreamIsCapturing", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (!stream) return call.code;
  if (stream == stream->context->legacy && any_capture(*stream->context))
    return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  *status = stream->capture;
  return CUDA_SUCCESS;
}

FAKE_API cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
  Call call("cuStreamBeginCapture", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (!stream) return call.code;
  if (stream == stream->context->legacy || captures(*stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  stream->capture = CU_STREAM_CAPTURE_STATUS_ACTIVE;
  stream->capture_mode = mode;
  return CUDA_SUCCESS;
}

FAKE_API cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  Call call("cuStreamEndCapture", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (!stream) return call.code;
  if (!captures(*stream)) return CUDA_ERROR_INVALID_VALUE;
  bool valid = stream->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE;
  stream->capture = CU_STREAM_CAPTURE_STATUS_NONE;
  *graph = nullptr;  // graphs are not simulated
  return valid ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
}

FAKE_API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  Call call("cuThreadExchangeStreamCaptureMode", Needs::nothing);
  if (call) return call.code;
  int before = capture_mode();
  capture_mode() = *mode;
  *mode = static_cast<CUstreamCaptureMode>(before);
  return CUDA_SUCCESS;
}

FAKE_API cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned flags) {
  return queue_value("cuStreamWriteValue32", Op::Kind::write_value, stream, at, value, 4, flags);
}

FAKE_API cuStreamWriteValue64_v2(CUstream stream, CUdeviceptr at, cuuint64_t value, unsigned flags) {
  return queue_value("cuStreamWriteValue64", Op::Kind::write_value, stream, at, value, 8, flags);
}

FAKE_API cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr at, cuuint32_t value, unsigned flags) {
  return queue_value("cuStreamWaitValue32", Op::Kind::wait_value, stream, at, value, 4, flags);
}

FAKE_API cuStreamWaitValue64_v2(CUstream stream, CUdeviceptr at, cuuint64_t value, unsigned flags) {
  return queue_value("cuStreamWaitValue64", Op::Kind::wait_value, stream, at, value, 8, flags);
}

FAKE_API cuLaunchHostFunc(CUstream handle, CUhostFn function, void* argument) {
  Call call("cuLaunchHostFunc", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, handle);
  if (!stream) return call.code;
  Op op(Op::Kind::host_function, EngineKind::host);
  op.function = function, op.argument = argument;
  return sim().submit(call.lock, stream, std::move(op));
}

FAKE_API cuEventCreate(CUevent* out, unsigned flags) {
  Call call("cuEventCreate", Needs::context);
  if (call) return call.code;
  bool shared = flags & CU_EVENT_INTERPROCESS;
  if (flags & ~7u || (shared && !(flags & CU_EVENT_DISABLE_TIMING))) return CUDA_ERROR_INVALID_VALUE;
  auto event = std::make_shared<Event>();
  event->handle = reinterpret_cast<CUevent>(sim().fresh_handle());
  event->flags = flags;
  event->context = call.context;
  if (shared) {
    if (sim().event_slots.empty()) return CUDA_ERROR_OUT_OF_MEMORY;
    event->slot = sim().event_slots.back();
    sim().event_slots.pop_back();
    event->cell = &sim().memory->control().events[event->slot];
    event->generation = sim().memory->fresh_id();
    event->cell->recorded = event->cell->completed = 0;
    event->cell->generation = event->generation;
  }
  sim().events[event->handle] = event;
  *out = event->handle;
  return CUDA_SUCCESS;
}

FAKE_API cuEventDestroy_v2(CUevent handle) {
  Call call("cuEventDestroy", Needs::context);
  if (call) return call.code;
  EventPtr event = event_of(call, handle);
  if (!event) return call.code;
  if (event->slot >= 0 && !event->peer) {
    event->cell->generation = 0;
    event->cell->completed = ~0ull;  // who waits for it elsewhere goes on
    sim().event_slots.push_back(event->slot);
  }
  sim().events.erase(handle);
  return CUDA_SUCCESS;
}

FAKE_API cuEventRecord(CUevent handle, CUstream on) {
  Call call("cuEventRecord", Needs::context);
  if (call) return call.code;
  EventPtr event = event_of(call, handle);
  StreamPtr stream = event ? stream_of(call, on) : nullptr;
  if (!stream) return call.code;
  if (stream->context != event->context) return CUDA_ERROR_INVALID_HANDLE;
  Op op(Op::Kind::record);
  op.event = event;
  if (captures(*stream)) return sim().submit(call.lock, stream, std::move(op));
  event->captured = false;
  op.ticket = ++event->cell->recorded;
  return sim().submit(call.lock, stream, std::move(op));
}

FAKE_API cuEventQuery(CUevent handle) {
  Call call("cuEventQuery", Needs::context, true);
  if (call) return call.code;
  EventPtr event = event_of(call, handle);
  if (!event) return call.code;
  if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
  return event->cell->completed.load() >= event->cell->recorded.load() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

FAKE_API cuEventSynchronize(CUevent handle) {
  Call call("cuEventSynchronize", Needs::context, true);
  if (call) return call.code;
  EventPtr event = event_of(call, handle);
  if (!event) return call.code;
  if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
  uint64_t ticket = event->cell->recorded;
  CUresult code = CUDA_SUCCESS;
  while (!(code = sim().health(*call.context)) && event->cell->completed.load() < ticket)
    sim().changed.wait_for(call.lock, std::chrono::milliseconds(1));  // another process may complete it
  return code;
}

FAKE_API cuStreamWaitEvent(CUstream handle, CUevent wanted, unsigned) {
  Call call("cuStreamWaitEvent", Needs::context);
  if (call) return call.code;
  EventPtr event = event_of(call, wanted);
  StreamPtr stream = event ? stream_of(call, handle) : nullptr;
  if (!stream) return call.code;
  if (event->captured && !captures(*stream)) {
    capture_broken();  // the real one would draw this stream into the capture
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  Op op(Op::Kind::wait_event);
  op.event = event;
  op.ticket = event->cell->recorded;
  return sim().submit(call.lock, stream, std::move(op));
}
