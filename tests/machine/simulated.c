// Fibers by ucontext, with what the sanitizers must be told of them, and what stands on them.
#include "simulated.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

enum { STACK_BYTES = 256 << 10, MUTEXES_MAX = 4, NOBODY = -2 };

struct fiber {
    ucontext_t context;
    void *stack; // kept from run to run
    void *(*run)(void *);
    void *argument;
    bool ended;
    const pthread_mutex_t *blocked_on; // NULL: on none
    _Atomic uint32_t *sleeps_on;       // NULL: awake
    uint64_t sleeps_until_ns;
    bool woken;
    void *tsan, *fake_stack;
};

struct mutex {
    const pthread_mutex_t *mutex;
    int holder;
};

struct sim_hooks sim_hooks;

static struct fiber fibers[SIM_FIBERS_MAX];
static int fibers_n, current = SIM_DRIVER;
static ucontext_t driver;
static void *driver_fake_stack;
#if defined(__SANITIZE_ADDRESS__)
static const void *driver_stack;
static size_t driver_stack_bytes;
#endif
#if defined(__SANITIZE_THREAD__)
static void *driver_tsan;
#endif
static struct mutex mutexes[MUTEXES_MAX];
static uint64_t time_ns, dice;
static uint32_t preempt_one_in;

// ---- chance and time

uint64_t sim_random(void) // splitmix64
{
    uint64_t mixed = dice += 0x9e3779b97f4a7c15;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
    return mixed ^ mixed >> 31;
}

uint32_t sim_below(uint32_t n)
{
    return (uint32_t)((sim_random() >> 32) * n >> 32);
}

bool sim_chance(uint32_t percent)
{
    return sim_below(100) < percent;
}

uint64_t sim_time(void)
{
    return time_ns;
}

void sim_pass(uint64_t ns)
{
    time_ns += ns;
}

void sim_go_to(uint64_t ns)
{
    if (ns > time_ns)
        time_ns = ns;
}

uint64_t sim_now_ns(void)
{
    sim_preempt();
    return time_ns += sim_below(256);
}

// ---- fibers

// Called on the new stack.
static void arrived(void *fake_stack)
{
#if defined(__SANITIZE_ADDRESS__)
    const void *from;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack, &from, &bytes);
    if (current != SIM_DRIVER) {
        driver_stack = from;
        driver_stack_bytes = bytes;
    }
#else
    (void)fake_stack;
#endif
}

static void to_driver(void)
{
    struct fiber *from = &fibers[current];
    current = SIM_DRIVER;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from->ended ? NULL : &from->fake_stack, driver_stack,
                                   driver_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(driver_tsan, 0);
#endif
    swapcontext(&from->context, &driver);
    arrived(from->fake_stack);
}

static void fiber_main(void)
{
    arrived(NULL);
    struct fiber *fiber = &fibers[current];
    fiber->run(fiber->argument);
    fiber->ended = true;
    to_driver();
}

void sim_begin(uint64_t seed, uint32_t one_in)
{
    for (int i = 0; i < fibers_n; i++) {
        ASSERT(fibers[i].ended);
#if defined(__SANITIZE_THREAD__)
        __tsan_destroy_fiber(fibers[i].tsan);
#endif
    }
    fibers_n = 0;
    memset(mutexes, 0, sizeof mutexes);
    time_ns = 1000000000;
    dice = seed;
    preempt_one_in = one_in;
}

int sim_spawn(void *(*run)(void *), void *argument)
{
    ASSERT(fibers_n < SIM_FIBERS_MAX);
    struct fiber *fiber = &fibers[fibers_n];
    void *stack = fiber->stack;
    if (!stack)
        stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT(stack != MAP_FAILED);
    *fiber = (struct fiber){.stack = stack, .run = run, .argument = argument};
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber->context, fiber_main, 0);
#if defined(__SANITIZE_THREAD__)
    fiber->tsan = __tsan_create_fiber(0);
#endif
    return fibers_n++;
}

void sim_resume(int index)
{
    struct fiber *fiber = &fibers[index];
    ASSERT(current == SIM_DRIVER && !fiber->ended && !fiber->blocked_on);
    current = index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&driver_fake_stack, fiber->stack, STACK_BYTES);
#endif
#if defined(__SANITIZE_THREAD__)
    driver_tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber->tsan, 0);
#endif
    swapcontext(&driver, &fiber->context);
    arrived(driver_fake_stack);
}

bool sim_ended(int fiber)
{
    return fibers[fiber].ended;
}

bool sim_sleeps(int fiber)
{
    return fibers[fiber].sleeps_on && !fibers[fiber].woken;
}

uint64_t sim_sleeps_until(int fiber)
{
    return fibers[fiber].sleeps_until_ns;
}

bool sim_may_run(int fiber)
{
    const struct fiber *it = &fibers[fiber];
    return !it->ended && !it->blocked_on &&
           (!it->sleeps_on || it->woken || it->sleeps_until_ns <= time_ns);
}

int sim_current(void)
{
    return current;
}

void sim_yield(void)
{
    to_driver();
}

static bool holds_the_leaf(void);

void sim_preempt(void)
{
    if (current != SIM_DRIVER && preempt_one_in && !holds_the_leaf() &&
        sim_below(preempt_one_in) == 0)
        sim_yield();
}

int sim_thread_create(pthread_t *thread, void *(*run)(void *), void *argument)
{
    *thread = (pthread_t)sim_spawn(run, argument);
    return 0;
}

int sim_thread_join(pthread_t thread)
{
    int fiber = (int)thread;
    ASSERT(current == SIM_DRIVER);
    for (int turns = 0; !fibers[fiber].ended; turns++) {
        ASSERT(turns < 100000 && "the thread does not end");
        if (!sim_may_run(fiber)) {
            ASSERT(fibers[fiber].sleeps_until_ns != UINT64_MAX && "the thread sleeps for good");
            sim_go_to(fibers[fiber].sleeps_until_ns);
        }
        sim_resume(fiber);
    }
    return 0;
}

// ---- locks

static struct mutex *find(const pthread_mutex_t *mutex)
{
    for (int i = 0; i < MUTEXES_MAX; i++)
        if (mutexes[i].mutex == mutex)
            return &mutexes[i];
    ASSERT(!"a mutex that nobody has made");
    return NULL;
}

// The first that was made is the batcher's lock. `turn` is held across all that is done in it.
static bool holds_the_leaf(void)
{
    return mutexes[0].mutex && mutexes[0].holder == current;
}

bool sim_holds(const pthread_mutex_t *mutex)
{
    return find(mutex)->holder == current;
}

int sim_mutex_init(pthread_mutex_t *mutex)
{
    struct mutex *at = find(NULL);
    *at = (struct mutex){.mutex = mutex, .holder = NOBODY};
    return 0;
}

int sim_mutex_destroy(pthread_mutex_t *mutex)
{
    struct mutex *it = find(mutex);
    ASSERT(it->holder == NOBODY);
    it->mutex = NULL;
    return 0;
}

int sim_mutex_lock(pthread_mutex_t *mutex)
{
    sim_preempt();
    struct mutex *it = find(mutex);
    while (it->holder != NOBODY) {
        ASSERT(current != SIM_DRIVER && it->holder != current);
        fibers[current].blocked_on = mutex;
        sim_yield();
    }
    it->holder = current;
    if (sim_hooks.locked)
        sim_hooks.locked(mutex);
    return 0;
}

int sim_mutex_trylock(pthread_mutex_t *mutex)
{
    sim_preempt();
    struct mutex *it = find(mutex);
    if (it->holder != NOBODY)
        return EBUSY;
    it->holder = current;
    if (sim_hooks.locked)
        sim_hooks.locked(mutex);
    return 0;
}

int sim_mutex_unlock(pthread_mutex_t *mutex)
{
    struct mutex *it = find(mutex);
    ASSERT(it->holder == current);
    if (sim_hooks.unlocking)
        sim_hooks.unlocking(mutex);
    it->holder = NOBODY;
    for (int i = 0; i < fibers_n; i++)
        if (fibers[i].blocked_on == mutex)
            fibers[i].blocked_on = NULL;
    sim_preempt();
    return 0;
}

// ---- sleeping

void sim_futex_wait(_Atomic uint32_t *word, uint32_t expected, uint64_t until_ns)
{
    sim_preempt();
    if (atomic_load(word) != expected || until_ns <= time_ns)
        return;
    struct fiber *fiber = &fibers[current];
    fiber->sleeps_on = word;
    fiber->sleeps_until_ns = until_ns;
    fiber->woken = false;
    sim_yield();
    fiber->sleeps_on = NULL;
}

void sim_futex_wake(_Atomic uint32_t *word, uint32_t threads)
{
    sim_preempt();
    for (int i = 0; i < fibers_n && threads > 0; i++)
        if (fibers[i].sleeps_on == word && !fibers[i].woken) {
            fibers[i].woken = true;
            threads--;
        }
}
