// What the CPU kernels include of others, before an instruction set is switched on: inline functions of these may be
// shared with code that runs everywhere.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#include "prefill_cpu.h"
#include "step_cpu.h"
#include "wkv6_cpu.h"
