// The names that simulated.h is about. Included first by what includes the daemon's sources.
#pragma once

#include "simulated.h"

#define now_ns sim_now_ns
#define pthread_create(thread, attributes, run, argument) sim_thread_create(thread, run, argument)
#define pthread_join(thread, result) sim_thread_join(thread)
#define pthread_setname_np(thread, name) ((void)(thread))
#define pthread_mutex_init(mutex, attributes) sim_mutex_init(mutex)
#define pthread_mutex_destroy sim_mutex_destroy
#define pthread_mutex_lock sim_mutex_lock
#define pthread_mutex_trylock sim_mutex_trylock
#define pthread_mutex_unlock sim_mutex_unlock
#define futex_wait sim_futex_wait
#define futex_wake sim_futex_wake
