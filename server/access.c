// The table of tokens and certificates is immutable; reloading makes another and swaps the pointer.
// Readers hold the lock for the few comparisons of a look-up: it is taken only where a call needs
// more than its way and its certificate give, so never on a unix socket or with tcp_scopes.
//
// A token is found by comparing its SHA-256 with every entry's, all bytes of each, whatever matches:
// how long that takes tells nothing of what is in the file.
#include "access.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "json_limited.h"
#include "log.h"
#include "stamp.h"

enum {
    FILE_BYTES_MAX = 1 << 20,
    ENTRIES_MAX = 1024, // of each list
    NAME_BYTES_MAX = 255,
    TOKEN_BYTES_MAX = 1024,
};

struct entry {
    char *name;
    uint8_t digest[ACCESS_SHA256_BYTES]; // of a token
    uint32_t scopes;
    int64_t expires; // seconds since 1970; INT64_MAX: never
};

struct table {
    struct entry *tokens, *certificates;
    size_t tokens_n, certificates_n;
};

enum refusal {
    REFUSED_NO_TOKEN,
    REFUSED_UNKNOWN_TOKEN,
    REFUSED_EXPIRED_TOKEN,
    REFUSED_SCOPE,
    REFUSED_HEALTH_PORT,
    REFUSALS
};
_Static_assert((int)REFUSALS == (int)METRICS_ACCESS_REFUSALS, "each is counted");
const char *const metrics_access_refusal_names[METRICS_ACCESS_REFUSALS] = {
    "no_token", "unknown_token", "expired_token", "scope", "health_port",
};

struct access {
    struct access_options options;
    struct stamp stamp;
    pthread_rwlock_t lock;
    struct table *table; // guarded by lock
    _Atomic uint64_t generation;
    _Atomic uint64_t refused[REFUSALS];
};

struct access_peer access_peer_unix = {.way = ACCESS_UNIX, .shared = true};
struct access_peer access_peer_tcp = {.way = ACCESS_TCP, .shared = true};
struct access_peer access_peer_health = {.way = ACCESS_HEALTH, .shared = true};

// ---- peers

struct access_peer *access_peer_create(const char *const *names, size_t names_n)
{
    struct access_peer *peer = calloc(1, sizeof *peer);
    if (!peer)
        return NULL;
    peer->way = ACCESS_TCP;
    for (size_t i = 0; i < names_n && peer->names_n < ACCESS_NAMES_MAX; i++) {
        peer->names[peer->names_n] = strdup(names[i]);
        if (!peer->names[peer->names_n]) {
            access_peer_free(peer);
            return NULL;
        }
        peer->names_n++;
    }
    return peer;
}

void access_peer_free(struct access_peer *peer)
{
    if (!peer || peer->shared)
        return;
    for (size_t i = 0; i < peer->names_n; i++)
        free(peer->names[i]);
    free(peer);
}

// ---- words

static const struct {
    const char *name;
    enum access_scope scope;
} scopes[] = {{"infer", ACCESS_INFER}, {"read", ACCESS_READ}, {"admin", ACCESS_ADMIN}};

enum access_scope access_scope_of(const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(scopes); i++)
        if (strcmp(scopes[i].name, name) == 0)
            return scopes[i].scope;
    return 0;
}

const char *access_scopes_text(uint32_t of, char text[ACCESS_SCOPES_TEXT])
{
    text[0] = '\0';
    for (size_t i = 0; i < ARRAY_LEN(scopes); i++) {
        size_t used = strlen(text);
        if (of & scopes[i].scope)
            snprintf(text + used, ACCESS_SCOPES_TEXT - used, "%s%s", used ? "," : "",
                     scopes[i].name);
    }
    if (!text[0])
        strcpy(text, "none");
    return text;
}

static bool all_digits(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (text[i] < '0' || text[i] > '9')
            return false;
    return true;
}

static int number_at(const char *text, size_t n)
{
    int value = 0;
    for (size_t i = 0; i < n; i++)
        value = value * 10 + (text[i] - '0');
    return value;
}

// What stands behind the seconds: "Z", "+02:00", with a fraction before it or not.
static bool parse_zone(const char *text, int64_t *offset_s)
{
    if (*text == '.') {
        size_t digits = strspn(text + 1, "0123456789");
        if (digits == 0)
            return false;
        text += 1 + digits;
    }
    *offset_s = 0;
    if (strcmp(text, "Z") == 0)
        return true;
    if (strlen(text) != 6 || (text[0] != '+' && text[0] != '-') || text[3] != ':' ||
        !all_digits(text + 1, 2) || !all_digits(text + 4, 2))
        return false;
    int hours = number_at(text + 1, 2), minutes = number_at(text + 4, 2);
    *offset_s = (hours * 60 + minutes) * 60 * (text[0] == '-' ? -1 : 1);
    return hours < 24 && minutes < 60;
}

bool access_parse_time(const char *text, int64_t *seconds)
{
    static const char form[] = "dddd-dd-ddTdd:dd:dd";
    for (size_t i = 0; i < sizeof form - 1; i++)
        if (form[i] == 'd' ? text[i] < '0' || text[i] > '9' : text[i] != form[i])
            return false;
    struct tm time = {
        .tm_year = number_at(text, 4) - 1900,
        .tm_mon = number_at(text + 5, 2) - 1,
        .tm_mday = number_at(text + 8, 2),
        .tm_hour = number_at(text + 11, 2),
        .tm_min = number_at(text + 14, 2),
        .tm_sec = number_at(text + 17, 2),
    };
    const struct tm asked = time;
    int64_t offset_s;
    if (!parse_zone(text + sizeof form - 1, &offset_s))
        return false;
    int64_t at = timegm(&time); // which makes of a 31st of February a day in March
    bool is_date = time.tm_mon == asked.tm_mon && time.tm_mday == asked.tm_mday &&
                   time.tm_hour == asked.tm_hour && time.tm_min == asked.tm_min;
    *seconds = at - offset_s;
    return is_date;
}

void access_sha256(const void *bytes, size_t bytes_n, uint8_t digest[ACCESS_SHA256_BYTES])
{
    ASSERT(EVP_Digest(bytes, bytes_n, digest, NULL, EVP_sha256(), NULL) == 1);
}

// ---- the file

static void table_free(struct table *table)
{
    if (!table)
        return;
    for (size_t i = 0; i < table->tokens_n; i++)
        free(table->tokens[i].name);
    for (size_t i = 0; i < table->certificates_n; i++)
        free(table->certificates[i].name);
    free(table->tokens);
    free(table->certificates);
    free(table);
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static bool parse_digest(const char *text, uint8_t digest[ACCESS_SHA256_BYTES])
{
    if (!text || strlen(text) != 2 * ACCESS_SHA256_BYTES)
        return false;
    for (size_t i = 0; i < ACCESS_SHA256_BYTES; i++) {
        int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        digest[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

NODISCARD static enum status read_scopes(const json_t *value, const char *list, size_t index,
                                         uint32_t *found, struct error *err)
{
    bool good = json_is_array(value);
    for (size_t i = 0; good && i < json_array_size(value); i++) {
        const char *name = json_string_value(json_array_get(value, i));
        enum access_scope scope = name ? access_scope_of(name) : 0;
        good = scope != 0;
        *found |= scope;
    }
    if (!good)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                           "%s[%zu].scopes: expected a list of \"infer\", \"read\", \"admin\"",
                           list, index);
    return STATUS_OK;
}

// An entry of either list; of certificates it is no token's.
NODISCARD static enum status read_entry(const json_t *object, const char *list, size_t index,
                                        bool is_token, struct entry *entry, struct error *err)
{
    if (!json_is_object(object))
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                           "%s[%zu]: expected an object", list, index);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)object, key, value)
    {
        bool known = strcmp(key, "name") == 0 || strcmp(key, "scopes") == 0 ||
                     (is_token && (strcmp(key, "sha256") == 0 || strcmp(key, "expires") == 0));
        if (!known)
            return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                               "%s[%zu]: unknown key \"%.64s\"", list, index, key);
    }
    const char *name = json_string_value(json_object_get(object, "name"));
    if (!name || !name[0] || strlen(name) > NAME_BYTES_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                           "%s[%zu].name: expected a string of 1 to 255 bytes", list, index);
    entry->expires = INT64_MAX;
    if (is_token &&
        !parse_digest(json_string_value(json_object_get(object, "sha256")), entry->digest))
        return error_field(
            err, STATUS_INVALID_ARGUMENT, "tokens_file",
            "%s[%zu].sha256: expected 64 hexadecimal digits, the SHA-256 of the token", list,
            index);
    const json_t *expires = json_object_get(object, "expires");
    if (expires && (!json_is_string(expires) ||
                    !access_parse_time(json_string_value(expires), &entry->expires)))
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                           "%s[%zu].expires: expected a time like \"2027-01-01T00:00:00Z\"", list,
                           index);
    enum status status =
        read_scopes(json_object_get(object, "scopes"), list, index, &entry->scopes, err);
    if (status != STATUS_OK)
        return status;
    entry->name = strdup(name);
    return entry->name ? STATUS_OK : error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
}

NODISCARD static enum status read_list(const json_t *root, const char *key, bool is_token,
                                       struct entry **entries, size_t *entries_n, struct error *err)
{
    const json_t *list = json_object_get(root, key);
    if (!list)
        return STATUS_OK;
    size_t n = json_array_size(list);
    if (!json_is_array(list) || n > ENTRIES_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                           "%s: expected a list of at most %d", key, ENTRIES_MAX);
    *entries = calloc(n ? n : 1, sizeof **entries);
    if (!*entries)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    for (size_t i = 0; i < n; i++) {
        *entries_n = i + 1;
        struct entry *entry = &(*entries)[i];
        enum status status = read_entry(json_array_get(list, i), key, i, is_token, entry, err);
        if (status != STATUS_OK)
            return status;
        // A name is what the log calls a token by; a digest that stands twice is a slip.
        for (size_t j = 0; j < i; j++) {
            const struct entry *other = &(*entries)[j];
            bool same = is_token && memcmp(other->digest, entry->digest, ACCESS_SHA256_BYTES) == 0;
            if (same || strcmp(other->name, entry->name) == 0)
                return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                                   "%s[%zu].%s: is there already", key, i,
                                   same ? "sha256" : "name");
        }
    }
    return STATUS_OK;
}

NODISCARD static enum status parse_table(const json_t *root, struct table *table, struct error *err)
{
    if (!json_is_object(root))
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                           "expected an object with \"tokens\" and \"certificates\"");
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)root, key, value)
    {
        if (strcmp(key, "tokens") != 0 && strcmp(key, "certificates") != 0)
            return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                               "unknown key \"%.64s\"; expected \"tokens\" and \"certificates\"",
                               key);
    }
    enum status status = read_list(root, "tokens", true, &table->tokens, &table->tokens_n, err);
    if (status == STATUS_OK)
        status = read_list(root, "certificates", false, &table->certificates,
                           &table->certificates_n, err);
    return status;
}

NODISCARD static enum status read_file(const char *path, char *text, size_t *bytes,
                                       struct error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    ssize_t got = fd < 0 ? -1 : 0;
    *bytes = 0;
    if (fd >= 0)
        while (*bytes <= FILE_BYTES_MAX &&
               (got = read(fd, text + *bytes, FILE_BYTES_MAX + 1 - *bytes)) > 0)
            *bytes += (size_t)got;
    int error = errno;
    if (fd >= 0)
        close(fd);
    if (*bytes > FILE_BYTES_MAX)
        return error_field(err, STATUS_INVALID_ARGUMENT, "tokens_file",
                           "%.200s is larger than %d bytes", path, FILE_BYTES_MAX);
    if (got < 0)
        return error_field(err, STATUS_FAILED_PRECONDITION, "tokens_file",
                           "%.200s cannot be read: %s", path, strerror(error));
    return STATUS_OK;
}

NODISCARD static enum status load_table(const char *path, struct table **out, struct error *err)
{
    static const struct json_limits limits = {
        .depth_max = 4, .values_max = 64 * ENTRIES_MAX, .array_values_max = 16 * ENTRIES_MAX};
    struct table *table = calloc(1, sizeof *table);
    char *text = malloc(FILE_BYTES_MAX + 1);
    size_t bytes = 0;
    json_t *root = NULL;
    enum status status = table && text ? read_file(path, text, &bytes, err)
                                       : error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    if (status == STATUS_OK)
        status = json_load_limited(text, bytes, &limits, "tokens_file", &root, err);
    if (status == STATUS_OK)
        status = parse_table(root, table, err);
    json_decref(root);
    free(text);
    if (status != STATUS_OK) {
        table_free(table);
        table = NULL;
    }
    *out = table;
    return status;
}

// ---- create and reload

struct access_prepared {
    struct access *access;
    struct table *table; // after the commit the one before
};

enum status access_prepare(struct access *access, struct access_prepared **out, struct error *err)
{
    struct access_prepared *prepared = calloc(1, sizeof *prepared);
    if (!prepared)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for tokens");
    prepared->access = access;
    enum status status = load_table(access->options.tokens_file, &prepared->table, err);
    if (status == STATUS_OK)
        *out = prepared;
    else
        free(prepared);
    return status;
}

void access_commit(struct access_prepared *prepared)
{
    struct access *access = prepared->access;
    struct table *table = prepared->table;
    pthread_rwlock_wrlock(&access->lock);
    prepared->table = access->table;
    access->table = table;
    atomic_fetch_add(&access->generation, 1);
    pthread_rwlock_unlock(&access->lock);
    LOG(INFO, "tokens read", LOG_STR("path", access->options.tokens_file),
        LOG_U64("tokens", table->tokens_n), LOG_U64("certificates", table->certificates_n));
}

void access_prepared_destroy(struct access_prepared *prepared)
{
    if (!prepared)
        return;
    table_free(prepared->table);
    free(prepared);
}

NODISCARD static enum status read_table(struct access *access, struct error *err)
{
    struct access_prepared *prepared = NULL;
    enum status status = access_prepare(access, &prepared, err);
    if (status != STATUS_OK)
        return status;
    access_commit(prepared);
    access_prepared_destroy(prepared);
    return STATUS_OK;
}

void access_look(struct access *access)
{
    struct error err;
    // The stamp before the file: what changes meanwhile is seen next time.
    if (access->options.tokens_file[0] &&
        stamp_renew(&access->stamp, access->options.tokens_file) &&
        read_table(access, &err) != STATUS_OK)
        LOG(ERROR, "tokens not read, those in force stay", LOG_STR("reason", err.text));
}

enum status access_create(const struct access_options *options, struct access **out,
                          struct error *err)
{
    struct access *access = calloc(1, sizeof *access);
    if (!access)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
    access->options = *options;
    atomic_init(&access->generation, 1);
    pthread_rwlock_init(&access->lock, NULL);
    enum status status = STATUS_OK;
    if (options->tokens_file[0]) {
        stamp_renew(&access->stamp, options->tokens_file);
        status = read_table(access, err);
    }
    if (status != STATUS_OK) {
        access_destroy(access);
        return status;
    }
    *out = access;
    return STATUS_OK;
}

void access_destroy(struct access *access)
{
    if (!access)
        return;
    table_free(access->table);
    pthread_rwlock_destroy(&access->lock);
    free(access);
}

// ---- checks

static uint32_t certificate_scopes_locked(const struct access *access,
                                          const struct access_peer *peer)
{
    uint32_t found = access->options.certificate_scopes;
    const struct table *table = access->table;
    for (size_t i = 0; table && i < table->certificates_n; i++)
        for (size_t j = 0; j < peer->names_n; j++)
            if (strcmp(table->certificates[i].name, peer->names[j]) == 0)
                found |= table->certificates[i].scopes;
    return found;
}

static uint32_t certificate_scopes(struct access *access, struct access_peer *peer)
{
    uint64_t generation = atomic_load_explicit(&access->generation, memory_order_acquire);
    uint64_t known = atomic_load_explicit(&peer->looked_up, memory_order_relaxed);
    if (known >> 8 == generation)
        return (uint32_t)known & 0xff;
    pthread_rwlock_rdlock(&access->lock);
    generation = atomic_load(&access->generation);
    uint32_t found = certificate_scopes_locked(access, peer);
    pthread_rwlock_unlock(&access->lock);
    atomic_store_explicit(&peer->looked_up, generation << 8 | found, memory_order_relaxed);
    return found;
}

static uint32_t given_scopes(struct access *access, struct access_peer *peer)
{
    uint32_t given = ACCESS_OPEN;
    if (!peer || peer->way == ACCESS_HEALTH)
        return given;
    given |= peer->way == ACCESS_UNIX ? access->options.unix_scopes : access->options.tcp_scopes;
    if (peer->names_n > 0)
        given |= certificate_scopes(access, peer);
    return given;
}

bool access_given(struct access *access, struct access_peer *peer, enum access_scope needs)
{
    return (given_scopes(access, peer) & needs) != 0;
}

// What a token gives; its name, cut, for the log. false: unknown.
static bool find_token(struct access *access, const char *token, size_t bytes, struct entry *found,
                       char name[NAME_BYTES_MAX + 1])
{
    uint8_t digest[ACCESS_SHA256_BYTES];
    access_sha256(token, bytes, digest);
    bool known = false;
    pthread_rwlock_rdlock(&access->lock);
    const struct table *table = access->table;
    for (size_t i = 0; table && i < table->tokens_n; i++) {
        if (CRYPTO_memcmp(table->tokens[i].digest, digest, sizeof digest) == 0) {
            *found = table->tokens[i];
            known = true;
        }
    }
    if (known)
        snprintf(name, NAME_BYTES_MAX + 1, "%s", found->name);
    pthread_rwlock_unlock(&access->lock);
    return known;
}

static const char *ways[] = {"unix", "tcp", "health"};

// `token` is its name; NULL: none that is known. A flood must not fill the log: the 1st, 2nd, 4th,
// 8th ... of a reason.
static void count(struct access *access, const struct access_call *call, enum refusal reason,
                  const char *token)
{
    metrics_add_at(access->options.metrics,
                   offsetof(struct metrics_values, access_refused) + reason * sizeof(uint64_t), 1);
    uint64_t before = atomic_fetch_add_explicit(&access->refused[reason], 1, memory_order_relaxed);
    if ((before & (before + 1)) != 0)
        return;
    const struct access_peer *peer = call->peer;
    LOG(WARN, "call refused", LOG_STR("method", call->method),
        LOG_STR("reason", metrics_access_refusal_names[reason]),
        LOG_STR("way", peer ? ways[peer->way] : "?"),
        LOG_STR("certificate", peer && peer->names_n ? peer->names[0] : ""),
        LOG_STR("token", token ? token : ""), LOG_U64("refused", before + 1));
}

NODISCARD static enum status refuse_scope(struct access *access, const struct access_call *call,
                                          uint32_t has, const char *token, struct error *err)
{
    char needs[ACCESS_SCOPES_TEXT], given[ACCESS_SCOPES_TEXT];
    count(access, call, REFUSED_SCOPE, token);
    return error_set(err, STATUS_PERMISSION_DENIED,
                     "this needs the scope \"%s\"; this caller has: %s",
                     access_scopes_text(call->needs, needs), access_scopes_text(has, given));
}

// The token of an "authorization" of the scheme Bearer, whose name may be of any case.
static bool bearer(const struct access_call *call, const char **token, size_t *bytes)
{
    static const char scheme[] = "bearer ";
    size_t scheme_bytes = sizeof scheme - 1;
    if (call->authorizations_n != 1 || call->authorization_bytes <= scheme_bytes ||
        call->authorization_bytes - scheme_bytes > TOKEN_BYTES_MAX)
        return false;
    for (size_t i = 0; i < scheme_bytes; i++) {
        char c = call->authorization[i];
        if ((c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c) != scheme[i])
            return false;
    }
    *token = call->authorization + scheme_bytes;
    *bytes = call->authorization_bytes - scheme_bytes;
    return true;
}

enum status access_check(struct access *access, const struct access_call *call, struct error *err)
{
    uint32_t has = given_scopes(access, call->peer);
    if (has & call->needs)
        return STATUS_OK;
    if (call->peer && call->peer->way == ACCESS_HEALTH) {
        count(access, call, REFUSED_HEALTH_PORT, NULL);
        return error_set(err, STATUS_PERMISSION_DENIED,
                         "this port (health_listen) serves "
                         "grpc.health.v1 alone");
    }
    char needs[ACCESS_SCOPES_TEXT];
    access_scopes_text(call->needs, needs);
    if (!call->peer || !access->options.tokens_file[0] ||
        (call->authorizations_n == 0 && call->peer->names_n > 0))
        return refuse_scope(access, call, has, NULL, err);
    if (call->authorizations_n == 0) {
        count(access, call, REFUSED_NO_TOKEN, NULL);
        return error_set(err, STATUS_UNAUTHENTICATED,
                         "this needs a token with the scope \"%s\", as metadata "
                         "\"authorization: Bearer TOKEN\"",
                         needs);
    }
    const char *token = NULL;
    size_t bytes = 0;
    struct entry found;
    char name[NAME_BYTES_MAX + 1];
    if (!bearer(call, &token, &bytes)) {
        count(access, call, REFUSED_UNKNOWN_TOKEN, NULL);
        return error_set(err, STATUS_UNAUTHENTICATED,
                         "authorization: expected one, \"Bearer TOKEN\"");
    }
    if (!find_token(access, token, bytes, &found, name)) {
        count(access, call, REFUSED_UNKNOWN_TOKEN, NULL);
        return error_set(err, STATUS_UNAUTHENTICATED, "the token is not known");
    }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (found.expires <= now.tv_sec) {
        count(access, call, REFUSED_EXPIRED_TOKEN, name);
        return error_set(err, STATUS_UNAUTHENTICATED, "the token has expired");
    }
    has |= found.scopes;
    return (has & call->needs) ? STATUS_OK : refuse_scope(access, call, has, name, err);
}
