/* Takes a live snapshot of this process's memory while a thread writes to it, restores it elsewhere, and compares.
 *
 *   cc snapshot.c $(pkg-config --cflags --libs ramshot) -lpthread -o snapshot && ./snapshot /tmp/c.ramshot
 *
 * A VMM has vCPUs where this has one thread, and pauses them where this takes a mutex. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <ramshot.h>

#define MEM (32ul << 20)

static pthread_mutex_t pause_vcpu = PTHREAD_MUTEX_INITIALIZER;
static atomic_int running = 1;

/* ramshot says what failed, and what to do about it. */
static void check(int result, const char *call)
{
    if (result < 0) {
        fprintf(stderr, "%s: %s (%s)\n", call, ramshot_last_error(), strerror(-result));
        exit(1);
    }
}

static void *map(void)
{
    void *at = mmap(NULL, MEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return at;
}

static struct ramshot_ram *describe(void *memory)
{
    struct ramshot_region region = { .name = "main", .host = memory, .guest = 0, .len = MEM };
    struct ramshot_ram *ram;
    check(ramshot_ram_new(&region, 1, sizeof region, &ram), "ramshot_ram_new");
    return ram;
}

/* The guest: counts up, in one page after the other. */
static void *vcpu(void *memory)
{
    for (unsigned long n = 1; atomic_load(&running); n++) {
        pthread_mutex_lock(&pause_vcpu);
        *(unsigned long *)((char *)memory + n * 4096 % MEM) = n;
        pthread_mutex_unlock(&pause_vcpu);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const char *path = argc > 1 ? argv[1] : "snapshot.ramshot";
    char *memory = map(), *expected = map(), *fresh = map();
    memset(memory, 1, MEM / 2); /* the other half is touched by the guest only, if at all */

    check(ramshot_probe(NULL, 0), "ramshot_probe");
    struct ramshot_ram *ram = describe(memory);
    pthread_t thread;
    if (pthread_create(&thread, NULL, vcpu, memory) != 0)
        return 1;

    /* While the guest runs: everything that can fail or wait. */
    struct ramshot_options options = { .flags = RAMSHOT_REPLACE };
    struct ramshot_snapshot *snapshot;
    check(ramshot_prepare(ram, path, &options, sizeof options, &snapshot), "ramshot_prepare");

    /* The pause. The copy is for the comparison alone. */
    pthread_mutex_lock(&pause_vcpu);
    memcpy(expected, memory, MEM);
    int begun = ramshot_begin(snapshot, RAMSHOT_ALL, "registers", sizeof "registers");
    pthread_mutex_unlock(&pause_vcpu);
    check(begun, "ramshot_begin");

    /* The guest runs; its pages are saved meanwhile. */
    struct ramshot_report report;
    check(ramshot_finish(snapshot, &report, sizeof report), "ramshot_finish");
    ramshot_free(snapshot);
    printf("%llu pages, %llu write faults, paused for %llu us\n", (unsigned long long)report.pages_total,
           (unsigned long long)report.write_faults, (unsigned long long)report.begin_ns / 1000);

    /* Back, into memory that nobody has touched. */
    struct ramshot_file *file;
    check(ramshot_file_open(path, &file), "ramshot_file_open");
    check(ramshot_file_verify(file, 2, NULL, NULL), "ramshot_file_verify");
    struct ramshot_ram *target = describe(fresh);
    check(ramshot_file_restore(file, target, 2, NULL, 0), "ramshot_file_restore");
    uint64_t length;
    const char *state = ramshot_file_device_state(file, &length);
    printf("device state: %.*s\n", (int)length, state);
    int same = memcmp(fresh, expected, MEM) == 0;
    printf("%s\n", same ? "the memory is as it was" : "THE MEMORY DIFFERS");

    ramshot_file_close(file);
    ramshot_ram_free(target);
    atomic_store(&running, 0);
    pthread_join(thread, NULL);
    ramshot_ram_free(ram);
    munmap(memory, MEM), munmap(expected, MEM), munmap(fresh, MEM);
    return same ? 0 : 1;
}
