// One parallel region a call. Work comes in items (images, or blocks of rows of one); while there are at least as many items as
// threads, each thread takes whole items; the rest are worked on by all threads together, in phases of units. How work is split never
// changes the order of any sum, so results do not depend on the number of threads.
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

// What a thread of a team says to the others; each line is written by one of them again and again, and another's look at it costs that
// one some 200 ns where they share no cache. So nobody looks before he has nothing else to do.
struct Seat {
    alignas(64) i64 taken;  // phase << 32, plus units of this thread's share of it that were handed out
    alignas(64) i64 done;   // units this thread did, over all phases it has left
};

struct Team {
    int size;
    int rank;
    Seat* seats;
    char* item;     // scratch of the item at hand, seen by the whole team
    char* own;      // scratch of this thread
    i64 phase = 0;
    i64 until = 0;  // units of all phases so far, this one included
    i64 mine = 0;   // of them, those this thread did
    double waited = 0;  // seconds spent waiting for others, where it was long

    // One phase: f(unit, next) for every unit; `next` is the unit this thread will probably have after it, so that its data can be
    // prefetched, or -1. A thread has the same share of equal phases, so that what it wrote is still in its cache, and takes units of
    // others' shares when its own is done: a thread that shares its core does fewer. Returns when all units are done, whoever did them:
    // a thread that comes late, or not at all, is not waited for.
    template <class F>
    void run(i64 units, const F& f) {
        if (size == 1) {
            for (i64 unit = 0; unit < units; ++unit) f(unit, unit + 1 < units ? unit + 1 : -1);
            return;
        }
        ++phase;
        until += units;
        const i64 end = share(rank + 1, units);
        for (int i = 0; i < size; ++i) {
            const int owner = (rank + i) % size;
            for (i64 unit; (unit = take(owner, units)) >= 0; ++mine) f(unit, i == 0 && unit + 1 < end ? unit + 1 : -1);
        }
        __atomic_store_n(&seats[rank].done, mine, __ATOMIC_RELEASE);
        for (int spins = 0; !all_done(); ++spins) {
            if (spins == 500) return yield();
            relax();
        }
    }

private:
    i64 share(int owner, i64 units) const { return owner * units / size; }

    bool all_done() const {
        i64 done = 0;
        for (int i = 0; i < size; ++i) done += __atomic_load_n(&seats[i].done, __ATOMIC_ACQUIRE);
        return done >= until;
    }

    // The thread waited for may need this very core.
    void yield() {
        const double start = seconds();
        while (!all_done()) sched_yield();
        waited += seconds() - start;
    }

    // The next unit of a thread's share, or -1.
    i64 take(int owner, i64 units) {
        const i64 first = share(owner, units), count = share(owner + 1, units) - first, none = phase << 32;
        i64* const at = &seats[owner].taken;
        i64 taken = __atomic_load_n(at, __ATOMIC_RELAXED);
        for (;;) {
            // That of an earlier phase is as good as none; that of a later one says that this phase is over.
            const i64 index = taken > none ? taken - none : 0;
            if (index >= count) return -1;
            if (__atomic_compare_exchange_n(at, &taken, none + index + 1, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return first + index;
        }
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
    const i64 seat_bytes = threads * i64(sizeof(Seat));
    Seat* seats = static_cast<Seat*>(context.workspace(seat_bytes + common_bytes + item_bytes + threads * (item_bytes + own_bytes)));
    std::memset(seats, 0, seat_bytes);
    char* common = reinterpret_cast<char*>(seats) + seat_bytes;
    char* together = common + common_bytes;
    char* alone = together + item_bytes;
    i64 taken = 0;  // items handed out
    // The calling thread's part of the work, and the seconds it waited for others before all was done.
    double share = 1, waited = 0, finished = 0;
    auto body = [&](int size, int rank) {
        char* own = alone + rank * (item_bytes + own_bytes);
        Team solo{1, rank, seats, own + own_bytes, own};
        Team team{size, rank, seats, together, own};
        before(team, common);
        const i64 single = size == 1 ? items : items - items % size;
        i64 mine = 0;
        for (;; ++mine) {
            i64 item = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
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
