// token: makes a bearer token, and its entry for the daemon's tokens_file. The token is printed once
// and kept nowhere.

#include "../server/access.h"
#include "ctl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { OPT_SCOPES, OPT_DAYS };

static const struct ctl_option options[] = {
    [OPT_SCOPES] = {"scopes", "LIST", "of infer, read, admin; default infer,read"},
    [OPT_DAYS] = {"days", "N", "after which it expires; default never"},
    {0},
};

enum { TOKEN_RANDOM_BYTES = 32, HEX_BYTES = 2 * 32 + 1 };

static void to_hex(const uint8_t *bytes, size_t n, char *hex)
{
    for (size_t i = 0; i < n; i++)
        snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
}

static json_t *scopes_json(const char *text)
{
    json_t *list = json_array();
    char copy[64];
    snprintf(copy, sizeof copy, "%s", text);
    for (char *rest = copy, *word; (word = strsep(&rest, ","));) {
        if (access_scope_of(word) == 0) {
            ctl_usage_error("--scopes: \"%s\" is none of infer, read, admin", word);
            json_decref(list);
            return NULL;
        }
        json_array_append_new(list, json_string(word));
    }
    return list;
}

static json_t *expires_json(uint64_t days)
{
    char text[32];
    time_t at = time(NULL) + (time_t)days * 24 * 60 * 60;
    struct tm broken;
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&at, &broken));
    return json_string(text);
}

static enum ctl_exit run_token(struct ctl *ctl, const struct ctl_args *args)
{
    const char *given = ctl_value(args, OPT_SCOPES);
    uint64_t days = 0;
    if (!ctl_number(args, OPT_DAYS, 1, 36500, &days))
        return CTL_USAGE;
    json_t *scopes = scopes_json(given ? given : "infer,read");
    if (!scopes)
        return CTL_USAGE;
    uint8_t random[TOKEN_RANDOM_BYTES], digest[ACCESS_SHA256_BYTES];
    char token[HEX_BYTES], hex[HEX_BYTES];
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random) {
        json_decref(scopes);
        struct error err;
        error_set(&err, STATUS_INTERNAL, "no random numbers: %s", strerror(errno));
        return ctl_fail_local(ctl, &err);
    }
    to_hex(random, sizeof random, token);
    access_sha256(token, strlen(token), digest);
    to_hex(digest, sizeof digest, hex);
    json_t *entry =
        json_pack("{s:s, s:s, s:o}", "name", args->operands[0], "sha256", hex, "scopes", scopes);
    if (days)
        json_object_set_new(entry, "expires", expires_json(days));
    if (ctl->json) {
        ctl_print_json(json_pack("{s:s, s:o}", "token", token, "entry", entry));
        return CTL_OK;
    }
    char *text = json_dumps(entry, JSON_COMPACT);
    printf("token  %s\nentry  %s\n", token, text ? text : "");
    free(text);
    json_decref(entry);
    return CTL_OK;
}

const struct ctl_command ctl_command_token = {
    .name = "token",
    .operands = "NAME",
    .summary = "make a bearer token and its entry for tokens_file",
    .help =
        "Prints a new token, this once, and the entry for \"tokens\" in the daemon's tokens_file,\n"
        "which holds its SHA-256 alone. NAME is what the daemon's log calls it. Asks no daemon.\n\n"
        "  einsumctl token front-end --scopes infer,read --days 90",
    .options = options,
    .operands_min = 1,
    .operands_max = 1,
    .run = run_token,
};
