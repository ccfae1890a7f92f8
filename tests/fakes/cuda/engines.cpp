// The engines: threads that move bytes.
#include <algorithm>
#include <cstring>
#include <string>

#include "experts.hpp"
#include "sim.hpp"

namespace fake {

namespace {

// Copies between lists of pieces of equal length, from byte `begin` to byte `end` of them.
void move(const std::vector<Piece>& to, const std::vector<Piece>& from, size_t begin, size_t end) {
  size_t i = 0, j = 0, at_to = 0, at_from = 0, done = 0;
  while (done < end) {
    size_t step = std::min({to[i].size - at_to, from[j].size - at_from, end - done});
    size_t skip = done < begin ? std::min(step, begin - done) : 0;
    if (step > skip) std::memmove(to[i].bytes + at_to + skip, from[j].bytes + at_from + skip, step - skip);
    done += step, at_to += step, at_from += step;
    if (at_to == to[i].size) ++i, at_to = 0;
    if (at_from == from[j].size) ++j, at_from = 0;
  }
}

void fill(const std::vector<Piece>& to, uint64_t value, int nbytes) {
  for (auto& piece : to)
    for (size_t at = 0; at + nbytes <= piece.size; at += nbytes)
      std::memcpy(piece.bytes + at, &value, nbytes);
}

std::string describe(uint64_t address, size_t nbytes) {
  char text[64];
  std::snprintf(text, sizeof text, "%zu bytes at 0x%llx", nbytes, static_cast<unsigned long long>(address));
  return text;
}

}  // namespace

CUresult Sim::translate(Device& device, uint64_t address, size_t nbytes, std::vector<Piece>& out,
                        bool& stale) {
  int here = device.context.device;
  if (!memory->pieces(address, nbytes, out)) {
    faults().violation("access to unmapped memory: " + describe(address, nbytes) + ", by device " +
                       std::to_string(here));
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  for (auto& piece : out) {
    if (!piece.range || piece.range->on_host()) continue;
    Range& range = *piece.range;
    if (range.stale()) {
      stale = true;
      faults().violation("access to memory that its owner has freed: " + describe(address, nbytes) +
                         ", by device " + std::to_string(here));
    }
    if (range.origin == Origin::vmm) {
      if (!(range.access >> here & 1)) {
        faults().violation("access to " + describe(address, nbytes) + " by device " + std::to_string(here) +
                           ", which cuMemSetAccess did not name");
        return CUDA_ERROR_ILLEGAL_ADDRESS;
      }
    } else if (range.device != here) {
      bool direct = device.context.peers.count(range.device) || (range.lazy_peer && range.opener == here);
      if (!direct) faults().count("staged_copies");  // the real one goes through the host, ten times slower
    }
  }
  return CUDA_SUCCESS;
}

CUresult Sim::compute_all(Lock& lock, Device& device, Op& op) {
  const Kernel& kernel = *op.kernel;
  std::vector<std::vector<Piece>> in(kernel.in.size()), out(kernel.out.size());
  bool stale = false;
  for (size_t rank = 0; rank < in.size(); ++rank) {
    if (CUresult code = translate(device, kernel.in[rank], op.width, in[rank], stale)) return code;
    if (CUresult code = translate(device, kernel.out[rank], op.width, out[rank], stale)) return code;
  }
  lock.unlock();
  std::vector<std::byte> total(op.width), part(op.width), result(op.width);
  Kernel pair = kernel;
  pair.by = 0;
  move({{total.data(), total.size(), nullptr}}, in[0], 0, op.width);
  for (size_t rank = 1; rank < in.size(); ++rank) {
    move({{part.data(), part.size(), nullptr}}, in[rank], 0, op.width);
    pair.run(result.data(), total.data(), part.data(), op.width);
    total.swap(result);
  }
  if (kernel.by) {
    kernel.run(result.data(), total.data(), total.data(), op.width);
    total.swap(result);
  }
  for (size_t rank = 0; rank < out.size() && !stale; ++rank)
    move(out[rank], {{total.data(), total.size(), nullptr}}, 0, op.width);
  lock.lock();
  return CUDA_SUCCESS;
}

CUresult Sim::gather(Lock& lock, Device& device, const Kernel& kernel) {
  struct Row {
    uint64_t to, from, nbytes;
  };
  std::vector<Row> rows(kernel.count);
  const size_t nbytes = rows.size() * sizeof(Row);
  std::vector<Piece> table;
  bool stale = false;
  if (CUresult code = translate(device, kernel.rows, nbytes, table, stale)) return code;
  move({{reinterpret_cast<std::byte*>(rows.data()), nbytes, nullptr}}, table, 0, nbytes);
  for (const Row& row : rows) {
    std::vector<Piece> to, from;
    if (CUresult code = translate(device, row.to, row.nbytes, to, stale)) return code;
    if (CUresult code = translate(device, row.from, row.nbytes, from, stale)) return code;
    if (!stale) move(to, from, 0, row.nbytes);
    faults().count("bytes", row.nbytes);
  }
  (void)lock;
  return health(device.context);
}

CUresult Sim::compute(Lock& lock, Device& device, Op& op) {
  if (op.kernel->dtype == kExperts) {
    bool stale = false;
    auto pieces = [&](uint64_t address, size_t nbytes, std::vector<Piece>& found) {
      return translate(device, address, nbytes, found, stale);
    };
    if (CUresult code = run_experts(*op.kernel, {pieces, [&] { return stale; }})) return code;
    return health(device.context);
  }
  if (op.kernel->rows) return gather(lock, device, *op.kernel);
  if (!op.kernel->in.empty()) return compute_all(lock, device, op);
  std::vector<Piece> to, left, right;
  bool stale = false;
  for (auto& [address, pieces] : {std::pair{op.to, &to}, {op.from, &left}, {op.second, &right}})
    if (address)
      if (CUresult code = translate(device, address, op.width, *pieces, stale)) return code;
  lock.unlock();
  std::vector<std::byte> out(op.width), a(op.width), b(op.width);
  const std::vector<Piece> ours{{a.data(), a.size(), nullptr}}, theirs{{b.data(), b.size(), nullptr}};
  if (op.width && op.from) move(ours, left, 0, op.width);
  if (op.width && op.second) move(theirs, right, 0, op.width);
  op.kernel->run(out.data(), a.data(), b.data(), op.width);
  if (op.width && !stale) move(to, {{out.data(), out.size(), nullptr}}, 0, op.width);
  lock.lock();
  return CUDA_SUCCESS;
}

CUresult Sim::perform(Lock& lock, Device& device, EngineState& engine, Op& op) {
  if (op.kind == Op::Kind::host_function) {
    lock.unlock();
    op.function(op.argument);
    lock.lock();
    return CUDA_SUCCESS;
  }
  if (CUresult code = faults().on_call("@engine")) return code;
  if (op.kind == Op::Kind::kernel) return compute(lock, device, op);
  // Rows that touch each other are one.
  bool flat = op.height > 1 && op.to_pitch == op.width && op.from_pitch == op.width;
  size_t rows = flat ? 1 : op.height, width = flat ? op.width * op.height : op.width;
  std::vector<std::pair<std::vector<Piece>, std::vector<Piece>>> work(rows);
  std::vector<std::byte> garbage;  // read in the place of memory that its owner has freed
  for (size_t row = 0; row < rows; ++row) {
    auto& [to, from] = work[row];
    bool stale_to = false, stale_from = false;
    if (CUresult code = translate(device, op.to + row * op.to_pitch, width, to, stale_to)) return code;
    if (op.kind == Op::Kind::copy) {
      if (CUresult code = translate(device, op.from + row * op.from_pitch, width, from, stale_from))
        return code;
    }
    if (stale_to || stale_from) garbage.assign(width, std::byte{0xDD});
    if (stale_from) from = {{garbage.data(), width, nullptr}};
    if (stale_to) to = {{garbage.data(), width, nullptr}};
  }
  lock.unlock();
  auto run = [&](size_t first, size_t last) {
    for (size_t row = first; row < last; ++row) {
      if (op.kind == Op::Kind::fill)
        fill(work[row].first, op.value, op.nbytes);
      else
        move(work[row].first, work[row].second, 0, width);
    }
  };
  if (op.kind == Op::Kind::copy) {
    size_t half = width / 2;
    for (auto& [to, from] : work) move(to, from, 0, half);
    lock.lock();
    changed.wait(lock, [&] { return !engine.halfway || health(device.context); });
    lock.unlock();
    for (auto& [to, from] : work) move(to, from, half, width);
  } else {
    run(0, rows);
  }
  lock.lock();
  if (op.kind == Op::Kind::copy) faults().count("bytes", op.width * op.height);
  return health(device.context);
}

void Sim::run_engine(int index, EngineKind kind) {
  Device& device = *devices[index];
  EngineState& engine = device.engines[static_cast<size_t>(kind)];
  Lock lock(mutex);
  for (;;) {
    changed.wait(lock, [&] {
      return !engine.ready.empty() && (!engine.paused || engine.steps) && !health(device.context);
    });
    if (engine.paused) --engine.steps;
    auto stream = engine.ready.extract(engine.ready.begin()).mapped();
    engine.busy = true;
    CUresult code = perform(lock, device, engine, stream->queue.front());
    engine.busy = false;
    changed.notify_all();
    ++engine.executed;
    if (code) {
      if (!faults().lost(index)) device.context.error = code;
    } else {
      finish(*stream);
    }
    pump();
  }
}

}  // namespace fake
