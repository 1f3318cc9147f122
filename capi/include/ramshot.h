// ramshot: snapshots a running virtual machine's memory without stopping it, and restores it.
//
// Generated from the Rust source by `cargo xtask header`; do not edit. docs/C.md is the guide.
//
// Results: functions that return int return 0, or a negative errno; ramshot_last_error() then has a sentence, per thread.
// New handles are written through the last argument, which becomes NULL if the call fails.
//
// Rules, for every function:
// - A pointer is NULL only where that is said to be allowed; elsewhere the answer is -EINVAL. One that is not NULL must be
//   valid for the call, a handle not freed. Handles are freed once, by their own function, with no other call on them
//   under way. Whoever frees one need not keep an order: what a snapshot needs it holds itself.
// - Handles may be used from any thread, and by several at a time.
// - Structures are passed with their size: sizeof of the type that the program was compiled with. A field that is 0 has its
//   default, so clear a structure before it is filled in. Strings end with a zero byte.
// - After fork() a child must not use handles that it inherited.
// - Nothing here throws or calls exit. A library built with panic=abort aborts on a bug of its own, otherwise the answer is
//   -ENOTRECOVERABLE.
//
// Order: ramshot_ram_new, ramshot_prepare, [pause the VM] ramshot_begin [resume it], ramshot_finish, ramshot_free.

#ifndef RAMSHOT_H
#define RAMSHOT_H

#include <stddef.h>
#include <stdint.h>

// A page that is all zeros.
#define RAMSHOT_PAGE_ZERO 0

// A page whose bytes are in the file.
#define RAMSHOT_PAGE_DATA 1

// A page of an increment that is as it is in the snapshot below.
#define RAMSHOT_PAGE_IN_PARENT 2

// An existing snapshot file of that name is replaced, atomically, when the new one is complete. Without: -EEXIST.
#define RAMSHOT_REPLACE 1

// The commit does not wait until the image is on stable storage: a power cut can leave a file that does not open.
#define RAMSHOT_NO_SYNC 2

// Pages are written through the page cache. Without: past it, where the file system can.
#define RAMSHOT_NO_DIRECT 4

// When a vCPU waits for a page and the pool is full, the snapshot is cancelled (-ENOBUFS). Without: the vCPU waits until
// the image writer has made room.
#define RAMSHOT_CANCEL_WHEN_FULL 8

// Guest RAM: protected at T0, captured in the background. The default.
#define RAMSHOT_TRACKED 0

// Nobody writes to it while the VM runs (ROM): saved in the background, neither registered nor protected.
#define RAMSHOT_READ_ONLY 1

// Guest-visible memory that the VMM writes without a fault that ramshot sees (ROM devices, flash): copied inside the
// pause. Keep such regions small.
#define RAMSHOT_IN_PAUSE 2

// Not part of the image, and need not be mapped.
#define RAMSHOT_IGNORED 3

// `fd` and `fd_offset` are given.
#define RAMSHOT_REGION_FD 1

// All of RAM: a full snapshot.
#define RAMSHOT_ALL 0

// What was written since the base (after ramshot_prepare_increment), or since the last copy (after ramshot_precopy).
#define RAMSHOT_DIRTY 1

// Follows the writes to one VM's RAM from snapshot to snapshot.
struct ramshot_dirty;

// An open snapshot file. May be used by several threads at a time.
struct ramshot_file;

// Guest RAM of this process.
struct ramshot_ram;

// One snapshot.
struct ramshot_snapshot;

// Reports that `len` bytes of this process's memory from `host` on were written. `context` is what the log was called with.
// Memory that is no guest RAM is passed over.
typedef void (*ramshot_dirty_report)(void *context, void *host, uint64_t len);

// Reports, by calling `report` with `context`, every range that was written since the last call, and starts afresh. What is
// written while it runs is reported now or by the next call. More may be reported than was written, less never.
// Returns 0, or a negative errno; what was not reported then must be by a later call.
//
// Called from whatever thread calls ramshot, inside ramshot_dirty_new, ramshot_dirty_written, ramshot_arm_ahead,
// ramshot_precopy and ramshot_begin (that is: inside the pause), never from two threads at a time. It must not call
// ramshot, longjmp or throw.
typedef int (*ramshot_dirty_take)(void *opaque, ramshot_dirty_report report, void *context);

// A dirty log of the caller's own.
struct ramshot_dirty_log {
  // Reports what was written. Not NULL.
  ramshot_dirty_take take;
  // Passed to `take` as it is. Must stay valid until the tracking, and every snapshot prepared with it, has been freed.
  void *opaque;
};

// A memory slot of a KVM VM, registered with KVM_MEM_LOG_DIRTY_PAGES.
struct ramshot_kvm_slot {
  // Where it is mapped in this process.
  void *host;
  // Its length in bytes, exactly as it was registered: the kernel writes one bit a page of it.
  uint64_t len;
  // Number of the slot, address space in the upper 16 bits.
  uint32_t slot;
  // Must be 0.
  uint32_t reserved;
};

// Where a dirty tracking learns what is written. Together the logs must see every writer of guest RAM. Fields that are 0
// have their default.
struct ramshot_dirty_logs {
  // Logs of the caller's own.
  const struct ramshot_dirty_log *logs;
  // How many.
  size_t logs_count;
  // Slots of a KVM VM, whose log ramshot reads itself (KVM_GET_DIRTY_LOG): nobody else may.
  const struct ramshot_kvm_slot *kvm_slots;
  // How many. 0: no KVM.
  size_t kvm_slots_count;
  // If there are slots: the VM's descriptor; duplicated.
  int kvm_vm_fd;
  // Must be 0.
  uint32_t reserved;
  // The snapshot that the VM was just restored from, before its first vCPU runs: the next snapshot can be an increment
  // on it. NULL: the first snapshot taken with this tracking is a full one. Not kept.
  const struct ramshot_file *restored_from;
};

// What is in a snapshot. Pages have 4096 bytes.
struct ramshot_file_contents {
  // Its id.
  uint8_t id[16];
  // Id of the snapshot that it is an increment on; all zero if it is a full one.
  uint8_t parent_id[16];
  // Pages of RAM.
  uint64_t pages;
  // Of those, with data in this file.
  uint64_t data_pages;
  // Of those, known to be zero.
  uint64_t zero_pages;
  // Of those, in the snapshot below.
  uint64_t in_parent_pages;
  // Apparent size of the file in bytes.
  uint64_t image_bytes;
  // Length of the device state in bytes.
  uint64_t device_state_len;
  // RAM blocks, ignored ones included.
  uint32_t blocks;
  // 1 if it is an increment, else 0.
  uint32_t increment;
};

// A RAM block as the snapshot has it.
struct ramshot_block {
  // The region's name, at most 47 bytes and a zero.
  char name[48];
  // Guest-physical address, in bytes.
  uint64_t guest;
  // Length of the mapping in bytes.
  uint64_t len;
  // How much of it was in use, in bytes: what the file holds, unless the block is ignored.
  uint64_t used;
  // Host page size at capture, in bytes. A restore may use another.
  uint64_t page_size;
  // Its first page: byte first_page * 4096 of the file.
  uint64_t first_page;
  // RAMSHOT_TRACKED, RAMSHOT_READ_ONLY, RAMSHOT_IN_PAUSE or RAMSHOT_IGNORED.
  uint32_t treatment;
  // 0.
  uint32_t reserved;
};

// Hears of pages done and their total. Called by the thread that called ramshot_file_verify. Must not longjmp or throw.
typedef void (*ramshot_verify_progress)(void *opaque, uint64_t done, uint64_t total);

// What was restored. Pages have 4096 bytes.
struct ramshot_restore_report {
  // Pages written to guest RAM, each checked.
  uint64_t data_pages;
  // Pages left as they were, because they are zero.
  uint64_t zero_pages;
};

// A piece of guest RAM: one mapping of this process. Fields that are 0 have their default.
struct ramshot_region {
  // By this name it is found again at restore: UTF-8, 1 to 47 bytes, different for each region.
  const char *name;
  // Where it is mapped in this process; aligned to its page size.
  void *host;
  // Guest-physical address, in bytes.
  uint64_t guest;
  // Length of the mapping in bytes, a multiple of its page size.
  uint64_t len;
  // How much of it is in use and belongs into the image, in bytes; a multiple of the page size. 0: all of it.
  uint64_t used;
  // RAMSHOT_TRACKED, RAMSHOT_READ_ONLY, RAMSHOT_IN_PAUSE or RAMSHOT_IGNORED.
  uint32_t treatment;
  // 0 or RAMSHOT_REGION_FD.
  uint32_t flags;
  // With RAMSHOT_REGION_FD: where the region starts in the file, as it was passed to mmap, in bytes.
  uint64_t fd_offset;
  // With RAMSHOT_REGION_FD: the file that is mapped there (memfd, tmpfs, hugetlbfs); duplicated, so the caller may close
  // it. Without it, all of a shared mapping is taken to hold data, unless the process has CAP_CHECKPOINT_RESTORE.
  int fd;
  // Must be 0.
  uint32_t reserved;
};

// Settings of a snapshot. All zero is right for most; fields that are 0 have their default.
struct ramshot_options {
  // Size of the pool in which captured pages wait until they are written, in bytes: 1 MiB to 4 GiB. Default 64 MiB.
  uint64_t pool_bytes;
  // Most bytes that are copied while a vCPU waits, if its neighbours are pending too. Default 2 MiB.
  uint64_t around_max;
  // Fewest bytes that are copied for a fault, if its neighbours are pending too. Default 64 KiB.
  uint64_t around_min;
  // Threads that scan and copy: 1 to 16. Default 1.
  uint32_t workers;
  // Threads that write the image: 1 to 16. Default 1.
  uint32_t writers;
  // RAMSHOT_REPLACE, RAMSHOT_NO_SYNC, RAMSHOT_NO_DIRECT, RAMSHOT_CANCEL_WHEN_FULL.
  uint32_t flags;
  // Must be 0.
  uint32_t reserved;
  // Follows what is written, so that an increment can build on this snapshot, and for pre-copy. NULL: none. The snapshot
  // keeps it; it may be freed any time.
  const struct ramshot_dirty *dirty;
};

// How far a snapshot is.
struct ramshot_progress_info {
  // Pages (of 4096 bytes) that belong to the snapshot; 0 before ramshot_begin.
  uint64_t pages_total;
  // Of those, captured and released: the guest writes there freely again.
  uint64_t pages_captured;
  // Of those, captured because a writer waited.
  uint64_t pages_by_fault;
  // Write faults so far.
  uint64_t write_faults;
  // 1 when every page is captured; writing the image may go on. Else 0.
  uint32_t captured;
  // 1 when the snapshot has ended without an image; ramshot_finish says why. Else 0.
  uint32_t ended;
};

// A finished snapshot, in figures. Pages have 4096 bytes.
struct ramshot_report {
  // Id of the snapshot, 128 bits.
  uint8_t id[16];
  // The whole call of ramshot_begin, in nanoseconds: what ramshot adds to the pause.
  uint64_t begin_ns;
  // The part of it that found and protected the pages, in nanoseconds.
  uint64_t arm_ns;
  // From ramshot_begin to the last page released, in nanoseconds.
  uint64_t capture_ns;
  // From ramshot_begin to the image committed, in nanoseconds.
  uint64_t total_ns;
  // Pages that belonged to the snapshot at T0. Memory that was never touched is not among them.
  uint64_t pages_total;
  // Of those, captured because a writer waited for them or their neighbours.
  uint64_t pages_by_fault;
  // Of those, captured by ramshot_before_discard.
  uint64_t pages_by_discard;
  // Of those, captured inside the pause.
  uint64_t pages_in_pause;
  // Of those, all zeros: they take no place in the file.
  uint64_t pages_zero;
  // Write faults.
  uint64_t write_faults;
  // Faults that waited until the image writer had made room in the pool.
  uint64_t faults_held;
  // Faults at addresses of no region; released at once.
  uint64_t foreign_faults;
  // Longest time from a fault read to its writer released, in microseconds.
  uint64_t fault_max_us;
  // The time that half of the faults do not exceed, in microseconds.
  uint64_t fault_p50_us;
  // The time that 99 % of the faults do not exceed, in microseconds.
  uint64_t fault_p99_us;
  // Apparent size of the file in bytes.
  uint64_t image_bytes;
  // Bytes written to it.
  uint64_t written_bytes;
  // How often pages were copied ahead by ramshot_precopy.
  uint64_t precopy_passes;
  // Pages copied then, all passes together.
  uint64_t precopy_pages;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Follows the writes to `ram` from now on. Every log is read once, which shows that it is on. `size` is sizeof *logs.
//
// The first snapshot prepared with it (ramshot_options.dirty) is a full one and becomes its base; an increment holds what
// changed since the base, and becomes the base when it is committed. A snapshot that fails changes nothing.
//
// Returns 0 and a handle in *dirty, to be freed with ramshot_dirty_free; or -EINVAL, or what a log answered.
int ramshot_dirty_new(const struct ramshot_ram *ram,
                      const struct ramshot_dirty_logs *logs,
                      size_t size,
                      struct ramshot_dirty **dirty);

// Reports a change that no log sees (a DMA or a discard by the VMM): `len` bytes from `host` on. Before or after it
// happens, but before the VM is paused for the next snapshot. From any thread.
//
// Returns 0, or -EINVAL.
int ramshot_dirty_mark(const struct ramshot_dirty *dirty,
                       void *host,
                       uint64_t len);

// Reads the logs: *bytes is what was written since the last snapshot began, in whole pages. From any thread.
//
// Returns 0, -EINVAL, or what a log answered.
int ramshot_dirty_written(const struct ramshot_dirty *dirty, uint64_t *bytes);

// Frees the handle; NULL is allowed. Snapshots prepared with it may still be there.
void ramshot_dirty_free(struct ramshot_dirty *dirty);

// What went wrong in the last call of this thread that failed: a sentence in UTF-8 that names the thing, the value and the
// way out. Empty if none has failed yet. Successful calls leave it as it is.
//
// The text belongs to the library and stays valid until the next call of this thread fails, or the thread ends.
const char *ramshot_last_error(void);

// Opens a snapshot and checks everything but the bytes of its pages.
//
// Returns 0 and a handle in *file, to be freed with ramshot_file_close; or -EINVAL, -EBADMSG (not a complete snapshot, or
// damaged), -ENOTSUP (of a newer format), -ENOMEM, or the system's error.
int ramshot_file_open(const char *path,
                      struct ramshot_file **file);

// Closes the file; NULL is allowed. What ramshot_file_device_state gave is gone then.
void ramshot_file_close(struct ramshot_file *file);

// What is in the snapshot, in *info; `size` is sizeof *info.
//
// Returns 0, or -EINVAL.
int ramshot_file_info(const struct ramshot_file *file, struct ramshot_file_contents *info, size_t size);

// RAM block number `index` (from 0, as many as ramshot_file_info says), in *block; `size` is sizeof *block.
//
// Returns 0, or -EINVAL.
int ramshot_file_block(const struct ramshot_file *file,
                       uint32_t index,
                       struct ramshot_block *block,
                       size_t size);

// The device state as it was given to ramshot_begin: its address, and its length in *len (NULL is allowed). Valid until the
// file is closed. NULL if there is none, or `file` is NULL.
const void *ramshot_file_device_state(const struct ramshot_file *file,
                                      uint64_t *len);

// Reads page number `page` (its place in the file is page * 4096) into the 4096 bytes at `into`, and checks it. *state (NULL
// is allowed) becomes RAMSHOT_PAGE_DATA, _ZERO, or _IN_PARENT: `into` is left as it was then, and the parent must be asked.
//
// Returns 0, -EINVAL, -EBADMSG (damaged), or the system's error.
int ramshot_file_read_page(const struct ramshot_file *file,
                           uint64_t page,
                           void *into,
                           uint32_t *state);

// Reads the whole snapshot and checks every page, on `threads` threads (1 to 256; 0 is taken for 1). `progress` hears how
// far it is, unless it is NULL; `opaque` is passed to it.
//
// Returns 0; -EBADMSG: ramshot_last_error names the first page that is wrong; -EINVAL; or the system's error.
int ramshot_file_verify(const struct ramshot_file *file,
                        uint32_t threads,
                        ramshot_verify_progress progress,
                        void *opaque);

// Fills `ram` from a snapshot, on `threads` threads (1 to 256; 0 is taken for 1), reading straight into it and checking
// every page there. The regions must be those of the snapshot by name, guest address and length in use. They must be
// fresh: zero pages are not written. No vCPU may run yet. `report` may be NULL; `size` is sizeof *report. The parents of an
// increment are looked for beside it, by id and checksum.
//
// Returns 0; -EINVAL (another RAM layout), -ENODATA (a parent is not there) or -ESTALE (another file has taken this one's
// place, or a parent's), and nothing was touched; -EBADMSG (damaged), -EACCES (a region is not writable) or the system's error, and what is in the
// regions is undefined.
int ramshot_file_restore(const struct ramshot_file *file,
                         const struct ramshot_ram *ram,
                         uint32_t threads,
                         struct ramshot_restore_report *report,
                         size_t size);

// Version of the library: three numbers with dots.
const char *ramshot_version(void);

// Whether writes to guest RAM can be tracked by this process on this system. Costs nothing, changes nothing.
//
// `text`, unless it is NULL, receives a list for people of what is there and what is missing: at most `size` bytes, the
// terminating zero included.
//
// Returns 0, or -ENOTSUP: ramshot_last_error says what is missing, why, and what to do.
int ramshot_probe(char *text,
                  size_t size);

// Whether every region of `ram` could be tracked now. Registers each with a throw-away userfaultfd and unregisters it.
//
// Returns 0, or -ENOTSUP: ramshot_last_error says which region, what is missing, and what to do.
int ramshot_compatible(const struct ramshot_ram *ram);

// Describes guest RAM: `count` regions of `region_size` (= sizeof *regions) bytes each. What the memory is made of is asked
// of the kernel. Nothing is changed or protected.
//
// Until the ram, and every snapshot and dirty tracking made from it, has been freed, every region that is not
// RAMSHOT_IGNORED must stay mapped at its address, readable, and writable if a snapshot is restored into it. Discarding
// its content (madvise) is allowed; see ramshot_before_discard.
//
// Returns 0 and a handle in *ram, to be freed with ramshot_ram_free; or -EINVAL for regions that are no guest RAM (not mapped,
// not aligned, overlapping, of mixed pages, ...), or the system's error for /proc/self/maps.
int ramshot_ram_new(const struct ramshot_region *regions,
                    size_t count,
                    size_t region_size,
                    struct ramshot_ram **ram);

// Frees the handle; NULL is allowed. Snapshots and dirty trackings made from it may still be there.
void ramshot_ram_free(struct ramshot_ram *ram);

// Prepares a snapshot of `ram` into the file `path`: opens and registers a userfaultfd, creates the file (under a name of its own
// until it is complete), allocates the pool, starts the threads. The VM runs meanwhile. Belongs before a seccomp filter.
// `options` may be NULL; `size` is sizeof *options.
//
// Returns 0 and a handle in *snapshot, to be freed with ramshot_free; or -EINVAL, -E2BIG, -ENOTSUP (writes cannot be tracked
// here), -EEXIST (and RAMSHOT_REPLACE is not set), -EBUSY (another snapshot is being written to that file, or uses that
// dirty tracking), or the system's error. Nothing is left behind then.
int ramshot_prepare(const struct ramshot_ram *ram,
                    const char *path,
                    const struct ramshot_options *options,
                    size_t size,
                    struct ramshot_snapshot **snapshot);

// Prepares an increment: a snapshot that holds what was written since the last one committed with the same options->dirty,
// which must be given. To be begun with RAMSHOT_DIRTY.
//
// Returns as ramshot_prepare, and -ENODATA if there is no snapshot to build on.
int ramshot_prepare_increment(const struct ramshot_ram *ram,
                              const char *path,
                              const struct ramshot_options *options,
                              size_t size,
                              struct ramshot_snapshot **snapshot);

// Protects memory ahead of T0, while the guest runs, so that the pause depends on what the guest writes meanwhile and not on
// its size. Right before the VM is paused, or not at all.
//
// Returns 0, or why memory could not be protected; the snapshot is over then.
int ramshot_arm_ahead(struct ramshot_snapshot *snapshot);

// Copies everything into the image while the guest runs and writes on; at most `passes` times (0 is taken for 1). What is
// written meanwhile is copied again, at T0. For guests that write little and must not wait for it. Needs options->dirty; to be begun with
// RAMSHOT_DIRTY. ramshot_arm_ahead belongs after it. Takes as long as the writing does.
//
// Returns 0, or why it failed; the snapshot is over then.
int ramshot_precopy(struct ramshot_snapshot *snapshot,
                    uint32_t passes);

// T0: finds and protects the pages. To be called while every vCPU and every other writer of guest RAM is stopped; when it
// returns, with or without error, the VM may run. The only call inside the pause.
//
// `pending` is RAMSHOT_ALL or RAMSHOT_DIRTY. The `device_state_len` bytes at `device_state` (NULL if there are none) go into the
// image as they are; they are copied.
//
// Returns 0; or -EINVAL (not prepared, or `pending` does not go with how it was), -ECANCELED, or why memory could not be
// protected. The snapshot is over then, the guest unharmed. A `pending` that is neither leaves it as it was.
int ramshot_begin(struct ramshot_snapshot *snapshot,
                  uint32_t pending,
                  const void *device_state,
                  size_t device_state_len);

// How far it is, in *progress; `size` is sizeof *progress. From any thread, also while ramshot_finish waits.
//
// Returns 0, or -EINVAL.
int ramshot_progress(struct ramshot_snapshot *snapshot, struct ramshot_progress_info *progress, size_t size);

// Ends it without an image; returns at once, the guest is free within a moment. ramshot_finish, or ramshot_begin if that
// comes first, then says -ECANCELED. After the last page was written it has no effect any more. From any thread, also while
// ramshot_finish waits; not from a signal handler.
//
// Returns 0, or -EINVAL.
int ramshot_cancel(struct ramshot_snapshot *snapshot);

// To be called before the VMM discards guest RAM (balloon, virtio-mem; madvise, fallocate): captures what is pending of the
// `len` bytes at `host` and returns when the discard is safe. Costs nothing before ramshot_begin and for pages captured
// already. From any thread, also while ramshot_finish waits; not while ramshot_begin runs, since nothing may discard in the
// pause.
//
// Returns 0; or -EINVAL; or why the snapshot has ended: the discard is safe then, too.
int ramshot_before_discard(struct ramshot_snapshot *snapshot,
                           void *host,
                           uint64_t len);

// Waits until every page is captured and written, and commits the image: only then the file has its name. `report` may be
// NULL; `size` is sizeof *report. Progress, cancel and discards from other threads go on meanwhile.
//
// Returns 0; or -EINVAL (not begun, or over), -ECANCELED, -ENOSPC, -ENOBUFS (RAMSHOT_CANCEL_WHEN_FULL), -EFAULT (memory was
// discarded or unmapped before it was captured), ... There is no image then, what was at the path before is still there, and
// the guest is unharmed. Either way only ramshot_free is left to be called.
int ramshot_finish(struct ramshot_snapshot *snapshot,
                   struct ramshot_report *report,
                   size_t size);

// Frees the handle; NULL is allowed. A snapshot that is not finished is cancelled, and waited for: when it returns, no thread
// of it is left and nothing is protected. No other call on it may be under way.
void ramshot_free(struct ramshot_snapshot *snapshot);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* RAMSHOT_H */
