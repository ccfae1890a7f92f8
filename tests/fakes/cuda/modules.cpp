// Modules and kernels. Nothing is compiled here: the image of a module is one of aiocomm's sources. The first line of a
// reduction names the dtype and the operator, that of the other the rows it copies; the host does what kernels would.
#include <bit>
#include <cmath>
#include <cstring>
#include <sstream>

#include "api.hpp"
#include "experts.hpp"

namespace fake {
namespace {

float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24));
}

// Rounds to the nearest, ties to even, by way of the distance between two neighbours.
uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0) return sign;  // which has no exponent
  int exponent = 0;
  std::frexp(size, &exponent);
  const int step = std::max(exponent - 11, -24);
  const auto units = static_cast<unsigned>(std::nearbyint(std::ldexp(size, -step)));
  // A carry out of the mantissa goes into the exponent by itself.
  return sign |
         static_cast<uint16_t>(step == -24 && units < 1024 ? units : ((step + 25) << 10) + units - 1024);
}

float bfloat_to_float(uint16_t value) { return std::bit_cast<float>(uint32_t{value} << 16); }

uint16_t float_to_bfloat(float value) {
  if (std::isnan(value)) return 0x7fff;
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Eight bits, looked up: what each of the 128 sizes is worth, and for a number the nearest of them, of two the even one.
struct Float8 {
  int bits, bias;
  bool infinite;  // the greatest exponent is that of infinity and of what is not a number

  float load(uint8_t code) const {
    const int exponent = (code & 127) >> bits, mantissa = code & ((1 << bits) - 1);
    const float sign = code & 128 ? -1.0f : 1.0f;
    if (infinite && exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (!infinite && (code & 127) == 127) return NAN;
    return sign * (exponent ? std::ldexp(float((1 << bits) + mantissa), exponent - bias - bits)
                            : std::ldexp(float(mantissa), 1 - bias - bits));
  }

  uint8_t save(float value) const {
    const uint8_t sign = std::signbit(value) ? 128 : 0;
    const uint8_t past = infinite ? 0x7c : 0x7f;  // the code after the greatest number
    if (std::isnan(value)) return sign | 0x7f;
    if (std::isinf(value)) return sign | past;
    const double size = std::fabs(value);
    // Where a number would have to lie to be rounded past the greatest one.
    const double greatest = load(past - 1), step = greatest - load(past - 2);
    if (size > greatest + step / 2 || (size == greatest + step / 2 && (past - 1) % 2)) return sign | past;
    uint8_t best = 0;
    for (int code = 1; code < past; ++code) {
      const double better = std::fabs(size - load(best)) - std::fabs(size - load(uint8_t(code)));
      if (better > 0 || (better == 0 && code % 2 == 0)) best = uint8_t(code);
    }
    return sign | best;
  }
};

template <typename Stored, typename Load, typename Save>
void each(const Kernel& kernel, std::byte* out, const std::byte* left, const std::byte* right, size_t nbytes,
          Load load, Save save) {
  for (size_t at = 0; at + sizeof(Stored) <= nbytes; at += sizeof(Stored)) {
    Stored l, r;
    std::memcpy(&l, left + at, sizeof l);
    std::memcpy(&r, right + at, sizeof r);
    auto a = load(l), b = load(r);
    using Value = decltype(a);
    Value result = kernel.by             ? static_cast<Value>(a / static_cast<Value>(kernel.by))
                   : kernel.op == "sum"  ? static_cast<Value>(a + b)
                   : kernel.op == "prod" ? static_cast<Value>(a * b)
                   : (kernel.op == "min" ? a < b : a > b) || a != a ? a
                                                                    : b;
    const Stored stored = save(result);
    std::memcpy(out + at, &stored, sizeof stored);
  }
}

template <typename Value>
void plain(const Kernel& kernel, std::byte* out, const std::byte* left, const std::byte* right,
           size_t nbytes) {
  auto same = [](Value value) { return value; };
  each<Value>(kernel, out, left, right, nbytes, same, same);
}

const std::map<std::string, size_t> kItems = {
    {"float64", 8}, {"float32", 4}, {"float16", 2},       {"bfloat16", 2},   {"int8", 1},
    {"uint8", 1},   {"int16", 2},   {"uint16", 2},        {"int32", 4},      {"uint32", 4},
    {"int64", 8},   {"uint64", 8},  {"float8_e4m3fn", 1}, {"float8_e5m2", 1}};

}  // namespace

void Kernel::run(std::byte* out, const std::byte* left, const std::byte* right, size_t nbytes) const {
  if (dtype == "float64") return plain<double>(*this, out, left, right, nbytes);
  if (dtype == "float32") return plain<float>(*this, out, left, right, nbytes);
  if (dtype == "int8") return plain<int8_t>(*this, out, left, right, nbytes);
  if (dtype == "uint8") return plain<uint8_t>(*this, out, left, right, nbytes);
  if (dtype == "int16") return plain<int16_t>(*this, out, left, right, nbytes);
  if (dtype == "uint16") return plain<uint16_t>(*this, out, left, right, nbytes);
  if (dtype == "int32") return plain<int32_t>(*this, out, left, right, nbytes);
  if (dtype == "uint32") return plain<uint32_t>(*this, out, left, right, nbytes);
  if (dtype == "int64") return plain<int64_t>(*this, out, left, right, nbytes);
  if (dtype == "uint64") return plain<uint64_t>(*this, out, left, right, nbytes);
  if (dtype == "float16")
    return each<uint16_t>(*this, out, left, right, nbytes, half_to_float, float_to_half);
  if (dtype.starts_with("float8")) {
    const Float8 form = dtype == "float8_e5m2" ? Float8{2, 15, true} : Float8{3, 7, false};
    const auto load = [form](uint8_t code) { return form.load(code); };
    const auto save = [form](float value) { return form.save(value); };
    return each<uint8_t>(*this, out, left, right, nbytes, load, save);
  }
  each<uint16_t>(*this, out, left, right, nbytes, bfloat_to_float, float_to_bfloat);
}

}  // namespace fake

using namespace fake;

FAKE_API cuModuleLoadData(CUmodule* out, const void* image) {
  Call call("cuModuleLoadData", Needs::context);
  if (call) return call.code;
  std::istringstream source(static_cast<const char*>(image));
  std::string slashes, name, what;
  Kernel kernel;
  source >> slashes >> name >> what;
  if (name == "aiocomm" && what == "experts:") {
    kernel.dtype = kExperts;
    std::getline(source, kernel.op);
    *out = reinterpret_cast<CUmodule>(sim().fresh_handle());
    sim().modules[*out] = kernel;
    return CUDA_SUCCESS;
  }
  source >> kernel.dtype >> kernel.op;
  const bool gathers = what == "gather:";
  auto item = kItems.find(gathers ? "uint8" : kernel.dtype);
  if (gathers && name == "aiocomm") what = "reduction:";
  if (name != "aiocomm" || what != "reduction:" || item == kItems.end()) return CUDA_ERROR_INVALID_IMAGE;
  kernel.item = item->second;
  *out = reinterpret_cast<CUmodule>(sim().fresh_handle());
  sim().modules[*out] = kernel;
  return CUDA_SUCCESS;
}

FAKE_API cuModuleUnload(CUmodule module) {
  Call call("cuModuleUnload", Needs::context);
  if (call) return call.code;
  return sim().modules.erase(module) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

FAKE_API cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
  Call call("cuModuleGetFunction", Needs::context);
  if (call) return call.code;
  if (!sim().modules.count(module)) return CUDA_ERROR_INVALID_HANDLE;
  const bool gathers = sim().modules[module].dtype == "rows";
  const std::set<std::string> known =
      gathers ? std::set<std::string>{"gather"} : std::set<std::string>{"combine", "combine_all", "divide"};
  const bool experts = sim().modules[module].dtype == kExperts;
  if (experts ? !expert_argument_words(name) : !known.count(name)) return CUDA_ERROR_NOT_FOUND;
  *out = reinterpret_cast<CUfunction>(sim().fresh_handle());
  sim().functions[*out] = {module, name};
  return CUDA_SUCCESS;
}

FAKE_API cuLaunchKernel(CUfunction function, unsigned blocks, unsigned blocks_y, unsigned blocks_z,
                        unsigned threads, unsigned threads_y, unsigned threads_z, unsigned shared,
                        CUstream on, void** arguments, void** extra) {
  Call call("cuLaunchKernel", Needs::context);
  if (call) return call.code;
  auto found = sim().functions.find(function);
  if (found == sim().functions.end()) return CUDA_ERROR_INVALID_HANDLE;
  const uint64_t size = uint64_t{blocks} * blocks_y * blocks_z;
  if (!size || !threads || threads * threads_y * threads_z > 1024 || shared > 48 << 10 || extra)
    return CUDA_ERROR_INVALID_VALUE;
  StreamPtr stream = stream_of(call, on);
  if (!stream) return call.code;
  const auto& [module, name] = found->second;
  auto kernel = std::make_shared<Kernel>(sim().modules.at(module));
  auto argument = [&](int index) { return *static_cast<uint64_t*>(arguments[index]); };
  Op op(Op::Kind::kernel);
  uint64_t count;
  if (const size_t words = expert_argument_words(name)) {
    const auto* all = static_cast<const uint64_t*>(arguments[0]);
    kernel->in.assign(all, all + words);
    kernel->op = name + kernel->op;
    op.kernel = std::move(kernel);
    return sim().submit(call.lock, stream, std::move(op));
  }
  if (name == "combine_all") {
    struct Arrays {
      uint64_t in[16], out[16], count;
      uint32_t size, by;
    };
    const auto& all = *static_cast<const Arrays*>(arguments[0]);
    if (!all.size || all.size > 16) return CUDA_ERROR_INVALID_VALUE;
    kernel->in.assign(all.in, all.in + all.size);
    kernel->out.assign(all.out, all.out + all.size);
    kernel->by = all.by;
    count = all.count;
  } else if (name == "gather") {
    kernel->rows = argument(0);
    kernel->count = count = argument(1);
    op.uses.clear();
  } else if (op.to = argument(0); name == "combine") {
    op.from = argument(1);
    op.second = argument(2);
    count = argument(3);
  } else {
    op.from = op.to;
    count = argument(1);
    kernel->by = *static_cast<unsigned*>(arguments[2]);
  }
  std::vector<uint64_t> touched{op.to, op.from, op.second};
  touched.insert(touched.end(), kernel->in.begin(), kernel->in.end());
  touched.insert(touched.end(), kernel->out.begin(), kernel->out.end());
  op.width = count * kernel->item;
  op.kernel = std::move(kernel);
  for (uint64_t address : touched) {
    std::vector<Piece> pieces;
    // The real one accepts any address, and breaks the context when the kernel runs; so does this one.
    if (!address || !sim().memory->pieces(address, op.width, pieces)) continue;
    for (auto& piece : pieces)
      if (piece.range) op.uses.push_back(piece.range);
  }
  return count ? sim().submit(call.lock, stream, std::move(op)) : CUDA_SUCCESS;
}
