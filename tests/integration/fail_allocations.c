// Allocations that fail when told, for LD_PRELOAD. A site is one chain of callers: it is written
// down as the process comes by, and may be made to fail from then on, by whoever maps the file
// named by FAIL_ALLOCATIONS_FILE (struct control; fail_allocations.py is its other side).
//
//     malloc --> whose? --> known callers that abort: never failed
//                  '--> einsumd, or a library: site = hash of the callers' places in their files,
//                       up to the fifth that is einsumd's --> table of sites, or NULL
//
// The C library's own frames are passed over, so that strdup is its caller's.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FRAMES = 20, MODULES = 128, SITES = 4096, NAME_BYTES = 56, OURS_FRAMES = 5 };
enum mode { MODE_OFF, MODE_RECORD, MODE_FAIL };

struct frame {
    uint32_t module; // index into modules
    uint32_t offset; // of the return address, from where the file is mapped
};

struct site {
    _Atomic uint64_t hash; // 0: free
    uint32_t owner;        // module
    _Atomic uint32_t hits;
    char what[16];
    _Atomic uint32_t frames_n; // last written
    uint32_t unused;
    struct frame frames[FRAMES];
};

struct control {
    _Atomic uint32_t mode;
    _Atomic uint32_t times; // how many more are to fail
    _Atomic uint64_t target;
    _Atomic uint32_t failed;
    uint32_t modules_n;
    char modules[MODULES][NAME_BYTES];
    struct site sites[SITES];
};

static struct control *control;
static struct module {
    uintptr_t begin, end;
    bool ours, passed_over, never; // never: it aborts, or does not ask
} modules[MODULES];
static uint32_t modules_n;
static __thread bool busy __attribute__((tls_model("initial-exec")));
static atomic_bool main_begun; // before it are constructors, which have nobody to tell

// ---- what is called in our stead

typedef int main_fn(int, char **, char **);
static main_fn *daemons_main;

static int begin_main(int argc, char **argv, char **environment)
{
    atomic_store(&main_begun, true);
    return daemons_main(argc, argv, environment);
}

int __libc_start_main(main_fn *main, int argc, char **argv, void (*init)(void), void (*fini)(void),
                      void (*loader_fini)(void), void *stack_end)
{
    int (*next)(main_fn *, int, char **, void (*)(void), void (*)(void), void (*)(void), void *);
    *(void **)&next = dlsym(RTLD_NEXT, "__libc_start_main");
    daemons_main = main;
    return next(begin_main, argc, argv, init, fini, loader_fini, stack_end);
}

#define NEXT(name) static __typeof__(name) *next_##name
NEXT(malloc);
NEXT(calloc);
NEXT(realloc);
NEXT(aligned_alloc);
NEXT(posix_memalign);
NEXT(reallocarray);
NEXT(mmap);
NEXT(pthread_create);
NEXT(eventfd);
NEXT(socket);
NEXT(open);
NEXT(fopen);
static void (*next_free)(void *);

// For dlsym, which allocates.
static char early[16384];
static size_t early_used;

static void *early_alloc(size_t bytes)
{
    void *memory = early + early_used;
    early_used += (bytes + 15) & ~(size_t)15;
    return early_used <= sizeof early ? memory : NULL;
}

static void find_next(void)
{
    static bool finding;
    if (next_free || finding)
        return;
    finding = true;
#define FIND(name) *(void **)(&next_##name) = dlsym(RTLD_NEXT, #name)
    FIND(malloc);
    FIND(calloc);
    FIND(realloc);
    FIND(aligned_alloc);
    FIND(posix_memalign);
    FIND(reallocarray);
    FIND(mmap);
    FIND(pthread_create);
    FIND(eventfd);
    FIND(socket);
    FIND(open);
    FIND(fopen);
    FIND(free);
    finding = false;
}

// ---- whose an address is

// gpr_malloc and C++'s new abort, whoever they are asked by; the loader's and NSS's libraries are
// the C library's business.
static bool never_fails(const char *name)
{
    static const char *const names[] = {"libgrpc",  "libgpr",  "libstdc++", "libabsl",
                                        "libre2",   "libupb",  "libcares",  "libaddress_sorting",
                                        "libgcc_s", "libasan", "libubsan",  "liblsan"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strncmp(name, names[i], strlen(names[i])) == 0)
            return true;
    return false;
}

static int add_module(struct dl_phdr_info *info, size_t bytes, void *unused)
{
    (void)bytes, (void)unused;
    if (modules_n == MODULES)
        return 1;
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *name = slash ? slash + 1 : info->dlpi_name;
    struct module *module = &modules[modules_n];
    module->begin = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        uintptr_t end = info->dlpi_addr + segment->p_vaddr + segment->p_memsz;
        if (segment->p_type == PT_LOAD && end > module->end)
            module->end = end;
    }
    module->ours = modules_n == 0;
    module->passed_over = strncmp(name, "libc.so", 7) == 0 || strncmp(name, "ld-linux", 8) == 0 ||
                          strncmp(name, "fail_alloc", 10) == 0 || strncmp(name, "libasan", 7) == 0;
    module->never = !module->ours && never_fails(name);
    strncpy(control->modules[modules_n++], module->ours ? "einsumd" : name, NAME_BYTES - 1);
    return 0;
}

static struct module *module_of(const void *address)
{
    for (uint32_t i = 0; i < modules_n; i++)
        if ((uintptr_t)address - modules[i].begin < modules[i].end - modules[i].begin)
            return &modules[i];
    return NULL;
}

__attribute__((constructor)) static void map_control(void)
{
    find_next();
    const char *path = getenv("FAIL_ALLOCATIONS_FILE");
    int fd = path ? next_open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    busy = true;
    void *map = next_mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) {
        control = map;
        dl_iterate_phdr(add_module, NULL);
        control->modules_n = modules_n;
        void *warm[2];
        backtrace(warm, 2); // loads what it needs
    }
    busy = false;
}

// ---- sites

static struct site *find_site(uint64_t hash)
{
    for (uint32_t i = 0; i < SITES; i++) {
        struct site *site = &control->sites[(hash + i) % SITES];
        uint64_t was = 0;
        if (atomic_load(&site->hash) == hash ||
            atomic_compare_exchange_strong(&site->hash, &was, hash) || was == hash)
            return site;
    }
    return NULL;
}

// The chain of callers, nearest first; 0 if it is nobody's who could be told.
static uint32_t walk(struct frame *frames, uint64_t *hash)
{
    void *stack[FRAMES + 12];
    int stack_n = backtrace(stack, FRAMES + 12);
    uint32_t n = 0, ours = 0;
    *hash = 14695981039346656037u;
    for (int i = 0; i < stack_n && n < FRAMES && ours < OURS_FRAMES; i++) {
        const struct module *module = module_of(stack[i]);
        if (n == 0 && (!module || module->passed_over))
            continue;
        if (!module || (n == 0 && module->never))
            break;
        frames[n] = (struct frame){(uint32_t)(module - modules),
                                   (uint32_t)((uintptr_t)stack[i] - module->begin)};
        *hash = (*hash ^ frames[n].module) * 1099511628211u;
        *hash = (*hash ^ frames[n].offset) * 1099511628211u;
        n++;
        ours += module->ours;
    }
    *hash += *hash == 0;
    return ours > 0 ? n : 0; // no caller of ours: the library's own thread or constructor
}

static void record(const char *what, uint64_t hash, const struct frame *frames, uint32_t frames_n)
{
    struct site *site = find_site(hash);
    if (!site || atomic_fetch_add(&site->hits, 1) > 0)
        return;
    site->owner = frames[0].module;
    strncpy(site->what, what, sizeof site->what - 1);
    memcpy(site->frames, frames, frames_n * sizeof *frames);
    atomic_store(&site->frames_n, frames_n);
}

// Whether this one is to fail. `caller`: the nearest, which decides quickly for most.
static bool fails(const char *what, const void *caller)
{
    if (!control || busy || !atomic_load_explicit(&main_begun, memory_order_acquire))
        return false;
    uint32_t mode = atomic_load_explicit(&control->mode, memory_order_acquire);
    if (mode == MODE_OFF)
        return false;
    const struct module *module = module_of(caller);
    if (!module || module->never)
        return false;
    busy = true;
    int errno_before = errno;
    struct frame frames[FRAMES];
    uint64_t hash;
    uint32_t frames_n = walk(frames, &hash);
    bool failing = false;
    if (frames_n > 0 && mode == MODE_RECORD) {
        record(what, hash, frames, frames_n);
    } else if (frames_n > 0 && hash == atomic_load(&control->target)) {
        uint32_t left = atomic_load(&control->times);
        while (left > 0 && !atomic_compare_exchange_weak(&control->times, &left, left - 1))
            ;
        failing = left > 0;
        if (failing)
            atomic_fetch_add(&control->failed, 1);
    }
    errno = errno_before;
    busy = false;
    return failing;
}

#define FAILS(what) fails(what, __builtin_return_address(0))

// ---- what fails

void *malloc(size_t bytes)
{
    find_next();
    if (!next_malloc)
        return early_alloc(bytes);
    if (FAILS("malloc")) {
        errno = ENOMEM;
        return NULL;
    }
    return next_malloc(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    find_next();
    if (!next_calloc)
        return early_alloc(n * bytes);
    if (FAILS("calloc")) {
        errno = ENOMEM;
        return NULL;
    }
    return next_calloc(n, bytes);
}

void *realloc(void *memory, size_t bytes)
{
    find_next();
    if (FAILS("realloc")) {
        errno = ENOMEM;
        return NULL;
    }
    return next_realloc(memory, bytes);
}

void *reallocarray(void *memory, size_t n, size_t bytes)
{
    if (FAILS("reallocarray")) {
        errno = ENOMEM;
        return NULL;
    }
    bool was = busy;
    busy = true; // it calls realloc
    void *grown = next_reallocarray(memory, n, bytes);
    busy = was;
    return grown;
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    if (FAILS("aligned_alloc")) {
        errno = ENOMEM;
        return NULL;
    }
    return next_aligned_alloc(alignment, bytes);
}

int posix_memalign(void **memory, size_t alignment, size_t bytes)
{
    if (FAILS("posix_memalign"))
        return ENOMEM;
    return next_posix_memalign(memory, alignment, bytes);
}

void free(void *memory)
{
    if ((char *)memory >= early && (char *)memory < early + sizeof early)
        return;
    find_next();
    next_free(memory);
}

void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    find_next();
    if (FAILS("mmap")) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return next_mmap(address, bytes, protection, flags, fd, offset);
}

void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    return mmap(address, bytes, protection, flags, fd, offset);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                   void *argument)
{
    if (FAILS("pthread_create"))
        return EAGAIN;
    return next_pthread_create(thread, attributes, run, argument);
}

int eventfd(unsigned value, int flags)
{
    if (FAILS("eventfd")) {
        errno = EMFILE;
        return -1;
    }
    return next_eventfd(value, flags);
}

int socket(int domain, int type, int protocol)
{
    if (FAILS("socket")) {
        errno = EMFILE;
        return -1;
    }
    return next_socket(domain, type, protocol);
}

int open(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, int) : 0;
    va_end(arguments);
    find_next();
    if (FAILS("open")) {
        errno = EMFILE;
        return -1;
    }
    return next_open(path, flags, mode);
}

FILE *fopen(const char *path, const char *mode)
{
    if (FAILS("fopen")) {
        errno = EMFILE;
        return NULL;
    }
    return next_fopen(path, mode);
}
