/* Threads of one instance. A run is steps one after another, and a step is shares that may be done at one time: each share
   is done by whoever comes first, so that nobody waits for a thread that the system has not got round to.

   The instance begins with the pool: there is no other state. `pool.*.ll` beside this file is what clang makes of it (see
   docs/targets/cpu-tvm.md), so that compiling a network needs no C compiler. No headers: the bytes of a semaphore and of
   a thread's name are bounded rather than known, and nothing depends on the C library that is linked. MOST (threads),
   BYTES (of the pool) and NETWORK (where that is in it) come from layout.py. */
#include <stdint.h>

#define LINE 64 /* bytes that processors keep to themselves while they write */
#define SPINS 1000
#define INVALID 22 /* EINVAL */
#define ABSENT 38  /* ENOSYS */

/* Weak: a library that runs on one thread wants none of them. */
#define WEAK __attribute__((weak))
int pthread_create(uintptr_t *, const void *, void *(*)(void *), void *) WEAK;
int pthread_join(uintptr_t, void **) WEAK;
int sched_yield(void) WEAK;
int sem_init(void *, int, unsigned) WEAK;
int sem_wait(void *) WEAK;
int sem_post(void *) WEAK;
int sem_destroy(void *) WEAK;

struct worker {
    _Alignas(LINE) unsigned char semaphore[LINE];
    uintptr_t thread;
    struct pool *pool;
    int32_t number;
    int32_t asleep;
};

struct pool {
    int32_t threads; /* 0 is 1: memory of zeros is an instance of one thread */
    uint8_t network; /* of a library with several, which one a run is of: qc_run says so, and qc_step does that one's */
    _Alignas(LINE) uint64_t run; /* how many there were, or STOP */
    /* The step that is on, counted over all runs, above a bit for each of its shares that somebody does or did. */
    _Alignas(LINE) uint64_t claimed;
    _Alignas(LINE) uint32_t done; /* shares of that step */
    struct worker workers[MOST - 1];
};
_Static_assert(sizeof(struct pool) == BYTES && __builtin_offsetof(struct pool, network) == NETWORK, "as layout.py has it");
#define ALL ((1u << MOST) - 1)
#define STOP UINT64_MAX

/* The network: how many steps a run has, which of them are shared, and one share of one of them. */
extern const int32_t qc_steps;
extern const uint8_t qc_shared[];
void qc_step(void *workspace, int32_t step, int32_t share, int32_t shares);

static void pause_once(uint32_t spins)
{
    if (spins >= SPINS) {
        sched_yield();
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Do shares of all steps up to one, as long as there are any that nobody does, and return once that one is reached. */
static void help(struct pool *pool, int32_t thread, uint64_t end)
{
    /* What a thread has to do for itself before kernels run in it belongs here. */
    for (uint32_t spins = 0;;) {
        uint64_t state = __atomic_load_n(&pool->claimed, __ATOMIC_ACQUIRE), on = state >> MOST;
        if (on >= end)
            return;
        int32_t step = (int32_t)(on % (uint64_t)qc_steps), shares = qc_shared[step] ? pool->threads : 1;
        uint32_t left = ~(uint32_t)state & ((1u << shares) - 1);
        if (!left) {
            pause_once(spins++);
            continue;
        }
        /* Its own share first: that is where it did the step before, and has the map in its cache. */
        int32_t share = left >> thread & 1 ? thread : __builtin_ctz(left);
        if (!__atomic_compare_exchange_n(&pool->claimed, &state, state | 1u << share, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            continue;
        spins = 0;
        qc_step(pool, step, share, shares);
        if (__atomic_add_fetch(&pool->done, 1, __ATOMIC_ACQ_REL) == (uint32_t)shares) {
            __atomic_store_n(&pool->done, 0, __ATOMIC_RELAXED);
            /* The next run's first step is nobody's until its inputs are there. */
            __atomic_store_n(&pool->claimed, (on + 1) << MOST | (step + 1 == qc_steps ? ALL : 0), __ATOMIC_RELEASE);
        }
    }
}

/* Return once there is another run than the last one: awake for as long as a caller in a loop takes, then asleep. */
static uint64_t next_run(struct worker *worker, uint64_t last)
{
    uint64_t *run = &worker->pool->run;
    for (uint32_t spins = 0; spins < SPINS; spins++) {
        uint64_t now = __atomic_load_n(run, __ATOMIC_ACQUIRE);
        if (now != last)
            return now;
        pause_once(spins);
    }
    __atomic_store_n(&worker->asleep, 1, __ATOMIC_SEQ_CST);
    /* Whoever takes the flag away decides: the one that wakes has posted then, and that is waited for. */
    if (__atomic_load_n(run, __ATOMIC_SEQ_CST) == last || !__atomic_exchange_n(&worker->asleep, 0, __ATOMIC_SEQ_CST))
        while (sem_wait(worker->semaphore)) /* interrupted by a signal */
            ;
    return __atomic_load_n(run, __ATOMIC_ACQUIRE);
}

static void *work(void *given)
{
    struct worker *worker = given;
    struct pool *pool = worker->pool;
    uint64_t run = 0;
    for (;;) {
        run = next_run(worker, run);
        if (run == STOP)
            return 0;
        help(pool, worker->number, run * (uint64_t)qc_steps);
    }
}

static void announce(struct pool *pool, uint64_t run)
{
    __atomic_store_n(&pool->run, run, __ATOMIC_SEQ_CST);
    for (int32_t i = 0; i < pool->threads - 1; i++)
        if (__atomic_exchange_n(&pool->workers[i].asleep, 0, __ATOMIC_SEQ_CST))
            sem_post(pool->workers[i].semaphore);
}

/* Wake the other threads: there is a run, whose first step they can do once `qc_compute` is called. */
void qc_wake(struct pool *pool)
{
    if (pool->threads > 1)
        announce(pool, __atomic_load_n(&pool->run, __ATOMIC_RELAXED) + 1);
}

/* Do all steps, with those who are awake. */
void qc_compute(struct pool *pool)
{
    if (pool->threads < 2) {
        for (int32_t step = 0; step < qc_steps; step++)
            qc_step(pool, step, 0, 1);
        return;
    }
    uint64_t begun = __atomic_load_n(&pool->claimed, __ATOMIC_RELAXED) >> MOST;
    __atomic_store_n(&pool->claimed, begun << MOST, __ATOMIC_RELEASE);
    help(pool, 0, begun + (uint64_t)qc_steps);
}

void qc_stop(struct pool *pool)
{
    announce(pool, STOP);
    for (int32_t i = 0; i < pool->threads - 1; i++) {
        pthread_join(pool->workers[i].thread, 0);
        sem_destroy(pool->workers[i].semaphore);
    }
    pool->threads = 0;
}

int qc_start(struct pool *pool, int threads)
{
    *pool = (struct pool){.claimed = ALL};
    if (threads < 1 || threads > MOST)
        return INVALID;
    if (threads > 1 && !(pthread_create && pthread_join && sched_yield && sem_init && sem_wait && sem_post && sem_destroy))
        return ABSENT;
    /* Nobody runs before all are there, so that what each reads of the pool is as it stays. */
    for (int32_t i = 0; i < threads - 1; i++) {
        struct worker *worker = &pool->workers[i];
        worker->pool = pool;
        worker->number = i + 1;
        int failed = sem_init(worker->semaphore, 0, 0) ? ABSENT : 0;
        if (!failed && (failed = pthread_create(&worker->thread, 0, work, worker)))
            sem_destroy(worker->semaphore);
        if (failed) {
            pool->threads = i + 1;
            qc_stop(pool);
            return failed;
        }
    }
    pool->threads = threads;
    return 0;
}
