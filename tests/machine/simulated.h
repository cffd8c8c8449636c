// A world for the batcher in which one thread plays all: time, locks, sleeping and the scheduler's
// thread are simulated, and chance, from a seed, says who goes on when. The same seed is the same run.
//
// batcher.c and cut.c here include the daemon's sources with the names below in place of the
// system's. Each thread is a fiber. A fiber may lose its turn before it takes a lock, after it gives one
// back, where it reads the clock and where it is told of something; never while it holds the
// batcher's lock.
#pragma once

#include <pthread.h>

#include "server/base.h"
#include "server/futex.h"

enum { SIM_FIBERS_MAX = 8, SIM_DRIVER = -1 };

// ---- for the driver, which is no fiber

void sim_begin(uint64_t seed, uint32_t preempt_one_in); // 0: never
int sim_spawn(void *(*run)(void *), void *argument);
bool sim_may_run(int fiber); // neither blocked, nor asleep, nor at its end
bool sim_sleeps(int fiber);  // and nobody has woken it, though its time may be up
bool sim_ended(int fiber);
uint64_t sim_sleeps_until(int fiber);
void sim_resume(int fiber); // awake or not; until it gives up its turn
void sim_pass(uint64_t ns);
void sim_go_to(uint64_t ns);
uint64_t sim_time(void); // without passing any

// ---- for all

uint64_t sim_random(void);
uint32_t sim_below(uint32_t n);
bool sim_chance(uint32_t percent);
int sim_current(void);
void sim_yield(void);   // a fiber's turn is over
void sim_preempt(void); // perhaps it is; nothing for the driver
bool sim_holds(const pthread_mutex_t *mutex);

// Called on the fiber that has just taken, or is about to give back, a mutex.
struct sim_hooks {
    void (*locked)(const pthread_mutex_t *mutex);
    void (*unlocking)(const pthread_mutex_t *mutex);
};
extern struct sim_hooks sim_hooks;

// ---- in place of the system's

uint64_t sim_now_ns(void);
int sim_thread_create(pthread_t *thread, void *(*run)(void *), void *argument);
int sim_thread_join(pthread_t thread);
int sim_mutex_init(pthread_mutex_t *mutex);
int sim_mutex_destroy(pthread_mutex_t *mutex);
int sim_mutex_lock(pthread_mutex_t *mutex);
int sim_mutex_trylock(pthread_mutex_t *mutex);
int sim_mutex_unlock(pthread_mutex_t *mutex);
void sim_futex_wait(_Atomic uint32_t *word, uint32_t expected, uint64_t until_ns);
void sim_futex_wake(_Atomic uint32_t *word, uint32_t threads);
