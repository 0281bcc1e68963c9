// A team of threads that is made once. Between two runs its members sleep; within a run they meet at barriers, spinning.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "share.h"

namespace lensc {

class Team {
  public:
    // The calling thread is member 0, so count - 1 threads are started. None is pinned: a member bound to the processor that
    // the caller happens to run on takes turns with it there, while another idles.
    explicit Team(int count);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int count() const { return count_; }

    // Calls work(Share) in every member and returns when all are done. An exception in a member ends the program: kernels
    // throw none.
    void run(const std::function<void(Share)>& work);

    // Called by every member within a run: returns when all have called it.
    void barrier();

  private:
    void serve(int index);

    const int count_;
    std::atomic<int> arrived_{0}, round_{0};  // of the barrier
    std::atomic<unsigned> generation_{0};     // of runs
    std::atomic<int> working_{0};
    std::atomic<bool> stop_{false};
    const std::function<void(Share)>* work_ = nullptr;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

}  // namespace lensc
