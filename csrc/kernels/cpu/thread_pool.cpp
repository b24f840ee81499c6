// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/thread_pool.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "common/error.hpp"

namespace kvxfer::kernels::cpu {
namespace {

// Grow-only, and given up with its thread.
class Buffer {
 public:
  void* at_least(int64_t nbytes) {
    if (nbytes > size_) {
      const auto rounded = static_cast<size_t>((nbytes + 63) / 64 * 64);
      void* fresh = std::aligned_alloc(64, rounded);
      if (fresh == nullptr) throw std::bad_alloc();
      memory_.reset(fresh);
      size_ = static_cast<int64_t>(rounded);
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

thread_local Buffer scratch_buffer, result_buffer;

struct Job {
  int64_t count, scratch_nbytes;
  const std::function<void(int64_t, void*)>* body;
  std::atomic<int64_t> next{0};  // the next index to take; relaxed: it hands out numbers, no data
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() noexcept {
    try {
      void* scratch = scratch_buffer.at_least(scratch_nbytes);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        (*body)(i, scratch);
      }
    } catch (...) {
      next.store(count, std::memory_order_relaxed);  // nobody takes more
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  explicit Pool(int helpers) {
    threads_.reserve(static_cast<size_t>(helpers));
    try {
      for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { serve(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Pool() { stop(); }
  int helpers() const { return static_cast<int>(threads_.size()); }

  void run(Job& job) {
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      ++generation_;
      active_ = helpers();
    }
    wake_.notify_all();
    job.work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
  }

 private:
  void serve() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) return;
      seen = generation_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int active_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

int usable_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::atomic<int> wanted_threads{
    0};  // 0: as many as the process may run on. Written by set_num_threads, read by calls
std::mutex pool_mutex;  // held while a job runs; try_lock'd, never waited for
Pool* pool = nullptr;   // guarded by pool_mutex; leaked at exit, where joining could hang
pid_t pool_pid = 0;     // a forked child inherits the object but none of its threads

}  // namespace

void set_num_threads(int num_threads) {
  if (num_threads < 1 || num_threads > 1024) {
    fail(Code::kInvalidArgument, "num_threads: expected 1 to 1024, given ", num_threads);
  }
  wanted_threads.store(num_threads, std::memory_order_relaxed);
}

int get_num_threads() {
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  return wanted > 0 ? wanted : usable_cpus();
}

void parallel_for(int64_t count, int64_t scratch_nbytes, bool worth_waking,
                  const std::function<void(int64_t, void*)>& body) {
  if (count <= 0) return;
  Job job{count, scratch_nbytes, &body, {}, {}, {}};
  const int helpers = worth_waking && count > 1 ? get_num_threads() - 1 : 0;
  std::unique_lock lock(pool_mutex, std::defer_lock);
  if (helpers == 0 || !lock.try_lock()) {
    job.work();
  } else {
    if (pool_pid != getpid())
      pool = nullptr, pool_pid = getpid();  // after fork: leave the parent's to it
    if (pool != nullptr && pool->helpers() != helpers) {
      delete pool;
      pool = nullptr;
    }
    if (pool == nullptr) pool = new Pool(helpers);
    pool->run(job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

void* caller_buffer(int64_t nbytes) { return result_buffer.at_least(nbytes); }

}  // namespace kvxfer::kernels::cpu
