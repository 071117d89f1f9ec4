/* TCG plugin (QEMU plugin API, version 1): executed instructions per function, exactly. QEMU exports the functions
   declared here; its header qemu-plugin.h is in no Debian package of version 7.2. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;

__attribute__((visibility("default"))) int qemu_plugin_version = 1;
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, int, void *, uint64_t);

struct function {
    char name[96];
    uint64_t count;
    struct function *next;
};

static struct function *functions;
static const char *path = "instructions.tsv";

static struct function *function(const char *name)
{
    struct function *found = functions;
    while (found != NULL && strncmp(found->name, name, sizeof found->name - 1) != 0) {
        found = found->next;
    }
    if (found == NULL) {
        found = calloc(1, sizeof *found);
        if (found == NULL) {
            abort();
        }
        strncpy(found->name, name, sizeof found->name - 1);
        found->next = functions;
        functions = found;
    }
    return found;
}

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); ++i) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
        const char *name = qemu_plugin_insn_symbol(instruction);
        struct function *counted = function(name != NULL ? name : "?");
        qemu_plugin_register_vcpu_insn_exec_inline(instruction, 0, &counted->count, 1); /* 0: add */
    }
}

static void finished(plugin_id id, void *unused)
{
    FILE *file = fopen(path, "w");
    (void)id;
    (void)unused;
    if (file == NULL) {
        abort();
    }
    for (const struct function *each = functions; each != NULL; each = each->next) {
        fprintf(file, "%s\t%llu\n", each->name, (unsigned long long)each->count);
    }
    fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int count, char **arguments)
{
    (void)info;
    for (int i = 0; i < count; ++i) {
        if (strncmp(arguments[i], "out=", 4) == 0) {
            path = strdup(arguments[i] + 4);
        }
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
