/* Runs a library through its header, with sanitizers and between pages that nobody may touch.

   Kernels are machine code that no sanitizer sees into: what they read or write outside of the workspace, of inputs and
   of outputs has to fault. So each of those lies once right behind such a page, and once right in front of one.
   Standard input: samples of floats. Standard output: outputs of floats, which all instances have to agree on. */
#include HEADER
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NET(name) JOIN(STEM, name)
#define SIZE(name) JOIN(MACRO, name)

enum { FRONT, BACK, PLACES };
struct instance {
    void *workspace;
    int8_t *in, *out;
    float *in_floats, *out_floats;
};
static float given[SIZE(_INPUT_BYTES)], expected[SIZE(_OUTPUT_BYTES)];
static int8_t codes[SIZE(_INPUT_BYTES)], expected_codes[SIZE(_OUTPUT_BYTES)];

/* Return so many bytes, which begin where a page does, or end there. */
static void *between(size_t bytes, int place)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page;
    char *all = mmap(NULL, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(all + page, inner, PROT_READ | PROT_WRITE))
        exit(3);
    memset(all + page, place == BACK ? 0xa5 : 0x5a, inner); /* what is read of it shows in the outputs */
    return all + page + (place == BACK ? inner - bytes : 0);
}

static struct instance begin(int place, int threads)
{
    struct instance one = {
        between(SIZE(_WORKSPACE_BYTES), place), between(SIZE(_INPUT_BYTES), place), between(SIZE(_OUTPUT_BYTES), place),
        between(SIZE(_INPUT_BYTES) * sizeof(float), place), between(SIZE(_OUTPUT_BYTES) * sizeof(float), place),
    };
#ifdef TILES
    if (!NET(_allow)())
        exit(5);
#endif
    if (NET(_start)(one.workspace, threads))
        exit(4);
    return one;
}

/* Run both ways; what comes out has to be what came out elsewhere, and inputs stay as they are. */
static void run(struct instance *one, int first)
{
    memcpy(one->in, codes, sizeof codes);
    memcpy(one->in_floats, given, sizeof given);
    NET(_run)(one->workspace, one->in, one->out);
    NET(_run_floats)(one->workspace, one->in_floats, one->out_floats);
    if (first) {
        memcpy(expected_codes, one->out, sizeof expected_codes);
        memcpy(expected, one->out_floats, sizeof expected);
    }
    if (memcmp(expected_codes, one->out, sizeof expected_codes) || memcmp(expected, one->out_floats, sizeof expected))
        exit(5);
    if (memcmp(codes, one->in, sizeof codes) || memcmp(given, one->in_floats, sizeof given))
        exit(6);
}

static struct instance together[2];

static void *run_often(void *which)
{
    for (int i = 0; i < 50; i++)
        run(which, 0);
    return NULL;
}

int main(void)
{
#ifdef TILES /* the system is asked for them before they are used */
    if (!NET(_allow)())
        return 8;
#endif
    struct instance all[2 * PLACES];
    for (int i = 0; i < 2 * PLACES; i++)
        all[i] = begin(i % PLACES, 1 + i / PLACES);
    uint32_t state = 1;
    int runs = 0;
    for (; fread(given, sizeof given, 1, stdin) == 1; runs++) {
        for (size_t i = 0; i < sizeof codes; i++)
            codes[i] = (int8_t)((state = state * 1664525u + 1013904223u) >> 24);
        run(&all[runs % (2 * PLACES)], 1);
        run(&all[(runs + 1) % (2 * PLACES)], 0);
        fwrite(expected, sizeof expected, 1, stdout);
    }
    /* Two callers at one time, each with an instance of its own. */
    pthread_t callers[2];
    for (int i = 0; i < 2; i++) {
        together[i] = begin(i, 2);
        pthread_create(&callers[i], NULL, run_often, &together[i]);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(callers[i], NULL);
        NET(_stop)(together[i].workspace);
    }
    for (int i = 0; i < 2 * PLACES; i++)
        NET(_stop)(all[i].workspace);
    void *made = NET(_create)(SIZE(_THREADS));
    NET(_destroy)(made);
    return made && !NET(_create)(SIZE(_THREADS) + 1) && runs > 0 ? 0 : 7;
}
