#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace vitrail {
namespace {

// How long a worker without work stays awake: some 30 microseconds at full attention, and then some
// 200 in which it leaves the core to whoever asks, e.g. torch's own threads. Most gaps between two
// matmuls of a layer are shorter, and to wake a thread takes as long as a small matmul.
constexpr int kSpins = 1000;
constexpr int kYields = 500;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int count, int threads, Task task, const void* context) {
    const int helpers = std::min(threads, count) - 1;
    std::unique_lock<std::mutex> use(in_use_, std::defer_lock);
    if (helpers < 1 || inside_ || !use.try_lock()) {
      for (int index = 0; index < count; ++index) task(context, index);
      return;
    }
    const int seats = std::min(helpers, grow(helpers));
    task_ = task;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    seats_.store(seats);  // from here on workers may join
    if (asleep_.load() > 0) {
      sleep_.lock();  // held by a worker between its last look at the seats and its wait
      sleep_.unlock();
      wake_.notify_all();
    }
    inside_ = true;
    work();
    inside_ = false;
    const int joined = seats - seats_.exchange(0);  // nobody joins any more
    for (int spins = 0; finished_.load(std::memory_order_acquire) < joined; ++spins) {
      spins < kSpins ? relax() : std::this_thread::yield();
    }
  }

 private:
  // The number of workers, after starting those that are missing, as far as the system lets us.
  int grow(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
    return workers_;
  }

  void work() {
    for (int index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      task_(context_, index);
    }
  }

  void serve() {
    inside_ = true;
    while (true) {
      wait_for_seat();
      int seats = seats_.load();
      while (seats > 0 && !seats_.compare_exchange_weak(seats, seats - 1)) {
      }
      if (seats > 0) {
        work();
        finished_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  void wait_for_seat() {
    for (int turn = 0; turn < kSpins + kYields; ++turn) {
      if (seats_.load(std::memory_order_relaxed) > 0) return;
      turn < kSpins ? relax() : std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [this] { return seats_.load() > 0; });
    asleep_.fetch_sub(1);
  }

  std::mutex in_use_;
  std::mutex sleep_;
  std::condition_variable wake_;
  int workers_ = 0;  // guarded by in_use_

  // One job at a time: written before `seats_` opens, read by those who took a seat.
  Task task_ = nullptr;
  const void* context_ = nullptr;
  int count_ = 0;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<int> seats_{0};
  alignas(64) std::atomic<int> finished_{0};
  std::atomic<int> asleep_{0};

  static thread_local bool inside_;
};

thread_local bool Pool::inside_ = false;

// Never destroyed: workers wait in it until the process ends.
std::atomic<Pool*> pool{nullptr};

void forget_pool() {
  pool.store(new Pool);
}  // a child has none of its parent's threads, and its locks may be held

Pool& the_pool() {
  static const bool created = [] {
    pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, forget_pool);
    return true;
  }();
  (void)created;
  return *pool.load();
}

}  // namespace

void run_tasks(int count, int threads, Task task, const void* context) {
  the_pool().run(count, threads, task, context);
}

}  // namespace vitrail
