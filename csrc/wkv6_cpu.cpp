// The CPU kernels in plain vectors of 16 bytes, as every processor has them, and in double precision.

#include "wkv6_cpu.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#define VISUALRWKV_BYTES 16
#define VISUALRWKV_SET plain
#define VISUALRWKV_DOUBLE
#include "wkv6_cpu_kernel.h"
