// The awaitable handle of one operation, and the Python side of an engine.
//
// `Transfer` is a plain CPython type: it is made for every message, and speaks asyncio's Future protocol so that
// `gather`, `wait` and `wait_for` take it as it is. All of it runs on the loop's thread, with the GIL held where there is
// one; other threads may ask what a transfer has come to.
#pragma once

#include <Python.h>

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "bindings/turns.hpp"
#include "core/engine.hpp"

namespace aiocomm::py {

// Python callables that the package installs once (aiocomm/_outcome.py).
struct Hooks {
  PyObject* make_error = nullptr;         // (transfer, code, error, link, capacity, reason) -> exception
  PyObject* make_array = nullptr;         // (memory, format, shape) -> array
  PyObject* trio_wait = nullptr;          // (transfer) -> coroutine
  PyObject* iterate = nullptr;            // (transfer) -> iterator
  PyObject* cancelled_error = nullptr;    // asyncio.CancelledError
  PyObject* link_error = nullptr;         // aiocomm.LinkError
  PyObject* usage_error = nullptr;        // aiocomm.UsageError
  PyObject* make_device_array = nullptr;  // (memory, address, nbytes, device, format, shape) -> array
  PyObject* describe_device = nullptr;    // (object, writable) -> tuple, or None: it is not device memory
};
extern Hooks hooks;

class Spinner;

class PyEngine {
 public:
  explicit PyEngine(EngineConfig config) : engine(std::make_unique<Engine>(std::move(config))) {}
  ~PyEngine();

  int drain(int budget);       // returns how many have ended
  void deliver_events();       // to hooks, whose errors nobody can be told of
  bool ended_outside = false;  // operations, since the loop has last called for what has ended
  void after_submit();
  int traverse(visitproc visit, void* arg);
  void forget();
  void lives_here();  // the loop, on the calling thread
  bool is_here();     // whether the calling thread runs the loop, or nobody does
  void name_channel(uint32_t id, const std::string& name);
  PyObject* name_of_channel(uint32_t id);  // a new reference, never null

  std::unique_ptr<Engine> engine;
  PyObject* loop = nullptr;            // asyncio: the event loop
  PyObject* call_soon = nullptr;       // loop.call_soon
  PyObject* ready = nullptr;           // the loop's queue of ready callbacks, where it shows one
  PyObject* bells = nullptr;           // a tuple: those of its handles that only call for what has ended here
  PyObject* on_connect = nullptr;      // (rank)
  PyObject* on_events = nullptr;       // (a tuple: an event)
  PyObject* on_unretrieved = nullptr;  // (exception): a failure that nobody looked at
  // By link, while somebody iterates its submissions() or completions().
  std::map<uint8_t, PyObject*> on_submit, on_complete;
  bool trio = false;
  const std::shared_ptr<Turns> turns = std::make_shared<Turns>();
  std::unordered_map<uint32_t, PyObject*> channel_names;  // of those that are open
  Spinner* spinner = nullptr;                             // of a loop that spins
  std::map<const std::byte*, uint64_t> receiving;  // buffers that pending receives write: [start, bytes)

 private:
  std::atomic<unsigned long> thread_{0};
};

// An op of a call that no transfer stands for: its cookie is marked, and its end is only noted.
struct SilentOp {
  Op* op = nullptr;
  bool ended = false;
};
inline void* silent_cookie(SilentOp* silent) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(silent) | 1);
}
inline SilentOp* silent_of(const Op* op) {  // null: a transfer does
  const auto mark = reinterpret_cast<uintptr_t>(op->cookie);
  return mark & 1 ? reinterpret_cast<SilentOp*>(mark & ~uintptr_t{1}) : nullptr;
}

enum class Outcome : uint8_t { pending, done, failed, cancelled };

struct Transfer {
  PyObject_HEAD PyObject* owner;  // the Python object of `engine`
  PyEngine* engine;
  Op* op;  // null once ended
  PyObject* callback;
  PyObject* context;
  PyObject* more;  // list of (callback, context)
  PyObject* result;
  PyObject* exception;
  PyObject* cancel_message;
  PyObject* keep;  // what must live as long as the operation
  PyObject* weakrefs;
  Py_buffer view;
  uint64_t nbytes;
  int64_t tag;
  PyObject* channel;  // its name
  int32_t peer;
  std::atomic<Outcome> outcome;  // set once the rest is there
  OpKind kind;
  bool has_view, blocking, retrieved, tracked;
};

extern PyTypeObject* TransferType;
extern PyTypeObject* StatusType;

Transfer* new_transfer(PyObject* owner, PyEngine* engine, OpKind kind, uint32_t channel);
void end_transfer(Transfer* transfer);  // its op has ended: takes the outcome over and calls back
PyObject* make_status(const Transfer* transfer);
const char* kind_name(OpKind kind);
bool call_back(Transfer* transfer, PyObject* callback, PyObject* context);  // false: a Python error is set
void let_go(Transfer* transfer);                                            // of its buffer
bool loop_has_nothing_else(PyEngine* engine);
int init_transfer(PyObject* module);  // adds Transfer and Status

// Describes a buffer's format and shape in an op's metadata, and back.
void encode_meta(Op& op, const Py_buffer& view);
// The same for a format and a shape as they are; false: a Python error is set.
bool encode_meta(Op& op, const char* format, PyObject* shape);
PyObject* decode_meta(const Op& op, PyObject* memory);
PyObject* decode_device_meta(const Op& op, PyObject* memory, int device);

// A buffer that the engine allocated; frees it when the last array over it is gone.
PyObject* new_memory(std::byte* data, uint64_t nbytes);
PyObject* new_device_memory(std::unique_ptr<DeviceBuffer> buffer);  // a capsule that owns it
PyObject* new_segment_memory(std::byte* base, uint64_t nbytes);
int init_memory(PyObject* module);

}  // namespace aiocomm::py
