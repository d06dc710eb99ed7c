// The CUDA kernels as functions of this machine, for test_cuda_emulation.py.

#include "cuda_emulation.h"

#include "../csrc/wkv6_cuda.cu"

namespace {

using namespace visualrwkv;

Rows dense(void* data, int type, int64_t time, int64_t heads, int64_t size) {
  return Rows{static_cast<char*>(data), static_cast<Type>(type), time * heads * size, heads * size, size};
}

// Scratch memory starts as NaN as well.
std::vector<float> scratch(int64_t count) { return std::vector<float>(count, NAN); }

}  // namespace

extern "C" {

struct Call {
  int64_t batch, time, heads, size;
  int64_t multiprocessors;        // decides how many segments there are
  int64_t descending;             // the order of the threads
  int64_t type, kv_type, w_type;  // of r, y and their gradients; of k and v; of w
  void *r, *k, *v, *w;
  float *u, *state;
  void* y;
  float* final_state;
  void* dy;
  float* dfinal;
  void *dr, *dk, *dv, *dw;
  float *du, *dstate;
};

static void set_problem(Problem<float>& p, const Call& c) {
  const auto rows = [&](void* data, int type) { return dense(data, type, c.time, c.heads, c.size); };
  p.batch = c.batch, p.time = c.time, p.heads = c.heads, p.size = c.size;
  p.r = rows(c.r, c.type), p.k = rows(c.k, c.kv_type), p.v = rows(c.v, c.kv_type), p.w = rows(c.w, c.w_type);
  p.u = c.u, p.state = c.state;
  emulation::descending = c.descending;
}

int64_t segments(const Call* c) {
  cuda::ForwardProblem p;
  set_problem(p, *c);
  return cuda::make_plan(p, Rows{}, c->multiprocessors).segments;
}

const char* forward(const Call* c) {
  cuda::ForwardProblem p;
  set_problem(p, *c);
  p.plan = cuda::make_plan(p, Rows{}, c->multiprocessors);
  p.y = dense(c->y, c->type, c->time, c->heads, c->size);
  p.final_state = c->final_state;
  const int64_t segments = p.plan.matrices * p.plan.segments;
  auto states = scratch(segments * c->size * c->size), decays = scratch(segments * c->size);
  p.states = states.data(), p.decays = decays.data();
  return cuda::forward(p, c->multiprocessors, nullptr);
}

const char* backward(const Call* c) {
  cuda::BackwardProblem p;
  set_problem(p, *c);
  const auto rows = [&](void* data, int type) { return dense(data, type, c->time, c->heads, c->size); };
  p.dy = c->dy ? rows(c->dy, c->type) : Rows{};
  p.dr = rows(c->dr, c->type), p.dk = rows(c->dk, c->kv_type), p.dv = rows(c->dv, c->kv_type), p.dw = rows(c->dw, c->w_type);
  p.dfinal = c->dfinal, p.dstate = c->dstate;
  p.plan = cuda::make_plan(p, p.dy, c->multiprocessors);
  const int64_t square = c->size * c->size, segments = p.plan.matrices * p.plan.segments;
  auto states = scratch(segments * square), dstates = scratch(segments * square), decays = scratch(segments * c->size);
  auto checkpoints = scratch(p.plan.matrices * p.plan.spans * square);
  auto products = scratch(p.plan.matrices * c->time * c->size), du = scratch(segments * c->size);
  p.states = states.data(), p.dstates = dstates.data(), p.decays = decays.data();
  p.checkpoints = checkpoints.data(), p.products = products.data(), p.du = du.data();
  const char* error = cuda::backward(p, nullptr);
  for (int64_t i = 0; i < c->heads * c->size; ++i) c->du[i] = 0;
  for (int64_t i = 0; i < segments * c->size; ++i)
    c->du[i / c->size / p.plan.segments % c->heads * c->size + i % c->size] += du[i];
  return error;
}

}  // extern "C"
