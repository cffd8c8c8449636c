// What the Python package adds to the client library: one call that goes to several daemons at once.
#pragma once

#include "client/einsum_client.h"

// Starts requests[i] on clients[i], for all i, and waits for all. statuses[i] and either
// responses[i] or errors[i] are filled. False: no memory, and nothing was started.
bool einsumd_einsum_all(size_t n, struct einsum_client *const *clients,
                        const struct einsum_client_request *requests,
                        struct einsum_client_response *responses,
                        struct einsum_client_error *errors, enum einsum_client_status *statuses);
