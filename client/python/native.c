// Waits on a condition of its own: a callback of one client says nothing of the others.
#include "native.h"

#include <pthread.h>
#include <stdlib.h>

struct gathering {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    size_t pending; // by lock
};

struct part {
    struct gathering *gathering;
    struct einsum_client_response *response;
    struct einsum_client_error *error;
    enum einsum_client_status *status;
};

static void part_end(struct part *part, enum einsum_client_status status)
{
    *part->status = status;
    pthread_mutex_lock(&part->gathering->lock);
    // Signalled with the lock held: the waiter, who owns it, is gone once it has seen the last.
    if (--part->gathering->pending == 0)
        pthread_cond_signal(&part->gathering->changed);
    pthread_mutex_unlock(&part->gathering->lock);
}

static void on_response(void *context, const struct einsum_client_response *response,
                        const struct einsum_client_error *error)
{
    struct part *part = context;
    if (response)
        *part->response = *response;
    else
        *part->error = *error;
    part_end(part, response ? EINSUM_CLIENT_OK : error->status);
}

bool einsumd_einsum_all(size_t n, struct einsum_client *const *clients,
                        const struct einsum_client_request *requests,
                        struct einsum_client_response *responses,
                        struct einsum_client_error *errors, enum einsum_client_status *statuses)
{
    struct part *parts = calloc(n, sizeof *parts);
    if (!parts)
        return false;
    struct gathering gathering = {.pending = n};
    pthread_mutex_init(&gathering.lock, NULL);
    pthread_cond_init(&gathering.changed, NULL);

    for (size_t i = 0; i < n; i++) {
        parts[i] = (struct part){&gathering, &responses[i], &errors[i], &statuses[i]};
        statuses[i] = EINSUM_CLIENT_UNKNOWN; // until it has ended
        enum einsum_client_status status =
            einsum_client_start(clients[i], &requests[i], on_response, &parts[i], NULL, &errors[i]);
        if (status)
            part_end(&parts[i], status);
    }
    pthread_mutex_lock(&gathering.lock);
    while (gathering.pending > 0)
        pthread_cond_wait(&gathering.changed, &gathering.lock);
    pthread_mutex_unlock(&gathering.lock);

    pthread_cond_destroy(&gathering.changed);
    pthread_mutex_destroy(&gathering.lock);
    free(parts);
    return true;
}
