// A GPU in plain C++, for tests: it runs the kernels of csrc/*.cuh unchanged, slowly, on any machine.
//
// Every thread of a block is a fiber. A fiber runs until it waits for others (a barrier, an exchange between the lanes
// of a warp, a product on the tensor cores); then the next one runs, in ascending or descending order: results that
// differ between the two orders, or are NaN, come from a missing barrier. Shared memory starts as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define VISUALRWKV_EMULATION
#define __device__
#define __global__
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulation {

struct Index {
  unsigned x;
};

struct Words {
  uint32_t word[6];
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool finished;
  int exchanges, votes;  // how often it took part, to tell the turns of the buffers below apart
};

struct Barrier {
  int members, arrived, completed;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<std::vector<Words>> exchanged[2];  // of each warp and lane
  int votes[3];
  std::vector<float4> shared;
  ucontext_t scheduler;
  std::function<void()> kernel;
  unsigned running;
  int64_t events;  // arrivals at barriers and ends of threads
};

inline Block block;
inline bool descending = false;
constexpr size_t stack_size = 128 * 1024;

inline void wait(Barrier& barrier) {
  ++block.events;
  const int turn = barrier.completed;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.completed;
  }
  while (barrier.completed == turn) swapcontext(&block.threads[block.running].context, &block.scheduler);
}

// What each lane of the warp hands in, once all have.
inline const std::vector<Words>& exchange(const Words& mine) {
  const unsigned warp = block.running / 32, lane = block.running % 32;
  std::vector<Words>& words = block.exchanged[block.threads[block.running].exchanges++ % 2][warp];
  words[lane] = mine;
  wait(block.warps[warp]);
  return words;
}

inline void run_thread() {
  block.kernel();
  block.threads[block.running].finished = true;
  ++block.events;
}

inline void run_block(unsigned count, size_t shared_bytes) {
  block.threads.resize(count);
  block.warps.assign(count / 32, Barrier{32, 0, 0});
  block.all = Barrier{static_cast<int>(count), 0, 0};
  for (auto& buffer : block.exchanged) buffer.assign(count / 32, std::vector<Words>(32));
  std::memset(block.votes, 0, sizeof(block.votes));
  block.shared.resize(shared_bytes / sizeof(float4) + 1);
  std::memset(block.shared.data(), 0xff, block.shared.size() * sizeof(float4));
  for (Thread& thread : block.threads) {
    thread.stack.resize(stack_size);
    thread.finished = false;
    thread.exchanges = thread.votes = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = stack_size;
    thread.context.uc_link = &block.scheduler;
    makecontext(&thread.context, run_thread, 0);
  }
  for (unsigned left = count; left > 0;) {
    const int64_t before = block.events;
    for (unsigned i = 0; i < count; ++i) {
      block.running = descending ? count - 1 - i : i;
      Thread& thread = block.threads[block.running];
      if (thread.finished) continue;
      swapcontext(&block.scheduler, &thread.context);
      if (thread.finished) --left;
    }
    if (block.events == before) {
      std::fprintf(stderr, "threads wait for others that never come\n");
      std::abort();
    }
  }
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return block.running; }
  } x;
};

}  // namespace emulation

inline emulation::ThreadIndex threadIdx;
inline emulation::Index blockIdx;

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void __syncthreads() { emulation::wait(emulation::block.all); }

inline int __syncthreads_or(int vote) {
  auto& block = emulation::block;
  const int turn = block.threads[block.running].votes++;
  block.votes[turn % 3] |= vote;
  emulation::wait(block.all);
  block.votes[(turn + 2) % 3] = 0;
  return block.votes[turn % 3];
}

inline void __syncwarp() { emulation::wait(emulation::block.warps[emulation::block.running / 32]); }

inline float __shfl_sync(unsigned, float x, int lane) {
  return __uint_as_float(emulation::exchange({{__float_as_uint(x)}})[lane].word[0]);
}

inline float __shfl_xor_sync(unsigned mask, float x, int other) {
  return __shfl_sync(mask, x, static_cast<int>(emulation::block.running % 32) ^ other);
}

inline unsigned __ballot_sync(unsigned, int vote) {
  unsigned lanes = 0, bit = 1;
  for (const emulation::Words& words : emulation::exchange({{static_cast<uint32_t>(vote != 0)}})) {
    if (words.word[0]) lanes |= bit;
    bit *= 2;
  }
  return lanes;
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

#define VISUALRWKV_SHARED(type, name)                                                      \
  static_assert(alignof(type) <= 16, "shared memory is aligned to 16 bytes");              \
  if (sizeof(type) > emulation::block.shared.size() * sizeof(float4)) std::abort();        \
  type& name = *reinterpret_cast<type*>(emulation::block.shared.data())

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace visualrwkv::cuda {

inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// How tensor cores add up, after "Numerical behavior of NVIDIA tensor cores" (Fasi, Higham, Mikaitis, Pranesh; PeerJ
// Computer Science 7:e330, 2021; V100, T4, A100): the products of a group and the accumulator are cut off at one place,
// counted from the leading bit of the largest, and so is their sum where it leaves float32. All is rounded toward zero.
// The size of the groups and the extra bits are assumptions (errors are larger with 4 than with 8 and with 2 than with
// 1): they have to be measured on a device.
constexpr int products_at_once = 4, extra_bits = 2;

inline float sum_toward_zero(const double (&terms)[products_at_once + 1]) {
  double plain = 0.0, largest = 0.0;
  for (double term : terms) plain += term, largest = std::max(largest, std::fabs(term));
  if (!std::isfinite(plain)) return static_cast<float>(plain);
  // The last bit's place; where numbers are smaller than float32's normal ones it stays where it is.
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest), -126) - 23 - extra_bits);
  int64_t units = 0;
  for (double term : terms) units += static_cast<int64_t>(term / unit);
  const double exact = static_cast<double>(units) * unit;
  const float nearest = static_cast<float>(exact);
  return std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

// The layout of the operands is that of the PTX manual, figures of mma.m16n8k8 with .tf32.
inline void tensor_core_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto& lanes = emulation::exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
  const int lane = emulation::block.running % 32;
  const auto read = [](uint32_t bits) { return __uint_as_float(bits & 0xffffe000); };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    for (int first = 0; first < 8; first += products_at_once) {
      double terms[products_at_once + 1] = {d[e]};
      for (int i = 0; i < products_at_once; ++i) {
        const int k = first + i;
        terms[i + 1] = static_cast<double>(read(lanes[row % 8 * 4 + k % 4].word[row / 8 + 2 * (k / 4)])) *
                       read(lanes[column * 4 + k % 4].word[4 + k / 4]);
      }
      d[e] = sum_toward_zero(terms);
    }
  }
}

inline float float_of_half(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | magnitude << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t half_of_float(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t rebiased = (bits & 0x7fffffff) - (112u << 23);
  return sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13;
}

inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename Kernel, typename Problem>
cudaError_t launch(Kernel* kernel, int64_t blocks, int threads, size_t shared, const Problem& p, void*) {
  emulation::block.kernel = [&] { kernel(p); };
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    emulation::run_block(threads, shared);
  }
  return cudaSuccess;
}

}  // namespace visualrwkv::cuda
