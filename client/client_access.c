// What a client shows of itself: TLS with a certificate, and a bearer token with each call.
//
// gRPC's own way of sending a token works over TLS alone; here it is metadata of ours, so that it
// also goes to a daemon on loopback. A token that was read once is kept until the client ends, since
// calls that are under way refer to it: rotations are few, and tokens small.

#include "client_internal.h"

#include <errno.h>
#include <grpc/grpc_security.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { FILE_BYTES_MAX = 1 << 20, TOKEN_BYTES_MAX = 1024, LOOK_MS = 1000 };

struct einsum_client_token {
    grpc_metadata entry;
    struct einsum_client_token *next; // read before it
};

struct einsum_client_access {
    char *token_file; // NULL: none
    _Atomic(struct einsum_client_token *) token;
    pthread_mutex_t lock; // guards what follows
    uint64_t looked_ns;
    struct stat seen;
};

// ---- files

// The text of a file, for the caller to free. NULL: `error` tells.
static char *read_file(const char *option, const char *path, struct einsum_client_error *error)
{
    FILE *file = fopen(path, "re");
    char *text = file ? malloc(FILE_BYTES_MAX + 1) : NULL;
    size_t bytes = text ? fread(text, 1, FILE_BYTES_MAX + 1, file) : 0;
    bool failed = !text || ferror(file) || bytes > FILE_BYTES_MAX;
    int reason = errno;
    if (file)
        fclose(file);
    if (failed) {
        einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT, "%s: %.300s: %s", option,
                                path,
                                bytes > FILE_BYTES_MAX ? "larger than 1 MiB" : strerror(reason));
        free(text);
        return NULL;
    }
    text[bytes] = '\0';
    return text;
}

// ---- tokens

// A token is printable and has no blanks; those around it in a file are not its own.
static enum einsum_client_status set_token(struct einsum_client_access *access, const char *option,
                                           const char *text, struct einsum_client_error *error)
{
    text += strspn(text, " \t\r\n");
    size_t bytes = strcspn(text, " \t\r\n");
    bool good = bytes > 0 && bytes <= TOKEN_BYTES_MAX &&
                text[bytes + strspn(text + bytes, " \t\r\n")] == '\0';
    for (size_t i = 0; i < bytes && good; i++)
        good = text[i] > ' ' && text[i] < 0x7f;
    if (!good)
        return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                       "%s: expected one token of at most %d printable characters",
                                       option, TOKEN_BYTES_MAX);
    struct einsum_client_token *token = calloc(1, sizeof *token);
    if (!token)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    char value[TOKEN_BYTES_MAX + 16];
    snprintf(value, sizeof value, "Bearer %.*s", (int)bytes, text);
    token->entry.key = grpc_slice_from_static_string("authorization");
    token->entry.value = grpc_slice_from_copied_string(value);
    token->next = atomic_load_explicit(&access->token, memory_order_relaxed);
    atomic_store_explicit(&access->token, token, memory_order_release);
    return EINSUM_CLIENT_OK;
}

static enum einsum_client_status read_token(struct einsum_client_access *access,
                                            struct einsum_client_error *error)
{
    char *text = read_file("token_file", access->token_file, error);
    if (!text)
        return EINSUM_CLIENT_INVALID_ARGUMENT;
    enum einsum_client_status status = set_token(access, "token_file", text, error);
    free(text);
    return status;
}

static bool has_changed(const struct stat *a, const struct stat *b)
{
    return a->st_dev != b->st_dev || a->st_ino != b->st_ino || a->st_size != b->st_size ||
           a->st_mtim.tv_sec != b->st_mtim.tv_sec || a->st_mtim.tv_nsec != b->st_mtim.tv_nsec;
}

// A file that is not good now leaves the token as it is: the server says what is wrong with it.
static void look_at_file(struct einsum_client_access *access)
{
    if (pthread_mutex_trylock(&access->lock) != 0)
        return; // another thread looks
    uint64_t now = einsum_client_now_ns();
    struct stat file;
    if (now - access->looked_ns > (uint64_t)LOOK_MS * 1000000u) {
        access->looked_ns = now;
        if (stat(access->token_file, &file) == 0 && has_changed(&file, &access->seen)) {
            access->seen = file;
            (void)read_token(access, NULL);
        }
    }
    pthread_mutex_unlock(&access->lock);
}

grpc_op einsum_client_opening_op(struct einsum_client *client)
{
    struct einsum_client_access *access = client->access;
    grpc_op op = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    if (access->token_file)
        look_at_file(access);
    struct einsum_client_token *token = atomic_load_explicit(&access->token, memory_order_acquire);
    if (token) {
        op.data.send_initial_metadata.count = 1;
        op.data.send_initial_metadata.metadata = &token->entry;
    }
    return op;
}

enum einsum_client_status einsum_client_access_create(const struct einsum_client_options *options,
                                                      struct einsum_client_access **out,
                                                      struct einsum_client_error *error)
{
    *out = NULL;
    if (options->token && options->token_file)
        return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                       "token: expected no token_file with it");
    struct einsum_client_access *access = calloc(1, sizeof *access);
    if (!access)
        return einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    pthread_mutex_init(&access->lock, NULL);
    enum einsum_client_status status = EINSUM_CLIENT_OK;
    if (options->token)
        status = set_token(access, "token", options->token, error);
    if (options->token_file) {
        access->token_file = strdup(options->token_file);
        access->looked_ns = einsum_client_now_ns();
        (void)stat(options->token_file, &access->seen); // before it is read
        status =
            access->token_file
                ? read_token(access, error)
                : einsum_client_error_set(error, EINSUM_CLIENT_RESOURCE_EXHAUSTED, "no memory");
    }
    if (status != EINSUM_CLIENT_OK) {
        einsum_client_access_destroy(access);
        return status;
    }
    *out = access;
    return EINSUM_CLIENT_OK;
}

void einsum_client_access_destroy(struct einsum_client_access *access)
{
    if (!access)
        return;
    struct einsum_client_token *token = atomic_load(&access->token);
    while (token) {
        struct einsum_client_token *next = token->next;
        grpc_slice_unref(token->entry.value);
        free(token);
        token = next;
    }
    pthread_mutex_destroy(&access->lock);
    free(access->token_file);
    free(access);
}

// ---- TLS

static enum einsum_client_status check_tls(const char *endpoint,
                                           const struct einsum_client_options *options,
                                           struct einsum_client_error *error)
{
    const char *wrong = NULL;
    if (!options->tls_ca &&
        (options->tls_certificate || options->tls_key || options->tls_server_name))
        wrong = "tls_ca: must be given with the other options of TLS";
    else if (!options->tls_certificate != !options->tls_key)
        wrong = "tls_certificate: must be given with tls_key, and it with that";
    else if (options->tls_ca && strncmp(endpoint, "unix:", 5) == 0)
        wrong = "tls_ca: a unix socket speaks no TLS";
    if (wrong)
        return einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT, "%s", wrong);
    return EINSUM_CLIENT_OK;
}

enum einsum_client_status
einsum_client_credentials_create(const char *endpoint, const struct einsum_client_options *options,
                                 grpc_channel_credentials **credentials,
                                 struct einsum_client_error *error)
{
    *credentials = NULL;
    enum einsum_client_status status = check_tls(endpoint, options, error);
    if (status != EINSUM_CLIENT_OK)
        return status;
    if (!options->tls_ca) {
        *credentials = grpc_insecure_credentials_create();
        return EINSUM_CLIENT_OK;
    }
    char *roots = NULL, *certificate = NULL, *key = NULL;
    bool own_roots = strcmp(options->tls_ca, "default") != 0;
    bool good = !own_roots || (roots = read_file("tls_ca", options->tls_ca, error));
    if (good && options->tls_certificate)
        good = (certificate = read_file("tls_certificate", options->tls_certificate, error)) &&
               (key = read_file("tls_key", options->tls_key, error));
    grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = certificate};
    if (good)
        *credentials = grpc_ssl_credentials_create_ex(roots, key ? &pair : NULL, NULL, NULL);
    free(roots);
    free(certificate);
    free(key);
    if (good && !*credentials)
        einsum_client_error_set(error, EINSUM_CLIENT_INVALID_ARGUMENT,
                                "tls_ca: gRPC has no roots of its own here, name a file");
    return *credentials ? EINSUM_CLIENT_OK : EINSUM_CLIENT_INVALID_ARGUMENT;
}
