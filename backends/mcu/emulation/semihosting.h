/* ARM semihosting, the calls that the emulated program makes. */
#ifndef SEMIHOSTING_H
#define SEMIHOSTING_H
#include <stdint.h>

int32_t semihosting(uint32_t operation, const void *argument);

/* Open a file of the host: mode 1 reads bytes, 5 writes bytes. */
static inline int32_t host_open(const char *name, uint32_t mode)
{
    uint32_t length = 0;
    while (name[length] != '\0') {
        ++length;
    }
    const uintptr_t block[3] = {(uintptr_t)name, mode, length};
    return semihosting(0x01u, block);
}

/* Both return the number of bytes that were NOT moved. */
static inline int32_t host_read(int32_t file, void *bytes, uint32_t count)
{
    const uintptr_t block[3] = {(uintptr_t)file, (uintptr_t)bytes, count};
    return semihosting(0x06u, block);
}

static inline int32_t host_write(int32_t file, const void *bytes, uint32_t count)
{
    const uintptr_t block[3] = {(uintptr_t)file, (uintptr_t)bytes, count};
    return semihosting(0x05u, block);
}

static inline int32_t host_close(int32_t file)
{
    const uintptr_t block[1] = {(uintptr_t)file};
    return semihosting(0x02u, block);
}
#endif
