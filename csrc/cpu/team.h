// One parallel region a call. Work comes in items (images, or blocks of rows of one); while there are at least as many items as
// threads, each thread takes whole items; the rest are worked on by all threads together, in phases of units. How work is split never changes the order
// of any sum, so results do not depend on the number of threads.
#pragma once
#include <omp.h>
#include <sched.h>
#include <time.h>

#include "simd.h"

namespace lowkernels::LOWKERNELS_ISA {

LK_INLINE void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

LK_INLINE double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

struct Shared {
    alignas(64) i64 items = 0;
    alignas(64) i64 taken = 0;  // units handed out and done, over all phases so far
    alignas(64) i64 done = 0;
};

struct Team {
    int size;
    int rank;
    Shared* shared;
    char* item;     // scratch of the item at hand, seen by the whole team
    char* own;      // scratch of this thread
    i64 until = 0;  // units of all phases so far, this one included
    i64 mine = 0;   // of them, those this thread did
    double waited = 0;  // seconds spent waiting for others, where it was long

    // One phase: f(unit, next) for every unit; `next` is the unit this thread will have after it, so that its data can be prefetched,
    // or -1 where that is open. Units are handed out one by one: a thread that shares its core takes fewer. Returns when all units are done, whoever
    // did them: a thread that comes late, or not at all, is not waited for.
    template <class F>
    void run(i64 units, const F& f) {
        if (size == 1) {
            for (i64 unit = 0; unit < units; ++unit) f(unit, unit + 1 < units ? unit + 1 : -1);
            return;
        }
        const i64 start = until;
        until += units;
        i64 unit = take();
        while (unit >= 0) {
            // To know the next unit is to hold it: only while there are enough for everybody.
            const bool plenty = until - __atomic_load_n(&shared->taken, __ATOMIC_RELAXED) >= size;
            const i64 next = plenty ? take() : -1;
            f(unit - start, next >= 0 ? next - start : -1);
            ++mine;
            __atomic_fetch_add(&shared->done, 1, __ATOMIC_ACQ_REL);
            unit = next >= 0 ? next : take();
        }
        for (int spins = 0; __atomic_load_n(&shared->done, __ATOMIC_ACQUIRE) < until; ++spins) {
            if (spins == 2000) return yield();
            relax();
        }
    }

private:
    // The thread waited for may need this very core.
    void yield() {
        const double start = seconds();
        while (__atomic_load_n(&shared->done, __ATOMIC_ACQUIRE) < until) sched_yield();
        waited += seconds() - start;
    }

    i64 take() {
        i64 next = __atomic_load_n(&shared->taken, __ATOMIC_RELAXED);
        while (next < until)
            if (__atomic_compare_exchange_n(&shared->taken, &next, next + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return next;
        return -1;
    }
};

// Hands out pieces of a scratch area; with a null base it only counts.
struct Arena {
    char* base;
    i64 used = 0;

    explicit Arena(char* base) : base(base) {}

    template <class T>
    T* take(i64 count) {
        T* piece = reinterpret_cast<T*>(base + used);
        used += round_up(count * i64(sizeof(T)), 64) + 64;
        return piece;
    }
};

// before(team, common), by all threads together, then work(team, common, item) for each item. `item_bytes` and `own_bytes` are the
// scratch of an item and of a thread; the `common_bytes` stay for the whole call.
template <class Before, class Work>
void parallel(const Context& context, i64 items, i64 common_bytes, i64 item_bytes, i64 own_bytes, const Before& before,
              const Work& work) {
    const int threads = context.helpers->alone > 0 ? 1 : context.threads;
    common_bytes = round_up(common_bytes, 64) + 64;
    item_bytes = round_up(item_bytes, 64) + 64;
    own_bytes = round_up(own_bytes, 64) + 64;
    char* common = static_cast<char*>(context.workspace(common_bytes + item_bytes + threads * (item_bytes + own_bytes)));
    char* together = common + common_bytes;
    char* alone = together + item_bytes;
    Shared shared;
    // The calling thread's part of the work, and the seconds it waited for others before all was done.
    double share = 1, waited = 0, finished = 0;
    auto body = [&](int size, int rank) {
        char* own = alone + rank * (item_bytes + own_bytes);
        Team solo{1, rank, &shared, own + own_bytes, own};
        Team team{size, rank, &shared, together, own};
        before(team, common);
        const i64 single = size == 1 ? items : items - items % size;
        i64 mine = 0;
        for (;; ++mine) {
            i64 item = __atomic_fetch_add(&shared.items, 1, __ATOMIC_RELAXED);
            if (item >= single) break;
            work(solo, common, item);
        }
        for (i64 item = single; item < items; ++item) work(team, common, item);
        if (rank == 0 && size > 1) {
            share = single == items ? double(mine) / double(items) : double(team.mine) / double(team.until);
            waited = team.waited;
            finished = seconds();
        }
    };
    if (threads == 1) {
        if (context.helpers->alone > 0) --context.helpers->alone;
        body(1, 0);
        return;
    }
    const double start = seconds();
#pragma omp parallel num_threads(threads)
    body(omp_get_num_threads(), omp_get_thread_num());
    // A thread whose core is taken by another process cannot even leave the region before it has run again, milliseconds later. When
    // that costs more than the help was worth, the next calls are made alone, twice as many each time.
    if (finished == 0) return;
    const double end = seconds(), busy = finished - start - waited;
    if (end - start > 1.25 * busy / (share > 0.01 ? share : 0.01) + 50e-6) {
        context.helpers->backoff = context.helpers->backoff == 0 ? 4 : int(smaller(256, 2 * context.helpers->backoff));
        context.helpers->alone = context.helpers->backoff;
    } else if (context.helpers->backoff > 0) {
        context.helpers->backoff /= 2;
    }
}

}  // namespace lowkernels::LOWKERNELS_ISA
