// einsumd's command line. What the daemon does is in daemon.c.
#include <getopt.h>
#include <openssl/crypto.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "daemon.h"
#include "heap.h"

enum { EXIT_USAGE = 2 };

static const char usage[] =
    "usage: einsumd [--config FILE]\n"
    "\n"
    "Serves DeepSeek-V4's FP8 attention output projection over gRPC.\n"
    "\n"
    "  -c, --config FILE   the configuration, JSON; without it every key has its default\n"
    "      --check-config  read the configuration, say what is wrong with it, and exit\n"
    "      --print-config  print the configuration in force as JSON, and exit\n"
    "      --help-config   list every key: unit, range, default, meaning\n"
    "      --version       print the version\n"
    "  -h, --help          this text\n"
    "\n"
    "SIGTERM and SIGINT drain: new calls are refused, those in flight are answered, then einsumd\n"
    "exits. A second one cuts them off. SIGHUP reads the configuration again: all of it holds "
    "from\n"
    "then on, or the log says why the old one was kept.\n"
    "\n"
    "exit codes: 0 drained, 1 could not start, 2 usage or configuration, 3 the device was lost,\n"
    "4 a batch or thread hung\n"
    "\n"
    "Try it:  einsumctl make-checkpoint --model v4-flash --layers 4 checkpoint\n"
    "         echo '{\"weights_roots\": [\"'$PWD'\"], \"weights\": [{\"path\": \"checkpoint\"}]}' "
    "> einsumd.json\n"
    "         einsumd --config einsumd.json\n"
    "         einsumctl selftest\n";

enum action { ACTION_SERVE, ACTION_CHECK, ACTION_PRINT };

struct arguments {
    enum action action;
    const char *config_path;
};

enum { OPTION_CHECK = 256, OPTION_PRINT, OPTION_HELP_CONFIG, OPTION_VERSION };

// Exits for --help and its like, and for what it does not understand.
static struct arguments parse_arguments(int argc, char **argv)
{
    static const struct option options[] = {
        {"config", required_argument, NULL, 'c'},
        {"check-config", no_argument, NULL, OPTION_CHECK},
        {"print-config", no_argument, NULL, OPTION_PRINT},
        {"help-config", no_argument, NULL, OPTION_HELP_CONFIG},
        {"version", no_argument, NULL, OPTION_VERSION},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    struct arguments arguments = {0};
    int option;
    while ((option = getopt_long(argc, argv, "c:h", options, NULL)) != -1) {
        switch (option) {
        case 'c':
            arguments.config_path = optarg;
            break;
        case OPTION_CHECK:
            arguments.action = ACTION_CHECK;
            break;
        case OPTION_PRINT:
            arguments.action = ACTION_PRINT;
            break;
        case OPTION_HELP_CONFIG:
            config_print_help();
            exit(EXIT_SUCCESS);
        case OPTION_VERSION:
            puts("einsumd " EINSUMD_VERSION);
            exit(EXIT_SUCCESS);
        case 'h':
            fputs(usage, stdout);
            exit(EXIT_SUCCESS);
        default:
            fputs("einsumd --help lists the options\n", stderr);
            exit(EXIT_USAGE);
        }
    }
    if (optind < argc) {
        fprintf(stderr,
                "einsumd: unexpected argument '%s'; the configuration goes behind --config\n",
                argv[optind]);
        exit(EXIT_USAGE);
    }
    return arguments;
}

// Before the first thread: all inherit the mask, and the main loop alone lets them in again. What a
// thread raises by itself stays open.
static void block_signals(void)
{
    sigset_t blocked;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    sigdelset(&blocked, SIGABRT);
    sigdelset(&blocked, SIGTRAP);
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
    signal(SIGPIPE, SIG_IGN);
}

// Whoever takes this process over gains no rights by what he starts, and what it holds is read by
// nobody but root: not from a core, not by ptrace.
static void confine(const struct config *config)
{
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (!config->core_dumps)
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

int main(int argc, char **argv)
{
    // gRPC's threads may still be about TLS when this one exits: OpenSSL must not be gone then.
    OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, NULL);
    struct arguments arguments = parse_arguments(argc, argv);
    if (arguments.action == ACTION_SERVE)
        block_signals(); // so early: a SIGHUP that comes now must not kill
    struct config *config = malloc(sizeof *config);
    struct error err;
    enum status status = STATUS_RESOURCE_EXHAUSTED;
    if (!config)
        error_set(&err, status, "out of memory");
    else if (arguments.config_path)
        status = config_load(config, arguments.config_path, &err);
    else
        status = config_init(config, &err);
    if (status != STATUS_OK) {
        fprintf(stderr, "einsumd: %s\n", err.text);
        free(config);
        return EXIT_USAGE;
    }

    int code = EXIT_SUCCESS;
    switch (arguments.action) {
    case ACTION_CHECK:
        puts("the configuration is valid");
        break;
    case ACTION_PRINT:
        config_print(config);
        break;
    case ACTION_SERVE:
        heap_tune();
        confine(config);
        log_configure(config->log_level, config->log_format);
        log_never_wait();
        code = (int)daemon_run(config, arguments.config_path);
        break;
    }
    config_deinit(config);
    free(config);
    return code;
}
