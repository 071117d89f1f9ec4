/* The pool alone, for sanitizers: each share is done once, and sees what all of the step in front of its own wrote. */
#include "pool.c"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS = 4, RUNS = 60 };
struct instance {
    struct pool pool;
    int written[MOST][ROUNDS], total[ROUNDS], run, wrong, met;
};

/* In turns: all write, all read, one writes. */
const int32_t qc_steps = 3 * ROUNDS;
const uint8_t qc_shared[] = {1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0};

void qc_step(void *workspace, int32_t step, int32_t share, int32_t shares)
{
    struct instance *one = workspace;
    int round = step / 3;
    /* Once in a run, nobody goes on before all have a share, so that no thread does all; that orders nothing else. */
    if (step == 0 && __atomic_add_fetch(&one->met, 1, __ATOMIC_RELAXED))
        while (__atomic_load_n(&one->met, __ATOMIC_RELAXED) < (one->run + 1) * shares)
            sched_yield();
    if (step % 3 == 0)
        one->written[share][round]++;
    else if (step % 3 == 1)
        for (int other = 0; other < shares; other++) {
            if (one->written[other][round] != one->run + 1 || one->total[round] != one->run)
                __atomic_store_n(&one->wrong, 1, __ATOMIC_RELAXED);
        }
    else if (shares == 1)
        one->total[round]++;
}

static void *use(void *given)
{
    int threads = *(int *)given;
    struct instance *one = aligned_alloc(LINE, sizeof *one + LINE - sizeof *one % LINE);
    memset(one, 0, sizeof *one);
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
