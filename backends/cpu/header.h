/* $name: a network in 8-bit integers. Codes q stand for (q - ZERO_POINT) * SCALE. */
#ifndef ${macro}_H
#define ${macro}_H
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* What one instance works in; weights are in the library, and shared. */
#define ${macro}_WORKSPACE_BYTES $workspace
#define ${macro}_ALIGNMENT $alignment
#define ${macro}_THREADS $threads

$ports
#ifdef __cplusplus
extern "C" {
#endif

/* Begin an instance in a workspace at a multiple of ${macro}_ALIGNMENT, and end it. Each run is shared by so many threads,
   from 1 to ${macro}_THREADS: the caller's, and the instance's own, which sleep between runs. Return 0, or what errno would
   be: EINVAL, ENOSYS where the process has no threads, or what pthread_create returns. A workspace of zeros has begun
   with one thread, and need not be ended. */
int ${name}_start(void *workspace, int threads);
void ${name}_stop(void *workspace);

/* Run once in a workspace that has begun. There is no other state: as many callers may run it at one time as there are
   workspaces. Inputs and outputs may begin anywhere. */
$runs
typedef struct ${name} ${name};

${allow}/* Return an instance that so many threads run, or NULL where there is no memory, or no such number of threads$refused. */
static inline ${name} *${name}_create(int threads)
{
${ask}    size_t bytes = (${macro}_WORKSPACE_BYTES + ${macro}_ALIGNMENT - 1) / ${macro}_ALIGNMENT * ${macro}_ALIGNMENT;
    void *workspace = aligned_alloc(${macro}_ALIGNMENT, bytes);
    if (workspace && ${name}_start(workspace, threads)) {
        free(workspace);
        workspace = NULL;
    }
    return (${name} *)workspace;
}

static inline void ${name}_destroy(${name} *instance)
{
    if (instance)
        ${name}_stop(instance);
    free(instance);
}

#ifdef __cplusplus
}
#endif
#endif
