#include "threads.h"

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
// A barrier waits for others that compute. Beyond this one of them has lost its core, perhaps to this thread.
constexpr int spins_before_yield = 1000;

}  // namespace

Team::Team(int count) : count_(count) {
    for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { serve(i); });
}

Team::~Team() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_.store(true);
        generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Team::run(const std::function<void(Share)>& work) {
    if (count_ > 1) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            working_.store(count_ - 1);
            generation_.fetch_add(1);
        }
        wake_.notify_all();
    }
    work({0, count_});
    for (int spins = 0; working_.load(std::memory_order_acquire) != 0; spins++)
        spins < spins_before_yield ? pause_briefly() : std::this_thread::yield();
}

void Team::barrier() {
    if (count_ == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
        spins < spins_before_yield ? pause_briefly() : std::this_thread::yield();
}

void Team::serve(int index) {
    unsigned seen = 0;
    while (true) {
        for (int spins = 0; spins < spins_before_sleep && generation_.load(std::memory_order_acquire) == seen; spins++)
            pause_briefly();
        if (generation_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return generation_.load() != seen; });
        }
        seen = generation_.load(std::memory_order_acquire);
        if (stop_.load()) return;
        (*work_)({index, count_});
        working_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace lensc
