// All CPU kernels, for one instruction set. Each of cpu_*.cpp includes this file once, after switching the set on and
// defining VISUALRWKV_SET (the namespace) and VISUALRWKV_BYTES (the width of a vector).
#pragma once

#include "wkv6_cpu_kernel.h"

#include "step_cpu_kernel.h"

#include "prefill_cpu_kernel.h"
