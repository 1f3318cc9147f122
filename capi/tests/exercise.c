/* Every function of the C ABI, with right and with wrong arguments. Nobody writes to protected memory, so it also runs where
 * threads take turns (valgrind). Its argument is a folder for its files. Prints the line that failed. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <ramshot.h>

#define MEM (4ul << 20)
#define PAGES (MEM / 4096)

#define EXPECT(condition)                                                                                     \
    do {                                                                                                      \
        if (!(condition)) {                                                                                   \
            fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, ramshot_last_error());     \
            exit(1);                                                                                          \
        }                                                                                                     \
    } while (0)
/* A call that fails says so in a number and in a sentence. */
#define FAILS(errno_, word, call)                                                                             \
    do {                                                                                                      \
        int result_ = (call);                                                                                 \
        if (result_ != -(errno_) || strstr(ramshot_last_error(), word) == NULL) {                             \
            fprintf(stderr, "line %d: %s is %d (%s)\n", __LINE__, #call, result_, ramshot_last_error());      \
            exit(1);                                                                                          \
        }                                                                                                     \
    } while (0)

static char folder[256], full[300], increment[300], other[300];

static char *map(void)
{
    void *at = mmap(NULL, MEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(at != MAP_FAILED);
    return at;
}

static struct ramshot_ram *describe(char *memory, const char *name)
{
    struct ramshot_region region = { .name = name, .host = memory, .guest = 0x100000, .len = MEM };
    struct ramshot_ram *ram;
    EXPECT(ramshot_ram_new(&region, 1, sizeof region, &ram) == 0);
    return ram;
}

/* A dirty log: which pages were written. */
struct log {
    char *memory;
    unsigned char dirty[PAGES];
    int fails, calls;
};

static int take(void *opaque, ramshot_dirty_report report, void *context)
{
    struct log *log = opaque;
    log->calls++;
    if (log->fails)
        return -EIO;
    for (size_t page = 0; page < PAGES; page++)
        if (log->dirty[page])
            report(context, log->memory + page * 4096, 4096);
    memset(log->dirty, 0, sizeof log->dirty);
    return 0;
}

static void bad_ram(char *memory)
{
    struct ramshot_ram *ram = (void *)1;
    struct ramshot_region region = { .name = "main", .host = memory, .len = MEM };
    FAILS(EINVAL, "regions is NULL", ramshot_ram_new(NULL, 1, sizeof region, &ram));
    EXPECT(ram == NULL);
    FAILS(EINVAL, "ram is NULL", ramshot_ram_new(&region, 1, sizeof region, NULL));
    FAILS(EINVAL, "sizeof", ramshot_ram_new(&region, 1, 0, &ram));
    region.name = NULL;
    FAILS(EINVAL, "NULL", ramshot_ram_new(&region, 1, sizeof region, &ram));
    region.name = "\xff";
    FAILS(EINVAL, "UTF-8", ramshot_ram_new(&region, 1, sizeof region, &ram));
    region.name = "";
    FAILS(EINVAL, "name", ramshot_ram_new(&region, 1, sizeof region, &ram));
    region.name = "main";
    region.treatment = 9;
    FAILS(EINVAL, "treatment 9", ramshot_ram_new(&region, 1, sizeof region, &ram));
    region.treatment = RAMSHOT_TRACKED;
    region.flags = 6;
    FAILS(EINVAL, "0x6", ramshot_ram_new(&region, 1, sizeof region, &ram));
    region.flags = RAMSHOT_REGION_FD;
    region.fd = 999;
    FAILS(EBADF, "999", ramshot_ram_new(&region, 1, sizeof region, &ram));
    region.flags = 0;
    region.host = NULL;
    FAILS(EINVAL, "main", ramshot_ram_new(&region, 1, sizeof region, &ram));
    region.host = memory + 1;
    FAILS(EINVAL, "main", ramshot_ram_new(&region, 1, sizeof region, &ram));
    FAILS(EINVAL, "NULL", ramshot_compatible(NULL));
    ramshot_ram_free(NULL);
}

static void bad_prepare(struct ramshot_ram *ram)
{
    struct ramshot_snapshot *snapshot = (void *)1;
    struct ramshot_options options = { .pool_bytes = 5 };
    FAILS(EINVAL, "pool_bytes is 5", ramshot_prepare(ram, other, &options, sizeof options, &snapshot));
    EXPECT(snapshot == NULL);
    FAILS(EINVAL, "ram is NULL", ramshot_prepare(NULL, other, NULL, 0, &snapshot));
    FAILS(EINVAL, "path is NULL", ramshot_prepare(ram, NULL, NULL, 0, &snapshot));
    FAILS(EINVAL, "snapshot is NULL", ramshot_prepare(ram, other, NULL, 0, NULL));
    options.pool_bytes = 0;
    options.workers = 17;
    FAILS(EINVAL, "workers is 17", ramshot_prepare(ram, other, &options, sizeof options, &snapshot));
    options.workers = 0;
    options.flags = 1u << 31;
    FAILS(EINVAL, "flags", ramshot_prepare(ram, other, &options, sizeof options, &snapshot));
    struct { struct ramshot_options known; uint64_t news; } newer = { .news = 1 };
    FAILS(E2BIG, "newer", ramshot_prepare(ram, other, &newer.known, sizeof newer, &snapshot));
    FAILS(ENOENT, "/no/such/folder", ramshot_prepare(ram, "/no/such/folder/x", NULL, 0, &snapshot));
    FAILS(ENODATA, "no increment", ramshot_prepare_increment(ram, other, NULL, 0, &snapshot));
    FAILS(EINVAL, "snapshot is NULL", ramshot_arm_ahead(NULL));
    FAILS(EINVAL, "snapshot is NULL", ramshot_precopy(NULL, 1));
    FAILS(EINVAL, "snapshot is NULL", ramshot_begin(NULL, RAMSHOT_ALL, NULL, 0));
    FAILS(EINVAL, "snapshot is NULL", ramshot_progress(NULL, NULL, 0));
    FAILS(EINVAL, "snapshot is NULL", ramshot_cancel(NULL));
    FAILS(EINVAL, "snapshot is NULL", ramshot_before_discard(NULL, NULL, 0));
    FAILS(EINVAL, "snapshot is NULL", ramshot_finish(NULL, NULL, 0));
    ramshot_free(NULL);
}

static struct ramshot_snapshot *prepare(struct ramshot_ram *ram, const char *path, struct ramshot_dirty *dirty)
{
    struct ramshot_options options = { .pool_bytes = 1 << 20, .dirty = dirty, .flags = RAMSHOT_NO_SYNC };
    struct ramshot_snapshot *snapshot;
    EXPECT(ramshot_prepare(ram, path, &options, sizeof options, &snapshot) == 0);
    return snapshot;
}

static void live(struct ramshot_ram *ram, char *memory, struct ramshot_dirty *dirty)
{
    struct ramshot_snapshot *snapshot = prepare(ram, full, dirty);
    struct ramshot_progress_info progress;
    struct ramshot_report report;
    FAILS(EINVAL, "not begun", ramshot_finish(snapshot, &report, sizeof report));
    FAILS(EINVAL, "progress is NULL", ramshot_progress(snapshot, NULL, sizeof progress));
    EXPECT(ramshot_progress(snapshot, &progress, sizeof progress) == 0 && progress.pages_total == 0);
    EXPECT(ramshot_before_discard(snapshot, memory, MEM) == 0);
    FAILS(EINVAL, "pending 7", ramshot_begin(snapshot, 7, NULL, 0));
    FAILS(EINVAL, "device_state is NULL", ramshot_begin(snapshot, RAMSHOT_ALL, NULL, 5));
    EXPECT(ramshot_arm_ahead(snapshot) == 0);
    EXPECT(ramshot_begin(snapshot, RAMSHOT_ALL, "state", 5) == 0);
    FAILS(EINVAL, "begun already", ramshot_begin(snapshot, RAMSHOT_ALL, NULL, 0));
    EXPECT(ramshot_before_discard(snapshot, memory, 8192) == 0);
    EXPECT(ramshot_before_discard(snapshot, (void *)-1, UINT64_MAX) == 0);
    EXPECT(ramshot_progress(snapshot, &progress, sizeof progress) == 0 && progress.pages_total == PAGES / 2);
    /* A program of before there was anything behind the id. */
    memset(&report, 0x55, sizeof report);
    EXPECT(ramshot_finish(snapshot, &report, sizeof report.id) == 0);
    EXPECT(report.id[0] != 0x55 || report.id[1] != 0x55 || report.id[2] != 0x55);
    EXPECT(report.begin_ns == 0x5555555555555555);
    FAILS(EINVAL, "over", ramshot_finish(snapshot, &report, sizeof report));
    EXPECT(ramshot_cancel(snapshot) == 0);
    ramshot_free(snapshot);

    struct ramshot_options options = { 0 };
    FAILS(EEXIST, "exists", ramshot_prepare(ram, full, &options, sizeof options, &snapshot));
}

static void *cancel(void *snapshot)
{
    struct ramshot_progress_info progress;
    EXPECT(ramshot_progress(snapshot, &progress, sizeof progress) == 0 && progress.pages_total == PAGES / 2);
    EXPECT(ramshot_cancel(snapshot) == 0);
    return NULL;
}

/* From another thread while this one waits for the image: whoever comes first, there is an image or a reason. */
static void cancelled_while_it_runs(struct ramshot_ram *ram)
{
    struct ramshot_snapshot *snapshot = prepare(ram, other, NULL);
    pthread_t thread;
    EXPECT(ramshot_begin(snapshot, RAMSHOT_ALL, NULL, 0) == 0);
    EXPECT(pthread_create(&thread, NULL, cancel, snapshot) == 0);
    int result = ramshot_finish(snapshot, NULL, 0);
    EXPECT(pthread_join(thread, NULL) == 0);
    EXPECT(result == 0 || result == -ECANCELED);
    EXPECT((access(other, F_OK) == 0) == (result == 0));
    ramshot_free(snapshot);
    unlink(other);
}

/* A shared mapping, whose file says what of it holds data; part of it in use; and a block that is copied in the pause. */
static void shared_memory(char *memory)
{
    int fd = memfd_create("ram", 0);
    EXPECT(fd >= 0 && ftruncate(fd, MEM) == 0);
    char *shared = mmap(NULL, MEM, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    EXPECT(shared != MAP_FAILED);
    memset(shared + 4096, 3, 8192);
    struct ramshot_region regions[] = {
        { .name = "shared", .host = shared, .len = MEM, .used = MEM / 2, .flags = RAMSHOT_REGION_FD, .fd = fd },
        { .name = "flash", .host = memory, .guest = MEM, .len = 4096, .treatment = RAMSHOT_IN_PAUSE },
    };
    struct ramshot_ram *ram;
    struct ramshot_report report;
    EXPECT(ramshot_ram_new(regions, 2, sizeof *regions, &ram) == 0);
    close(fd);
    if (ramshot_compatible(ram) == 0) { /* Linux 5.19 */
        struct ramshot_snapshot *snapshot = prepare(ram, other, NULL);
        EXPECT(ramshot_begin(snapshot, RAMSHOT_ALL, NULL, 0) == 0);
        EXPECT(ramshot_finish(snapshot, &report, sizeof report) == 0);
        EXPECT(report.pages_total == 3 && report.pages_in_pause == 1);
        ramshot_free(snapshot);
        EXPECT(unlink(other) == 0);
    }
    ramshot_ram_free(ram);
    munmap(shared, MEM);
}

static void cancelled(struct ramshot_ram *ram)
{
    struct ramshot_snapshot *snapshot = prepare(ram, other, NULL);
    EXPECT(ramshot_cancel(snapshot) == 0);
    FAILS(ECANCELED, "cancelled", ramshot_begin(snapshot, RAMSHOT_ALL, NULL, 0));
    ramshot_free(snapshot);
    ramshot_free(prepare(ram, other, NULL)); /* never begun */
    snapshot = prepare(ram, other, NULL);
    EXPECT(ramshot_begin(snapshot, RAMSHOT_ALL, NULL, 0) == 0);
    ramshot_free(snapshot); /* never finished */
    EXPECT(access(other, F_OK) != 0);
}

static void increments(struct ramshot_ram *ram, char *memory, struct ramshot_dirty *dirty, struct log *log)
{
    uint64_t bytes = 0;
    struct ramshot_snapshot *snapshot;
    struct ramshot_report report;
    struct ramshot_options options = { .dirty = dirty };
    EXPECT(ramshot_dirty_written(dirty, &bytes) == 0 && bytes == 0);
    memset(memory + 3 * 4096, 9, 4096);
    log->dirty[3] = 1;
    memset(memory + 5 * 4096, 9, 8192);
    EXPECT(ramshot_dirty_mark(dirty, memory + 5 * 4096, 8192) == 0);
    EXPECT(ramshot_dirty_written(dirty, &bytes) == 0 && bytes == 3 * 4096);
    log->fails = 1;
    FAILS(EIO, "dirty log", ramshot_dirty_written(dirty, &bytes));
    log->fails = 0;
    EXPECT(ramshot_prepare_increment(ram, increment, &options, sizeof options, &snapshot) == 0);
    EXPECT(ramshot_begin(snapshot, RAMSHOT_DIRTY, NULL, 0) == 0);
    EXPECT(ramshot_finish(snapshot, &report, sizeof report) == 0);
    EXPECT(report.pages_total == 3);
    ramshot_free(snapshot);

    /* Pre-copy, without anybody writing: the second pass finds nothing, nor does T0. */
    options.flags = RAMSHOT_NO_SYNC;
    EXPECT(ramshot_prepare(ram, other, &options, sizeof options, &snapshot) == 0);
    EXPECT(ramshot_precopy(snapshot, 2) == 0);
    EXPECT(ramshot_begin(snapshot, RAMSHOT_DIRTY, NULL, 0) == 0);
    EXPECT(ramshot_finish(snapshot, &report, sizeof report) == 0);
    EXPECT(report.pages_total == 0 && report.precopy_passes == 2 && report.precopy_pages >= PAGES / 2);
    ramshot_free(snapshot);
    EXPECT(unlink(other) == 0);
}

static void bad_dirty(struct ramshot_ram *ram)
{
    struct ramshot_dirty *dirty = (void *)1;
    struct ramshot_dirty_log log = { 0 };
    struct ramshot_dirty_logs logs = { .logs = &log, .logs_count = 1 };
    uint64_t bytes;
    FAILS(EINVAL, "take", ramshot_dirty_new(ram, &logs, sizeof logs, &dirty));
    EXPECT(dirty == NULL);
    FAILS(EINVAL, "logs is NULL", ramshot_dirty_new(ram, NULL, sizeof logs, &dirty));
    logs.logs = NULL;
    FAILS(EINVAL, "NULL", ramshot_dirty_new(ram, &logs, sizeof logs, &dirty));
    logs.logs_count = 0;
    struct ramshot_kvm_slot slot = { .host = NULL, .len = 4096 };
    logs.kvm_slots = &slot;
    logs.kvm_slots_count = 1;
    logs.kvm_vm_fd = -1;
    FAILS(EBADF, "-1", ramshot_dirty_new(ram, &logs, sizeof logs, &dirty));
    struct log failing = { .fails = 1 };
    log = (struct ramshot_dirty_log){ .take = take, .opaque = &failing };
    logs = (struct ramshot_dirty_logs){ .logs = &log, .logs_count = 1 };
    FAILS(EIO, "take", ramshot_dirty_new(ram, &logs, sizeof logs, &dirty));
    FAILS(EINVAL, "dirty is NULL", ramshot_dirty_mark(NULL, NULL, 0));
    FAILS(EINVAL, "dirty is NULL", ramshot_dirty_written(NULL, &bytes));
    ramshot_dirty_free(NULL);
}

static void count_calls(void *opaque, uint64_t done, uint64_t total)
{
    EXPECT(done <= total && total == PAGES);
    ++*(int *)opaque;
}

static void files(char *memory, char *expected)
{
    struct ramshot_file *file, *child;
    struct ramshot_file_contents info;
    struct ramshot_block block;
    struct ramshot_restore_report report;
    uint64_t length;
    uint32_t state = 77;
    char page[4096];
    int calls = 0;
    FAILS(EINVAL, "path is NULL", ramshot_file_open(NULL, &file));
    FAILS(ENOENT, "cannot open", ramshot_file_open("/no/such/file", &file));
    FAILS(EINVAL, "directory", ramshot_file_open(folder, &file));
    EXPECT(file == NULL);
    EXPECT(ramshot_file_open(full, &file) == 0 && ramshot_file_open(increment, &child) == 0);
    FAILS(EINVAL, "info is NULL", ramshot_file_info(file, NULL, sizeof info));
    EXPECT(ramshot_file_info(child, &info, sizeof info) == 0 && info.increment == 1 && info.data_pages == 3);
    EXPECT(ramshot_file_read_page(child, 0, page, &state) == 0 && state == RAMSHOT_PAGE_IN_PARENT);
    char parent[16];
    memcpy(parent, info.parent_id, 16);
    EXPECT(ramshot_file_info(file, &info, sizeof info) == 0 && memcmp(info.id, parent, 16) == 0);
    EXPECT(info.pages == PAGES && info.data_pages == PAGES / 2 && info.blocks == 1 && info.device_state_len == 5);
    EXPECT(ramshot_file_block(file, 0, &block, sizeof block) == 0);
    EXPECT(strcmp(block.name, "main") == 0 && block.guest == 0x100000 && block.used == MEM);
    FAILS(EINVAL, "no RAM block 1", ramshot_file_block(file, 1, &block, sizeof block));
    EXPECT(memcmp(ramshot_file_device_state(file, &length), "state", 5) == 0 && length == 5);
    EXPECT(ramshot_file_device_state(NULL, &length) == NULL && length == 0);
    EXPECT(ramshot_file_read_page(file, 1, page, &state) == 0 && state == RAMSHOT_PAGE_DATA);
    EXPECT(memcmp(page, expected + 4096, 4096) == 0);
    EXPECT(ramshot_file_read_page(file, PAGES - 1, page, NULL) == 0 && page[0] == 0);
    FAILS(EINVAL, "asked for", ramshot_file_read_page(file, PAGES, page, NULL));
    FAILS(EINVAL, "into is NULL", ramshot_file_read_page(file, 0, NULL, NULL));
    EXPECT(ramshot_file_verify(file, 2, count_calls, &calls) == 0 && calls > 0);
    FAILS(EINVAL, "threads is 257", ramshot_file_verify(file, 257, NULL, NULL));

    char *fresh = map();
    struct ramshot_ram *target = describe(fresh, "main"), *stranger = describe(memory, "stranger");
    FAILS(EINVAL, "does not fit", ramshot_file_restore(file, stranger, 1, NULL, 0));
    /* An increment without its parent, and with it. */
    char moved[4200];
    snprintf(moved, sizeof moved, "%s/elsewhere", folder);
    EXPECT(mkdir(moved, 0700) == 0);
    snprintf(moved, sizeof moved, "%s/elsewhere/full", folder);
    EXPECT(rename(full, moved) == 0);
    FAILS(ENODATA, "not found", ramshot_file_restore(child, target, 1, NULL, 0));
    EXPECT(rename(moved, full) == 0);
    char *whole = map();
    struct ramshot_ram *both = describe(whole, "main");
    EXPECT(ramshot_file_restore(child, both, 1, NULL, 0) == 0);
    for (uint64_t n = 0; n < PAGES; n++) {
        EXPECT(ramshot_file_read_page(child, n, page, &state) == 0);
        const char *is = state == RAMSHOT_PAGE_IN_PARENT ? expected + n * 4096 : page;
        EXPECT(memcmp(whole + n * 4096, is, 4096) == 0);
    }
    ramshot_ram_free(both);
    munmap(whole, MEM);
    FAILS(EINVAL, "ram is NULL", ramshot_file_restore(file, NULL, 1, NULL, 0));
    EXPECT(ramshot_file_restore(file, target, 2, &report, sizeof report) == 0);
    EXPECT(report.data_pages == PAGES / 2 && report.zero_pages == PAGES / 2);
    EXPECT(memcmp(fresh, expected, MEM) == 0);

    /* The VM restored from the file goes on with an increment on it. */
    struct log log = { .memory = fresh };
    struct ramshot_dirty_log own = { .take = take, .opaque = &log };
    struct ramshot_dirty_logs logs = { .logs = &own, .logs_count = 1, .restored_from = file };
    struct ramshot_dirty *dirty;
    EXPECT(ramshot_dirty_new(target, &logs, sizeof logs, &dirty) == 0 && log.calls == 1);
    struct ramshot_snapshot *snapshot;
    struct ramshot_options options = { .dirty = dirty };
    EXPECT(ramshot_prepare_increment(target, other, &options, sizeof options, &snapshot) == 0);
    ramshot_dirty_free(dirty); /* the snapshot has it */
    ramshot_ram_free(target);
    EXPECT(ramshot_begin(snapshot, RAMSHOT_DIRTY, NULL, 0) == 0);
    EXPECT(ramshot_finish(snapshot, NULL, 0) == 0);
    ramshot_free(snapshot);
    EXPECT(ramshot_file_device_state(child, NULL) == NULL);
    ramshot_file_close(child);
    ramshot_file_close(file);
    ramshot_file_close(NULL);
    ramshot_ram_free(stranger);
    munmap(fresh, MEM);

    /* A flipped bit is found, and named. */
    FILE *damaged = fopen(full, "r+b");
    EXPECT(damaged != NULL && fseek(damaged, 4096 * 2 + 17, SEEK_SET) == 0 && fputc('!', damaged) == '!');
    EXPECT(fclose(damaged) == 0 && ramshot_file_open(full, &file) == 0);
    FAILS(EBADMSG, "page 2", ramshot_file_verify(file, 1, NULL, NULL));
    FAILS(EBADMSG, "page 2", ramshot_file_read_page(file, 2, page, NULL));
    ramshot_file_close(file);
    EXPECT(truncate(full, 4096) == 0);
    FAILS(EBADMSG, "tail", ramshot_file_open(full, &file));
}

static void *has_no_error_yet(void *unused)
{
    EXPECT(strcmp(ramshot_last_error(), "") == 0);
    return unused;
}

int main(int argc, char **argv)
{
    EXPECT(argc == 2 && strlen(argv[1]) < sizeof folder);
    strcpy(folder, argv[1]);
    snprintf(full, sizeof full, "%s/full.ramshot", folder);
    snprintf(increment, sizeof increment, "%s/increment.ramshot", folder);
    snprintf(other, sizeof other, "%s/other.ramshot", folder);
    EXPECT(strcmp(ramshot_last_error(), "") == 0 && strchr(ramshot_version(), '.') != NULL);

    char list[64];
    memset(list, 0x55, sizeof list);
    if (ramshot_probe(list, 16) != 0) {
        fprintf(stderr, "%s\n", ramshot_last_error());
        return 77; /* no userfaultfd here */
    }
    EXPECT(memchr(list, 0, 16) != NULL && list[16] == 0x55);

    char *memory = map(), *expected = map();
    memset(memory, 1, MEM / 2);
    for (size_t page = 0; page < PAGES / 2; page++)
        memory[page * 4096 + 1] = (char)page;
    memcpy(expected, memory, MEM / 2);
    bad_ram(memory);
    struct ramshot_ram *ram = describe(memory, "main");
    EXPECT(ramshot_compatible(ram) == 0);
    bad_prepare(ram);
    bad_dirty(ram);
    cancelled(ram);
    cancelled_while_it_runs(ram);
    shared_memory(memory);
    struct log log = { .memory = memory };
    struct ramshot_dirty_log own = { .take = take, .opaque = &log };
    struct ramshot_dirty_logs logs = { .logs = &own, .logs_count = 1 };
    struct ramshot_dirty *dirty;
    EXPECT(ramshot_dirty_new(ram, &logs, sizeof logs, &dirty) == 0);
    live(ram, memory, dirty);
    increments(ram, memory, dirty, &log);
    ramshot_dirty_free(dirty);
    files(memory, expected);
    ramshot_ram_free(ram);
    munmap(memory, MEM);
    munmap(expected, MEM);

    pthread_t thread;
    EXPECT(pthread_create(&thread, NULL, has_no_error_yet, NULL) == 0 && pthread_join(thread, NULL) == 0);
    puts("all of it");
    return 0;
}
