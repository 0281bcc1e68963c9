#include "threads.h"

#include <algorithm>

namespace lensc {

namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// About 50 us: what lies between two tokens of a decoder is shorter, and an idle session soon stops burning a core.
constexpr int spins_before_sleep = 2000;
// Who waits for a share waits for somebody that computes. Beyond this that member has lost its core, perhaps to this thread.
constexpr int spins_before_yield = 1000;

// A core that was given away for so long was wanted by others, and if that is so many times what the work took, two members
// that wait for each other are slower than one. After the first time the caller tries again soon, then later and later.
constexpr auto long_lost = std::chrono::microseconds(500);
constexpr int lost_to_work = 4;
constexpr std::chrono::steady_clock::duration least_alone = std::chrono::milliseconds(50), most_alone = std::chrono::seconds(2);

}  // namespace

Team::Team(int count) : count_(count), claims_(std::make_unique<Claims[]>(static_cast<size_t>(count * most_parts))) {
    for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { serve(i); });
}

Team::~Team() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_.store(true);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Team::run(int phases, int parts, const std::function<void(int, Share)>& work) {
    first_ = end_.load(std::memory_order_relaxed);
    work_ = &work;
    // A member that comes late to an earlier phase finds no share of it left, also among those that it did not have.
    for (int share = 0; share < count_ * most_parts; share++) claims_[share].phases.store(first_, std::memory_order_relaxed);
    parts_.store(parts, std::memory_order_release);
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        end_.store(first_ + phases, std::memory_order_release);
    }
    wake_.notify_all();
    work_on(0);
}

// Until all phases are done; another member than the caller, until it is not wanted.
void Team::work_on(int index) {
    while (true) {
        const int64_t phase = this->phase();
        if (phase >= end_.load(std::memory_order_acquire)) return;
        if (index != 0 && alone_.load(std::memory_order_relaxed)) return;
        const Clock::time_point begun = index == 0 && count_ > 1 ? Clock::now() : Clock::time_point();
        if (index == 0 && alone_.load(std::memory_order_relaxed) && begun >= alone_until_) call_members();
        while (take_share(index, phase)) {
        }
        wait_for(phase, begun, index == 0);
    }
}

// A share of `phase` that nobody has taken, the member's own first. The phase may have ended meanwhile: then all are taken.
bool Team::take_share(int index, int64_t phase) {
    const int parts = parts_.load(std::memory_order_acquire), shares = count_ * parts;
    for (int i = 0; i < shares; i++) {
        const int share = (index * parts + i) % shares;
        int64_t taken = phase;
        if (!claims_[share].phases.compare_exchange_strong(taken, phase + 1, std::memory_order_acq_rel)) continue;
        (*work_)(static_cast<int>(phase - first_), {share, shares, index});
        done_.fetch_add(most_parts / parts, std::memory_order_acq_rel);
        return true;
    }
    return false;
}

// Until those that took the other shares of `phase` have done them. `begun`: when the caller began with its own.
void Team::wait_for(int64_t phase, Clock::time_point begun, bool is_caller) {
    for (int spins = 0; this->phase() == phase; spins++) {
        if (spins < spins_before_yield) {
            pause_briefly();
            continue;
        }
        const Clock::time_point before = is_caller ? Clock::now() : Clock::time_point();
        std::this_thread::yield();
        if (!is_caller || alone_.load(std::memory_order_relaxed)) continue;
        // Where nobody else wants the core, it comes back at once.
        const Clock::time_point now = Clock::now();
        if (now - before > long_lost && now - before > lost_to_work * (before - begun)) leave_members(now);
    }
}

void Team::leave_members(Clock::time_point now) {
    const bool again = now - alone_until_ < alone_for_;
    alone_for_ = again ? std::min(2 * alone_for_, most_alone) : least_alone;
    alone_until_ = now + alone_for_;
    alone_.store(true, std::memory_order_relaxed);
}

void Team::call_members() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        alone_.store(false, std::memory_order_relaxed);
    }
    wake_.notify_all();
}

// Nothing is to be done, or not by others than the caller.
bool Team::is_idle() const {
    return alone_.load(std::memory_order_relaxed) ||
           phase() >= end_.load(std::memory_order_acquire);
}

void Team::serve(int index) {
    while (!stop_.load()) {
        for (int spins = 0; spins < spins_before_sleep && is_idle(); spins++) pause_briefly();
        if (is_idle()) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_.load() || !is_idle(); });
        }
        work_on(index);
    }
}

}  // namespace lensc
