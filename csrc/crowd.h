// When one thread is faster than a team. Free of PyTorch headers.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>

namespace visualrwkv {

// Nanoseconds for which this thread has had a core, or the time where the system does not tell.
inline int64_t core_time() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
#else
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

// Threads of a team wait for each other dozens of times in a call. Where other programs want the cores too, one of them has
// none every few milliseconds, and all others wait for it; one thread alone would be done sooner. This notices it by what a
// team has computed in its time, lets the next calls have one thread, and a team try again: soon at first, then later and
// later as long as it is no better.
class Crowd {
 public:
  // Whether the next call shall have one thread.
  bool takes_one() {
    int left = alone_.load(std::memory_order_relaxed);
    while (left > 0 && !alone_.compare_exchange_weak(left, left - 1, std::memory_order_relaxed)) {
    }
    return left > 0;
  }

  // A team was done after `wall` nanoseconds, in which its threads computed for `work` nanoseconds, all together.
  void took(int64_t wall, int64_t work) {
    const bool worse = 10 * work < 7 * wall;
    const int level = level_.load(std::memory_order_relaxed);
    const int next = worse ? std::min(level + 2, 5) : std::max(level - 1, 0);
    level_.store(next, std::memory_order_relaxed);
    if (worse) alone_.store(1 << next, std::memory_order_relaxed);
  }

 private:
  std::atomic<int> alone_{0};  // calls that still have one thread
  std::atomic<int> level_{0};
};

}  // namespace visualrwkv
