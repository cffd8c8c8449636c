// The command line tool for einsumd: finds the command, parses its options, runs it.
//
//     einsumctl [--endpoint ADDR] [--json] [--timeout MS] COMMAND [OPTIONS] [OPERANDS]
//
// Options that all commands share may also stand behind the command.

#include "ctl.h"

#include <malloc.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>

static const struct ctl_command *const commands[] = {
    &ctl_command_info,  &ctl_command_health, &ctl_command_weights, &ctl_command_selftest,
    &ctl_command_run,   &ctl_command_check,  &ctl_command_bench,   &ctl_command_make_checkpoint,
    &ctl_command_token,
};

static const struct ctl_option shared_options[] = {
    {"endpoint", "ADDR",
     "HOST:PORT or unix:/PATH; default $EINSUMD_ENDPOINT, or else 127.0.0.1:50061"},
    {"server", "ADDR", "the same"},
    {"json", NULL, "print one JSON document to stdout"},
    {"timeout", "MS", "deadline of each call; default 30000, of loads and self-tests none"},
    {"retry-ms", "MS",
     "try again for so long what is refused or reaches nobody; default 4 attempts, some 140 ms"},
    {"tls-ca", "FILE",
     "PEM of who signs the server's certificate, or \"default\"; not given: no TLS"},
    {"tls-cert", "FILE", "PEM of this caller's certificate"},
    {"tls-key", "FILE", "PEM of its key"},
    {"tls-server-name", "NAME", "in the server's certificate; default the endpoint's host"},
    {"token-file", "FILE", "with a bearer token; default $EINSUMD_TOKEN_FILE, or else none"},
    {"help", NULL, "this text, or a command's"},
    {"version", NULL, "print the version"},
    {0},
};
enum {
    SHARED_ENDPOINT,
    SHARED_SERVER,
    SHARED_JSON,
    SHARED_TIMEOUT,
    SHARED_RETRY,
    SHARED_TLS_CA,
    SHARED_TLS_CERT,
    SHARED_TLS_KEY,
    SHARED_TLS_SERVER_NAME,
    SHARED_TOKEN_FILE,
    SHARED_HELP,
    SHARED_VERSION
};

// ---- help ---------------------------------------------------------------------------------------

static void print_options(const struct ctl_option *options)
{
    for (const struct ctl_option *o = options; o->name; o++) {
        char left[64];
        snprintf(left, sizeof left, "--%s%s%s", o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        printf("  %-26s %s\n", left, o->help);
    }
}

static void print_help(void)
{
    printf("usage: einsumctl [OPTIONS] COMMAND ...\n\n"
           "Talks to einsumd, the daemon for DeepSeek-V4's FP8 attention output projection.\n\n"
           "commands:\n");
    for (size_t i = 0; i < ARRAY_LEN(commands); i++)
        printf("  %-16s %s\n", commands[i]->name, commands[i]->summary);
    printf("\noptions, before or behind the command:\n");
    print_options(shared_options);
    printf(
        "\nexit codes:\n"
        "  0  ok\n"
        "  1  it failed: a number that is wrong, not healthy, self-test not passed, interrupted\n"
        "  2  usage\n"
        "  3  no answer: cannot reach the server, or the deadline passed\n"
        "  4  the server refused; the status is in the text, and in \"error\" with --json\n\n"
        "example:\n"
        "  einsumctl make-checkpoint --model v4-flash --layers 4 checkpoint\n"
        "  einsumctl --endpoint unix:/run/einsumd/einsumd.sock info\n"
        "  einsumctl COMMAND --help\n");
}

static void print_command_help(const struct ctl_command *command)
{
    printf("usage: einsumctl %s%s%s%s\n\n%s\n", command->name,
           command->options[0].name ? " [OPTIONS]" : "", command->operands[0] ? " " : "",
           command->operands, command->help);
    if (command->options[0].name) {
        printf("\noptions:\n");
        print_options(command->options);
    }
    printf("\n--endpoint, --tls-ca, --token-file, --json, --timeout, --retry-ms and others as for "
           "every "
           "command: einsumctl --help\n");
}

// ---- parsing ------------------------------------------------------------------------------------

struct parse {
    int argc;
    char **argv;
    int at;
    const char *shared[ARRAY_LEN(shared_options)]; // "" for a switch
    struct ctl_args args;
    enum ctl_exit error;
};

static bool refuse(struct parse *parse, enum ctl_exit error)
{
    parse->error = error;
    return false;
}

// Finds "--name" or "--name=value" in a table: its index, or -1.
static int find_option(const struct ctl_option *options, const char *word, size_t name_bytes)
{
    for (int i = 0; options[i].name; i++) {
        if (strlen(options[i].name) == name_bytes && memcmp(options[i].name, word, name_bytes) == 0)
            return i;
    }
    return -1;
}

static bool take_value(struct parse *parse, const struct ctl_option *option, const char *equals,
                       const char **value)
{
    *value = "";
    if (!option->value) {
        if (equals)
            return refuse(parse, ctl_usage_error("--%s takes no value", option->name));
        return true;
    }
    if (!equals && parse->at >= parse->argc)
        return refuse(parse, ctl_usage_error("--%s needs %s", option->name, option->value));
    *value = equals ? equals + 1 : parse->argv[parse->at++];
    return true;
}

static bool take_option(struct parse *parse, const char *word)
{
    const char *name = word + 2;
    const char *equals = strchr(name, '=');
    size_t name_bytes = equals ? (size_t)(equals - name) : strlen(name);
    const struct ctl_command *command = parse->args.command;
    int own = command ? find_option(command->options, name, name_bytes) : -1;
    int shared = own < 0 ? find_option(shared_options, name, name_bytes) : -1;
    if (own < 0 && shared < 0)
        return refuse(parse, ctl_usage_error("no such option: %s", word));
    const char *value;
    if (!take_value(parse, own >= 0 ? &command->options[own] : &shared_options[shared], equals,
                    &value))
        return false;
    if (shared >= 0) {
        parse->shared[shared] = value;
        return true;
    }
    if (parse->args.given_n == CTL_GIVEN_MAX)
        return refuse(parse, ctl_usage_error("more than %d options", CTL_GIVEN_MAX));
    parse->args.given[parse->args.given_n].option = own;
    parse->args.given[parse->args.given_n++].value = value;
    return true;
}

static bool take_operand(struct parse *parse, const char *word)
{
    if (!parse->args.command) {
        for (size_t i = 0; i < ARRAY_LEN(commands); i++) {
            if (strcmp(commands[i]->name, word) == 0)
                parse->args.command = commands[i];
        }
        if (!parse->args.command)
            return refuse(parse, ctl_usage_error("no such command: %s", word));
        return true;
    }
    if (parse->args.operands_n == CTL_GIVEN_MAX)
        return refuse(parse, ctl_usage_error("more than %d operands", CTL_GIVEN_MAX));
    parse->args.operands[parse->args.operands_n++] = word;
    return true;
}

static bool parse_all(struct parse *parse)
{
    bool options_end = false;
    while (parse->at < parse->argc) {
        const char *word = parse->argv[parse->at++];
        bool good;
        if (!options_end && strcmp(word, "--") == 0)
            good = options_end = true;
        else if (!options_end && strcmp(word, "-h") == 0)
            good = take_option(parse, "--help");
        else if (!options_end && word[0] == '-' && word[1] == '-')
            good = take_option(parse, word);
        else if (!options_end && word[0] == '-' && word[1])
            good = refuse(parse, ctl_usage_error("no such option: %s", word));
        else
            good = take_operand(parse, word);
        if (!good)
            return false;
    }
    return true;
}

static bool set_shared(struct parse *parse, struct ctl *ctl)
{
    const char *environment = getenv("EINSUMD_ENDPOINT");
    ctl->endpoint = parse->shared[SHARED_ENDPOINT] ? parse->shared[SHARED_ENDPOINT]
                    : parse->shared[SHARED_SERVER] ? parse->shared[SHARED_SERVER]
                    : environment && *environment  ? environment
                                                   : "127.0.0.1:50061";
    ctl->json = parse->shared[SHARED_JSON] != NULL;
    ctl->tls_ca = parse->shared[SHARED_TLS_CA];
    ctl->tls_certificate = parse->shared[SHARED_TLS_CERT];
    ctl->tls_key = parse->shared[SHARED_TLS_KEY];
    ctl->tls_server_name = parse->shared[SHARED_TLS_SERVER_NAME];
    const char *token_file = getenv("EINSUMD_TOKEN_FILE");
    ctl->token_file = parse->shared[SHARED_TOKEN_FILE] ? parse->shared[SHARED_TOKEN_FILE]
                      : token_file && *token_file      ? token_file
                                                       : NULL;
    const char *timeout = parse->shared[SHARED_TIMEOUT];
    if (timeout && ctl_number_list("timeout", timeout, 1, UINT32_MAX, &ctl->timeout_ms, 1) != 1)
        return refuse(parse, CTL_USAGE);
    const char *retry = parse->shared[SHARED_RETRY];
    if (retry && ctl_number_list("retry-ms", retry, 1, 86400000, &ctl->retry_ms, 1) != 1)
        return refuse(parse, CTL_USAGE);
    return true;
}

static bool check_operands(struct parse *parse)
{
    const struct ctl_command *command = parse->args.command;
    if (!command)
        return refuse(parse, ctl_usage_error("no command given"));
    if (parse->args.operands_n < command->operands_min ||
        parse->args.operands_n > command->operands_max)
        return refuse(parse, ctl_usage_error("usage: einsumctl %s [OPTIONS] %s", command->name,
                                             command->operands));
    return true;
}

int main(int argc, char **argv)
{
    // Before the first thread: stock malloc would hand gRPC's read buffers back to the system and
    // fault them in again for each large message.
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 64 << 20);
    // gRPC's threads may still be about TLS when this one exits: OpenSSL must not be gone then.
    OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, NULL);

    struct parse parse = {.argc = argc, .argv = argv, .at = 1};
    if (!parse_all(&parse))
        return (int)parse.error;
    if (parse.shared[SHARED_HELP]) {
        if (parse.args.command)
            print_command_help(parse.args.command);
        else
            print_help();
        return CTL_OK;
    }
    if (parse.shared[SHARED_VERSION]) {
        printf("einsumctl %s\n", EINSUMD_VERSION);
        return CTL_OK;
    }
    struct ctl ctl = {0};
    if (!check_operands(&parse) || !set_shared(&parse, &ctl))
        return (int)parse.error;
    enum ctl_exit code = parse.args.command->run(&ctl, &parse.args);
    einsum_client_destroy(ctl.client);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "einsumctl: cannot write to stdout\n");
        return (int)(code == CTL_OK ? CTL_FAILED : code);
    }
    return (int)code;
}
