// Which of the CPU kernels a processor takes: those of PyTorch's own choice, so that its variable ATEN_CPU_CAPABILITY
// holds for them too.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace visualrwkv {

enum class InstructionSet { plain, avx2, avx512 };

inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet set = [] {
    const std::string capability = at::get_cpu_capability();
    return capability.rfind("AVX512", 0) == 0 ? InstructionSet::avx512
           : capability.rfind("AVX2", 0) == 0 ? InstructionSet::avx2
                                              : InstructionSet::plain;
  }();
  return set;
#else
  return InstructionSet::plain;
#endif
}

// `function` of the namespace of that set.
#if defined(__x86_64__)
#define VISUALRWKV_CHOOSE(...)                                            \
  (instruction_set() == InstructionSet::avx512 ? avx512::__VA_ARGS__      \
   : instruction_set() == InstructionSet::avx2 ? avx2::__VA_ARGS__        \
                                               : plain::__VA_ARGS__)
#else
#define VISUALRWKV_CHOOSE(...) plain::__VA_ARGS__
#endif

}  // namespace visualrwkv
