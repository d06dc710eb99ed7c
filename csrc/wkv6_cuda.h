// What the operator (wkv6_cuda.cpp, compiled by the C++ compiler) hands to the kernels (wkv6_cuda.cu, by nvcc).
#pragma once

#include "wkv6_problem.h"

namespace visualrwkv::cuda {

constexpr int chunk_length = 16;

// How the sequences are cut. A chunk is what one step of a block of threads works on. A segment is a run of chunks that
// one block walks through; with more than one segment for a sequence a first pass over all of them finds the states in
// between. A span is the stretch of a segment after which the backward pass keeps the state: a chunk where results are
// wanted as precise as float32 allows (`exact`: not all rows are bfloat16), a few where they are rounded to bfloat16.
struct Plan {
  int64_t matrices;  // batch * heads
  int chunks, segments, segment_chunks, span_chunks, spans;
  bool exact;
};

Plan make_plan(const Problem<float>& p, const Rows& dy, int multiprocessors);  // forward: without dy

// Scratch memory is float; S = segments, N = head size. What belongs to segments is not touched where there is one.
struct ForwardProblem : Forward<float> {
  Plan plan;
  float* states;  // (matrices, S, N, N): at the start of each segment
  float* decays;  // (matrices, S, N): of each segment as a whole
};

struct BackwardProblem : Backward<float> {  // du: (matrices, S, N)
  Plan plan;
  float *states, *decays;
  float* dstates;      // (matrices, S, N, N): gradients of the states at the end of each segment
  float* checkpoints;  // (matrices, spans, N, N): states at the end of each span
  float* products;     // (matrices, time, N): see receptance_kernel
};

bool has_kernels(int64_t size);  // whether the head size is one of those compiled

// Both return null, or what went wrong. They only launch kernels, into the stream (a cudaStream_t).
const char* forward(const ForwardProblem& p, int multiprocessors, void* stream);
const char* backward(const BackwardProblem& p, void* stream);

}  // namespace visualrwkv::cuda
