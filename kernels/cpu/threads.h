// A team of threads that is made once. Between two runs its members sleep; within a run they take shares of the work.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
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

    static constexpr int most_parts = 4;

    // Calls work(phase, share) for every share of every phase, those of a phase once all of the one before are done, and
    // returns when all are. There are `parts` shares (1, 2 or 4) for each member, which takes its own, then those that nobody
    // has begun: cores may differ in speed, and where others use the machine a member may be without one for longer than the
    // whole run takes, and nobody waits for more than what it has begun. Where waiting for such a member takes many times as
    // long as the work, the caller works alone for a while. An exception in a member ends the program: kernels throw none.
    void run(int phases, int parts, const std::function<void(int, Share)>& work);

  private:
    using Clock = std::chrono::steady_clock;

    struct alignas(64) Claims {
        std::atomic<int64_t> phases{0};  // in which a share was taken
    };

    void serve(int index);
    void work_on(int index);
    bool take_share(int index, int64_t phase);
    void wait_for(int64_t phase, Clock::time_point begun, bool is_caller);
    void leave_members(Clock::time_point now);
    void call_members();
    int64_t phase() const { return done_.load(std::memory_order_acquire) / (count_ * most_parts); }
    bool is_idle() const;

    // Counted over all runs, so that a member that comes late finds what goes on now, and never the run that it missed.
    const int count_;
    std::unique_ptr<Claims[]> claims_;  // of each share, as many as there may be
    std::atomic<int> parts_{1};         // shares of each member in the run that goes on
    std::atomic<int64_t> done_{0};      // most_parts for each member and phase
    std::atomic<int64_t> end_{0};       // phases, with those of the run that goes on
    int64_t first_ = 0;                 // phase of the run that goes on
    const std::function<void(int, Share)>* work_ = nullptr;

    // The caller works alone, until when, and for how long it does each time.
    std::atomic<bool> alone_{false};
    Clock::time_point alone_until_{};
    Clock::duration alone_for_{};

    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

}  // namespace lensc
