// What a native test of random histories asks for: the program ends where it is not so, and says by which seed.
#pragma once

#include <cstdio>
#include <cstdlib>

inline unsigned g_seed = 0;

#define CHECK(condition)                                                                             \
  do {                                                                                               \
    if (!(condition)) {                                                                              \
      std::fprintf(stderr, "%s:%d: not so: %s (seed %u)\n", __FILE__, __LINE__, #condition, g_seed); \
      std::abort();                                                                                  \
    }                                                                                                \
  } while (0)
