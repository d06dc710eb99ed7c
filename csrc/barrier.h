// Threads that wait for each other by looking, for phases that last microseconds.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <thread>

namespace visualrwkv {

class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    int looks = 0;
    std::chrono::steady_clock::time_point begin;
    for (; round_.load(std::memory_order_acquire) == round; looks++) {
      if (given_up_.load(std::memory_order_relaxed)) throw std::runtime_error("another thread has failed");
      if (looks == LONG) begin = std::chrono::steady_clock::now();
      if (looks > 20 * LONG) std::this_thread::yield();  // somebody else has this thread's partner's core
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    if (looks > LONG) waited_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
  }

  // Nanoseconds of long waits, of all threads together.
  int64_t waited() const { return waited_; }

  // A thread that fails will not arrive: the others shall not wait for it.
  void give_up() { given_up_.store(true, std::memory_order_relaxed); }

 private:
  static constexpr int LONG = 1000;  // looks
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
  alignas(64) std::atomic<bool> given_up_{false};
  std::atomic<int64_t> waited_{0};
};

}  // namespace visualrwkv
