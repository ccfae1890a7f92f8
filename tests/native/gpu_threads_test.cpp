// Threads beside the engine's, for calls of the GPU's driver: what is thrown in one is told, or kept to itself, and what was
// submitted after it is done all the same.
// needs: core/link.cpp links/cuda/driver.cpp links/cuda/reaper.cpp links/cuda/mappings.cpp

#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "links/cuda/mappings.hpp"
#include "links/cuda/reaper.hpp"

using namespace aiocomm::cuda;

namespace {

void helper_goes_on_after_what_is_thrown() {
  Driver driver;
  driver.cuThreadExchangeStreamCaptureMode = [](int*) { return CUDA_SUCCESS; };
  std::vector<std::string> told;  // by its thread, which has ended before it is looked at
  int looks = 0;
  bool done = false;
  {
    Helper helper(
        driver,
        [&] {
          if (++looks == 2) throw std::bad_alloc();
          return 0;
        },
        [&](const char* why) { told.push_back(why); });
    CHECK(helper.submit([] { throw std::runtime_error("mapping is broken"); }));
    CHECK(helper.submit([] { throw 7; }));
    CHECK(helper.submit([&] { done = true; }));
  }
  CHECK(done && told.size() == 3);
  CHECK(told[0] == "mapping is broken" && told[1] == std::bad_alloc().what() &&
        told[2] == "an unknown error");
}

void reaper_goes_on_after_what_is_thrown() {
  static Driver driver;
  driver.cuThreadExchangeStreamCaptureMode = [](int*) { return CUDA_SUCCESS; };
  driver.cuCtxSetCurrent = [](CUcontext) { return CUDA_SUCCESS; };
  static Reaper& reaper = *new Reaper(driver);
  std::atomic<bool> done{false};
  reaper.submit(nullptr, [] { throw std::bad_alloc(); });
  const uint64_t number = reaper.submit(nullptr, [&] { done = true; });
  CHECK(reaper.wait(number, std::chrono::minutes(1)));
  CHECK(done);
  const Reaper::Undisturbed undisturbed(reaper);
  CHECK(undisturbed);  // no long call is taken to be under way
}

}  // namespace

int main() {
  helper_goes_on_after_what_is_thrown();
  reaper_goes_on_after_what_is_thrown();
}
