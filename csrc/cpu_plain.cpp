// The CPU kernels in plain vectors of 16 bytes, as every processor has them, and the operator in double precision.

#include "cpu_headers.h"

#define VISUALRWKV_BYTES 16
#define VISUALRWKV_SET plain
#define VISUALRWKV_DOUBLE
#include "cpu_kernels.h"
