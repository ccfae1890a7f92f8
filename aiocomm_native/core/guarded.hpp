// Where a thread of ours begins, or what it does for others: no exception leaves it.
#pragma once

#include <exception>

namespace aiocomm {

// `failed` is told, as text, what `f` throws.
void guarded(auto&& f, auto&& failed) noexcept {
  try {
    f();
  } catch (const std::exception& error) {
    failed(error.what());
  } catch (...) {
    failed("an unknown error");
  }
}

}  // namespace aiocomm
