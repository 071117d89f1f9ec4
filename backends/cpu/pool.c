/* Threads of one instance: `qc_part` is run by all of them at once, and they wait for one another within it.

   The instance begins with the pool: there is no other state. `pool.*.ll` beside this file is what clang makes of it (see
   docs/targets/cpu-tvm.md), so that compiling a network needs no C compiler. No headers: the bytes of a semaphore and of
   a thread's name are bounded rather than known, and nothing depends on the C library that is linked. MOST (threads) and
   BYTES (of the pool) come from layout.py. */
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
    int32_t stopping;
    _Alignas(LINE) uint32_t run;
    _Alignas(LINE) uint32_t arrived;
    _Alignas(LINE) uint32_t passed;
    struct worker workers[MOST - 1];
};
_Static_assert(sizeof(struct pool) == BYTES, "as layout.py has it");

void qc_part(void *workspace, int32_t thread, int32_t threads);

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

/* Return once all threads are here. */
void qc_wait(struct pool *pool)
{
    if (pool->threads < 2)
        return;
    uint32_t passed = __atomic_load_n(&pool->passed, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&pool->arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)pool->threads) {
        __atomic_store_n(&pool->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&pool->passed, passed + 1, __ATOMIC_RELEASE);
        return;
    }
    for (uint32_t spins = 0; __atomic_load_n(&pool->passed, __ATOMIC_ACQUIRE) == passed; spins++)
        pause_once(spins);
}

/* Return once there is another run than the last one: awake for as long as a caller in a loop takes, then asleep. */
static uint32_t next_run(struct worker *worker, uint32_t last)
{
    uint32_t *run = &worker->pool->run;
    for (uint32_t spins = 0; spins < SPINS; spins++) {
        uint32_t now = __atomic_load_n(run, __ATOMIC_ACQUIRE);
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
    uint32_t run = 0;
    for (;;) {
        run = next_run(worker, run);
        if (pool->stopping)
            return 0;
        qc_part(pool, worker->number, pool->threads);
    }
}

/* Let the other threads begin with `qc_part`, in which they wait for this one. */
void qc_wake(struct pool *pool)
{
    if (pool->threads < 2)
        return;
    __atomic_add_fetch(&pool->run, 1, __ATOMIC_SEQ_CST);
    for (int32_t i = 0; i < pool->threads - 1; i++)
        if (__atomic_exchange_n(&pool->workers[i].asleep, 0, __ATOMIC_SEQ_CST))
            sem_post(pool->workers[i].semaphore);
}

/* This thread's own part, and with it all of them. */
void qc_compute(struct pool *pool)
{
    qc_part(pool, 0, pool->threads < 2 ? 1 : pool->threads);
}

void qc_stop(struct pool *pool)
{
    pool->stopping = 1;
    qc_wake(pool);
    for (int32_t i = 0; i < pool->threads - 1; i++) {
        pthread_join(pool->workers[i].thread, 0);
        sem_destroy(pool->workers[i].semaphore);
    }
    pool->threads = 0;
}

int qc_start(struct pool *pool, int threads)
{
    *pool = (struct pool){0};
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
