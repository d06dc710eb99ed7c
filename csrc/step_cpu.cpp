// The kernels of decoding in plain vectors of 16 bytes, as every processor has them.

#include "step_cpu.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#define VISUALRWKV_BYTES 16
#define VISUALRWKV_SET plain
#include "step_cpu_kernel.h"
