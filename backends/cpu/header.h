/* $name: a network in 8-bit integers. Codes q stand for (q - ZERO_POINT) * SCALE. */
#ifndef ${macro}_H
#define ${macro}_H
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* What one instance works in; weights are in the library, and shared. */
#define ${macro}_WORKSPACE_BYTES $workspace
#define ${macro}_ALIGNMENT $alignment

$ports
#ifdef __cplusplus
extern "C" {
#endif

/* Run once in a workspace that begins at a multiple of ${macro}_ALIGNMENT. There is no other state: as many threads may
   run it at one time as there are workspaces. Inputs and outputs may begin anywhere. */
void ${name}_run(void *workspace, $codes);

/* The same from and to the model's own floats, in the model's own order. */
void ${name}_run_floats(void *workspace, $floats);

typedef struct ${name} ${name};

${allow}/* Return an instance, or NULL where there is no memory$refused. */
static inline ${name} *${name}_create(void)
{
${ask}    size_t bytes = (${macro}_WORKSPACE_BYTES + ${macro}_ALIGNMENT - 1) / ${macro}_ALIGNMENT * ${macro}_ALIGNMENT;
    return (${name} *)aligned_alloc(${macro}_ALIGNMENT, bytes);
}

static inline void ${name}_destroy(${name} *instance)
{
    free(instance);
}

#ifdef __cplusplus
}
#endif
#endif
