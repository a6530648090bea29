/* A team of threads that share the parts of one piece of work after another, and never wait for a thread that is not
 * running.
 *
 * Work is a row of phases, each of some parts.  Whoever is free takes the next part; a phase has ended when its parts are
 * done, not when all threads have come by.  So a thread that the system has taken off its core, for the API worker or
 * another program, delays the others by the part it holds at most, and by nothing when it holds none: it finds what it
 * missed done, and catches up.  With OpenMP's barriers every operation would wait for it, for milliseconds.
 */
#ifndef PERSIMMON_TEAM_H
#define PERSIMMON_TEAM_H

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256
#define MAX_PHASES 4096
/* How often an idle thread looks for work before it sleeps: some tens of microseconds. */
#define IDLE_SPINS 2000
/* Checks of whether a phase has ended before a waiting thread sleeps, for each thread of the team up to a limit: of two
 * threads, one that spins takes half of the machine; of many it takes little, and the missing part is usually done sooner
 * than they would wake.  PHASE_SLEEP_NS is the longest sleep. */
#define PHASE_SPINS 1000
#define MAX_SPINNING_THREADS 16
#define PHASE_SLEEP_NS 1000000

typedef struct {
    /* Which part is up, and in the upper half of which piece of work: a late thread takes nothing of another.  An even
     * number belongs to no work: the phase is being written. */
    _Atomic uint64_t next;
    _Atomic uint32_t parts;
    _Atomic uint32_t done;
} Phase;

typedef void (*RunPart)(const void *context, int64_t phase, int64_t part, int64_t thread);

typedef struct {
    RunPart run;
    const void *context;
    int64_t phases;
    int64_t threads;
} Work;

/* A thread may be late by any time, so what it looks at before it has a part is never freed; and as that may be the next
 * work by then, half written, all of it is atomic. */
static struct {
    pthread_mutex_t in_use;
    _Atomic uint32_t number; /* of the piece of work; even while the next one is being written */
    _Atomic uint32_t asleep;
    _Atomic uint32_t waiting; /* threads that sleep until a phase has ended */
    /* The fields of Work. */
    _Atomic RunPart run;
    const void *_Atomic context;
    _Atomic int64_t work_phases;
    _Atomic int64_t work_threads;
    Phase phases[MAX_PHASES];
    int64_t started;
    pid_t process;
} team = {.in_use = PTHREAD_MUTEX_INITIALIZER};

/* Makes a piece of work known, its number last; one caller at a time.
 *
 * Two orders matter to late threads.  A thread that sees a field of the new work also sees that `number` is no longer the
 * last work's.  And a phase belongs to no work before its parts change: a late thread of the last work that read the new
 * `parts` with the old `next` would take a part that no work has.  So each store is a release and each load an acquire,
 * which on x86 are plain moves.  ThreadSanitizer understands these, and would not understand fences. */
static void write_work(const Work *work, uint32_t number, const uint32_t *parts) {
    atomic_store(&team.number, number - 1);
    for (int64_t i = 0; i < work->phases; i++) {
        Phase *phase = team.phases + i;
        atomic_store_explicit(&phase->next, (uint64_t)(number - 1) << 32, memory_order_release);
        atomic_store_explicit(&phase->done, 0, memory_order_release);
        atomic_store_explicit(&phase->parts, parts[i], memory_order_release);
        atomic_store_explicit(&phase->next, (uint64_t)number << 32, memory_order_release);
    }
    atomic_store_explicit(&team.run, work->run, memory_order_release);
    atomic_store_explicit(&team.context, work->context, memory_order_release);
    atomic_store_explicit(&team.work_phases, work->phases, memory_order_release);
    atomic_store_explicit(&team.work_threads, work->threads, memory_order_release);
    atomic_store(&team.number, number);
}

/* Reads a piece of work; false if what was read may be another's. */
static int read_work(Work *work, uint32_t number) {
    work->run = atomic_load_explicit(&team.run, memory_order_acquire);
    work->context = atomic_load_explicit(&team.context, memory_order_acquire);
    work->phases = atomic_load_explicit(&team.work_phases, memory_order_acquire);
    work->threads = atomic_load_explicit(&team.work_threads, memory_order_acquire);
    return atomic_load_explicit(&team.number, memory_order_acquire) == number;
}

/* The part to do next, or -1 when all are taken or the work is no longer `number`. */
static int64_t take_part(Phase *phase, uint32_t number, uint32_t parts) {
    uint64_t next = atomic_load_explicit(&phase->next, memory_order_acquire);
    do {
        if ((uint32_t)(next >> 32) != number || (uint32_t)next >= parts) return -1;
    } while (!atomic_compare_exchange_weak_explicit(&phase->next, &next, next + 1, memory_order_acq_rel,
                                                    memory_order_acquire));
    return (int64_t)(uint32_t)next;
}

static void part_is_done(Phase *phase, uint32_t parts) {
    if (atomic_fetch_add(&phase->done, 1) + 1 == parts && atomic_load(&team.waiting))
        syscall(SYS_futex, &phase->done, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
}

/* Waits until a phase has ended; false if the work is another one by now.  A thread that only let others run would keep
 * its core from the one that it waits for: the system moves that to a core that has nothing to do. */
static int wait_for(Phase *phase, uint32_t number, uint32_t parts, int64_t threads) {
    const int64_t most = PHASE_SPINS * (threads < MAX_SPINNING_THREADS ? threads : MAX_SPINNING_THREADS);
    for (int64_t spins = 0;; spins++) {
        const uint32_t done = atomic_load_explicit(&phase->done, memory_order_acquire);
        if (atomic_load_explicit(&team.number, memory_order_acquire) != number) return 0;
        if (done >= parts) return 1;
        if (spins < most) {
            _mm_pause();
            continue;
        }
        const struct timespec longest = {0, PHASE_SLEEP_NS};
        atomic_fetch_add(&team.waiting, 1);
        syscall(SYS_futex, &phase->done, FUTEX_WAIT_PRIVATE, done, &longest, NULL, 0);
        atomic_fetch_sub(&team.waiting, 1);
    }
}

/* Does one thread's share of a piece of work. */
static void take_part_in(const Work *work, uint32_t number, int64_t thread) {
    for (int64_t i = 0; i < work->phases; i++) {
        Phase *phase = team.phases + i;
        const uint32_t parts = atomic_load_explicit(&phase->parts, memory_order_acquire);
        for (int64_t part = take_part(phase, number, parts); part >= 0; part = take_part(phase, number, parts)) {
            work->run(work->context, i, part, thread);
            part_is_done(phase, parts);
        }
        if (!wait_for(phase, number, parts, work->threads)) return;
    }
}

static void *team_thread(void *argument) {
    const int64_t thread = (int64_t)(intptr_t)argument;
    uint32_t last = 0;
    for (;;) {
        uint32_t number = atomic_load_explicit(&team.number, memory_order_acquire);
        for (int spins = 0; (number == last || number % 2 == 0) && spins < IDLE_SPINS; spins++) {
            _mm_pause();
            number = atomic_load_explicit(&team.number, memory_order_acquire);
        }
        if (number == last || number % 2 == 0) {
            atomic_fetch_add(&team.asleep, 1);
            syscall(SYS_futex, &team.number, FUTEX_WAIT_PRIVATE, number, NULL, NULL, 0);
            atomic_fetch_sub(&team.asleep, 1);
            continue;
        }
        last = number;
        Work work;
        if (read_work(&work, number) && thread < work.threads) take_part_in(&work, number, thread);
    }
    return NULL;
}

/* Starts what is missing of the team; returns how many threads there are, the caller's included. */
static int64_t start_team(int64_t threads) {
    if (team.process != getpid()) { /* the first call, or the first after a fork, which threads do not survive */
        team.process = getpid();
        team.started = 1;
        atomic_store(&team.asleep, 0);
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (team.started < threads) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, team_thread, (void *)(intptr_t)team.started)) break;
        team.started++;
    }
    pthread_attr_destroy(&attributes);
    return team.started < threads ? team.started : threads;
}

/* Does a piece of work with `parts[i]` parts in phase i, on up to `work.threads` threads, of which the caller is one.
 * Returns when all of it is done. */
static void work_together(Work work, const uint32_t *parts) {
    pthread_mutex_lock(&team.in_use);
    work.threads = start_team(work.threads < MAX_THREADS ? work.threads : MAX_THREADS);
    const uint32_t number = (atomic_load(&team.number) + 1) | 1;
    write_work(&work, number, parts);
    if (work.threads > 1 && atomic_load(&team.asleep))
        syscall(SYS_futex, &team.number, FUTEX_WAKE_PRIVATE, (int)team.started, NULL, NULL, 0);
    take_part_in(&work, number, 0);
    pthread_mutex_unlock(&team.in_use);
}

#endif
