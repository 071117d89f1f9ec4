/* The pool alone, for sanitizers: each thread reads what the others wrote in front of a wait, run after run. */
#include "pool.c"
#include <stdio.h>
#include <stdlib.h>

enum { ROUNDS = 4, RUNS = 60 };
struct instance {
    struct pool pool;
    int written[MOST][ROUNDS], run, wrong;
};

void qc_part(void *workspace, int32_t thread, int32_t threads)
{
    struct instance *one = workspace;
    qc_wait(&one->pool);
    for (int round = 0; round < ROUNDS; round++) {
        one->written[thread][round] = one->run * threads + round;
        qc_wait(&one->pool);
        for (int other = 0; other < threads; other++)
            if (one->written[other][round] != one->run * threads + round)
                __atomic_store_n(&one->wrong, 1, __ATOMIC_RELAXED);
        qc_wait(&one->pool);
    }
}

static void *use(void *given)
{
    int threads = *(int *)given;
    struct instance *one = aligned_alloc(LINE, sizeof *one + LINE - sizeof *one % LINE);
    one->wrong = 0;
    if (qc_start(&one->pool, threads))
        exit(2);
    for (one->run = 0; one->run < RUNS; one->run++) {
        qc_wake(&one->pool);
        qc_compute(&one->pool);
        if (one->run % 20 == 0)
            for (int i = 0; i < 100 * SPINS; i++) /* long enough that the others sleep */
                pause_once(0);
    }
    qc_stop(&one->pool);
    if (one->wrong)
        exit(3);
    free(one);
    return NULL;
}

int main(void)
{
    int counts[] = {1, 2, 3, 5, MOST};
    for (unsigned i = 0; i < sizeof counts / sizeof *counts; i++)
        use(&counts[i]);
    uintptr_t callers[2];
    for (int i = 0; i < 2; i++)
        if (pthread_create(&callers[i], NULL, use, &counts[1 + i]))
            exit(4);
    for (int i = 0; i < 2; i++)
        pthread_join(callers[i], NULL);
    struct pool none;
    return qc_start(&none, 0) == INVALID && qc_start(&none, MOST + 1) == INVALID ? 0 : 5;
}
