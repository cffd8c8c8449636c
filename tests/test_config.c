// The configuration: what the defaults are, that every key takes its range and no more, and that
// whatever is wrong is named. LeakSanitizer sees to it that a refused file leaves nothing behind.
#include "server/config.h"

#include <check.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/access.h"

static void parse_ok(struct config *config, const char *text)
{
    struct error err = {.text = ""};
    enum status status = config_parse(config, text, strlen(text), &err);
    ck_assert_msg(status == STATUS_OK, "%s: %s", text, err.text);
}

// Refused, with a text that holds `wanted`, and with nothing to free.
static void parse_refused(const char *text, size_t bytes, const char *field, const char *wanted)
{
    struct config config, empty;
    memset(&config, 0xa5, sizeof config);
    memset(&empty, 0, sizeof empty);
    struct error err = {.text = ""};
    enum status status = config_parse(&config, text, bytes, &err);
    ck_assert_msg(status == STATUS_INVALID_ARGUMENT, "%s: status %s", text, status_name(status));
    ck_assert_int_eq(err.status, status);
    ck_assert_msg(strstr(err.text, wanted) != NULL, "%s: \"%s\" lacks \"%s\"", text, err.text,
                  wanted);
    ck_assert_str_eq(err.field, field);
    ck_assert_mem_eq(&config, &empty, sizeof config);
}

START_TEST(defaults_are_as_documented)
{
    struct config config;
    ck_assert_int_eq(config_init(&config, NULL), STATUS_OK);
    ck_assert_uint_eq(config.listen_n, 1);
    ck_assert_str_eq(config.listen[0], "127.0.0.1:50061");
    ck_assert_uint_eq(config.unix_socket_mode, 0660);
    ck_assert_uint_eq(config.connections_max, 1024);
    ck_assert_uint_eq(config.connection_requests_max, 256);
    ck_assert_uint_eq(config.stream_requests_max, 64);
    ck_assert_uint_eq(config.calls_max, 4096);
    ck_assert_uint_eq(config.transport_bytes_max, 0);
    ck_assert_uint_eq(config.rpc_threads, 0);
    ck_assert_uint_eq(config.in_flight_max, 16384);
    ck_assert_uint_eq(config.connection_in_flight_max, 4096);
    ck_assert_uint_eq(config.message_bytes_max, 0);
    ck_assert_uint_eq(config.metadata_bytes_max, 8192);
    ck_assert_uint_eq(config.connection_bytes_max, 0);
    ck_assert_uint_eq(config.connection_faults_max, 1000);
    ck_assert_uint_eq(config.penalty_ms, 2000);
    ck_assert_uint_eq(config.handshake_ms, 10000);
    ck_assert_uint_eq(config.keepalive_ms, 60000);
    ck_assert_uint_eq(config.keepalive_timeout_ms, 20000);
    ck_assert_uint_eq(config.connection_idle_ms, 0);
    ck_assert_uint_eq(config.connection_age_ms, 0);
    ck_assert_uint_eq(config.connection_age_grace_ms, 60000);
    ck_assert_uint_eq(config.queue_tokens_max, 0);
    ck_assert_uint_eq(config.queue_bytes_max, 0);
    ck_assert_str_eq(config.engine, "auto");
    ck_assert_str_eq(config.kernel, "auto");
    ck_assert_uint_eq(config.compute_threads, 0);
    ck_assert_uint_eq(config.lanes, 0);
    ck_assert_uint_eq(config.phase_sample, 16);
    ck_assert_uint_eq(config.request_tokens_max, 8192);
    ck_assert_uint_eq(config.batch_tokens_max, 512);
    ck_assert_uint_eq(config.buckets_n, 10);
    for (size_t i = 0; i < config.buckets_n; i++)
        ck_assert_uint_eq(config.buckets[i], 1u << i);
    ck_assert_uint_eq(config.batch_requests_max, 256);
    ck_assert_uint_eq(config.max_queue_delay_us, 0);
    ck_assert_uint_eq(config.batches, 0);
    ck_assert_uint_eq(config.batch_input_bytes, 0);
    ck_assert_uint_eq(config.batch_output_bytes, 0);
    ck_assert_uint_eq(config.queue_requests_max, 1024);
    ck_assert_uint_eq(config.cut_bytes_max, 0);
    ck_assert_uint_eq(config.deadline_ms_max, 60000);
    ck_assert_uint_eq(config.reply_timeout_ms, 10000);
    ck_assert_str_eq(config.http_listen, "");
    ck_assert_uint_eq(config.http_connections_max, 64);
    ck_assert_int_eq(config.request_log, CONFIG_REQUEST_LOG_OFF);
    ck_assert_uint_eq(config.request_log_sample, 1);
    ck_assert_str_eq(config.trace_endpoint, "");
    ck_assert_uint_eq(config.trace_sample, 0);
    ck_assert_uint_eq(config.weights_roots_n, 0);
    ck_assert_uint_eq(config.weights_n, 0);
    ck_assert_uint_eq(config.ropes_n, 0);
    ck_assert_uint_eq(config.load_threads, 0);
    ck_assert_uint_eq(config.drain_grace_ms, 30000);
    ck_assert_uint_eq(config.lame_duck_ms, 0);
    ck_assert_uint_eq(config.watchdog_ms, 30000);
    ck_assert(config.self_test_at_start);
    ck_assert(config.self_test_at_load);
    ck_assert_uint_eq(config.scrub_seconds, 3600);
    ck_assert_uint_eq(config.nan_sample, 16);
    ck_assert(!config.core_dumps);
    ck_assert_int_eq(config.log_level, LOG_LEVEL_INFO);
    ck_assert_int_eq(config.log_format, LOG_FORMAT_PLAIN);
    config_deinit(&config);
}
END_TEST

START_TEST(tcp_gives_nothing_once_something_says_who_gets_in)
{
    static const struct {
        const char *text;
        uint32_t scopes;
    } cases[] = {
        {"{}", ACCESS_INFER | ACCESS_READ},
        {"{\"tokens_file\": \"t\"}", 0},
        {"{\"tls_certificate\": \"c\", \"tls_key\": \"k\"}", ACCESS_INFER | ACCESS_READ},
        {"{\"tls_certificate\": \"c\", \"tls_key\": \"k\", \"tls_client_ca\": \"a\"}", 0},
        {"{\"tokens_file\": \"t\", \"tcp_scopes\": [\"read\"]}", ACCESS_READ},
        {"{\"tcp_scopes\": []}", 0},
    };
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct config config;
        parse_ok(&config, cases[i].text);
        ck_assert_uint_eq(config_tcp_scopes(&config), cases[i].scopes);
        ck_assert_uint_eq(config_scopes(config.unix_scopes, config.unix_scopes_n), ACCESS_ALL);
        config_deinit(&config);
    }
}
END_TEST

START_TEST(deinit_leaves_nothing_and_may_be_repeated)
{
    struct config config, empty;
    memset(&empty, 0, sizeof empty);
    ck_assert_int_eq(config_init(&config, NULL), STATUS_OK);
    config_deinit(&config);
    ck_assert_mem_eq(&config, &empty, sizeof config);
    config_deinit(&config);
}
END_TEST

// Every key, none at its default.
static const char everything[] =
    "{\"listen\": [\"0.0.0.0:1\", \"[::1]:65535\", \"unix:/run/e.sock\"],"
    " \"unix_socket_mode\": \"0600\", \"connections_max\": 2, \"connection_requests_max\": 3,"
    " \"stream_requests_max\": 4, \"rpc_threads\": 5, \"calls_max\": 25, \"transport_bytes_max\": "
    "26, \"shared_memory_listen\": \"unix:/run/s.sock\", \"shared_connections_max\": 28,"
    " \"shared_connection_regions_max\": 16, \"shared_regions_max\": 29,"
    " \"shared_region_bytes_max\": 8192, \"shared_bytes_max\": 16384,"
    " \"shared_memory_cuda\": true, \"ring_entries_max\": 128, \"ring_spin_us\": 30,"
    " \"tls_certificate\": \"/t/c.pem\", \"tls_key\": \"/t/k.pem\", \"tls_client_ca\": "
    "\"/t/a.pem\","
    " \"tls_handshake_ms\": 340, \"tls_threads\": 35, \"access_look_ms\": 360, \"tokens_file\": "
    "\"/t/t.json\","
    " \"unix_scopes\": [\"infer\"], \"tcp_scopes\": [\"read\", \"admin\"],"
    " \"tls_client_scopes\": [\"admin\"], \"insecure_listen\": true,"
    " \"health_listen\": [\"0.0.0.0:3\", \"unix:/run/h.sock\"],"
    " \"http_listen\": \"127.0.0.1:2\", \"http_connections_max\": 31,"
    " \"request_log\": \"errors\", \"request_log_sample\": 32,"
    " \"trace_endpoint\": \"http://a:1/v1/traces\", \"trace_sample\": 33,"
    " \"engine\": \"null\", \"kernel\": \"avx2\","
    " \"compute_threads\": 6, \"lanes\": 7, \"phase_sample\": 27,"
    " \"request_tokens_max\": 8, \"batch_tokens_max\": 24,"
    " \"buckets\": [9, 24], \"batch_requests_max\": 10, \"max_queue_delay_us\": 11,"
    " \"batches\": 12, \"batch_input_bytes\": 1099511627776, \"batch_output_bytes\": 14,"
    " \"queue_requests_max\": 15, \"deadline_ms_max\": 16, \"reply_timeout_ms\": 17,"
    " \"cut_bytes_max\": 31,"
    " \"in_flight_max\": 41, \"connection_in_flight_max\": 42, \"message_bytes_max\": 43,"
    " \"metadata_bytes_max\": 1044, \"connection_bytes_max\": 45, \"connection_faults_max\": 46,"
    " \"penalty_ms\": 47, \"handshake_ms\": 48, \"keepalive_ms\": 49,"
    " \"keepalive_timeout_ms\": 50, \"connection_idle_ms\": 51, \"connection_age_ms\": 52,"
    " \"connection_age_grace_ms\": 53, \"queue_tokens_max\": 54, \"queue_bytes_max\": 55,"
    " \"weights_roots\": [\"/m\", \"/n\"],"
    " \"weights\": [{\"path\": \"flash\"},"
    "   {\"path\": \"/n/pro\", \"tensors\": [\"a*\", \"b*\"], \"name_prefix\": \"pro.\", "
    "\"checksums\": \"/n/SUMS\","
    "    \"tensor_parallel_rank\": 18, \"tensor_parallel_size\": 19, \"output_dim\": 20}],"
    " \"ropes\": [{\"weights\": \"layers.0.*\", \"theta\": 10000},"
    "   {\"weights\": \"*\", \"theta\": 160000.5, \"factor\": 16, \"original_positions_max\": "
    "65536,"
    "    \"beta_fast\": 31.5, \"beta_slow\": 1.5, \"positions_max\": 1048575},"
    "   {\"weights\": \"pro.*\", \"cache\": \"rope.safetensors\", \"cache_tensor\": \"t\"}],"
    " \"load_threads\": 21, \"drain_grace_ms\": 22, \"lame_duck_ms\": 23,"
    " \"watchdog_ms\": 24,"
    " \"self_test_at_start\": false, \"self_test_at_load\": false, \"scrub_seconds\": 60, "
    "\"nan_sample\": 5, \"core_dumps\": true, "
    "\"log_level\": \"debug\", \"log_format\": \"json\"}";

static void ck_access(const struct config *config)
{
    ck_assert_str_eq(config->tls_certificate, "/t/c.pem");
    ck_assert_str_eq(config->tls_key, "/t/k.pem");
    ck_assert_str_eq(config->tls_client_ca, "/t/a.pem");
    ck_assert_uint_eq(config->tls_handshake_ms, 340);
    ck_assert_uint_eq(config->tls_threads, 35);
    ck_assert_uint_eq(config->access_look_ms, 360);
    ck_assert_str_eq(config->tokens_file, "/t/t.json");
    ck_assert_uint_eq(config_scopes(config->unix_scopes, config->unix_scopes_n), ACCESS_INFER);
    ck_assert_uint_eq(config_tcp_scopes(config), ACCESS_READ | ACCESS_ADMIN);
    ck_assert_uint_eq(config_scopes(config->tls_client_scopes, config->tls_client_scopes_n),
                      ACCESS_ADMIN);
    ck_assert(config->insecure_listen);
    ck_assert_uint_eq(config->health_listen_n, 2);
    ck_assert_str_eq(config->health_listen[0], "0.0.0.0:3");
    ck_assert_str_eq(config->health_listen[1], "unix:/run/h.sock");
}

static void ck_shared(const struct config *config)
{
    ck_assert_str_eq(config->shared_memory_listen, "unix:/run/s.sock");
    ck_assert_uint_eq(config->shared_connections_max, 28);
    ck_assert_uint_eq(config->shared_connection_regions_max, 16);
    ck_assert_uint_eq(config->shared_regions_max, 29);
    ck_assert_uint_eq(config->shared_region_bytes_max, 8192);
    ck_assert_uint_eq(config->shared_bytes_max, 16384);
    ck_assert(config->shared_memory_cuda);
    ck_assert_uint_eq(config->ring_entries_max, 128);
    ck_assert_uint_eq(config->ring_spin_us, 30);
}

static void ck_looking_on(const struct config *config)
{
    ck_assert_str_eq(config->http_listen, "127.0.0.1:2");
    ck_assert_uint_eq(config->http_connections_max, 31);
    ck_assert_int_eq(config->request_log, CONFIG_REQUEST_LOG_ERRORS);
    ck_assert_uint_eq(config->request_log_sample, 32);
    ck_assert_str_eq(config->trace_endpoint, "http://a:1/v1/traces");
    ck_assert_uint_eq(config->trace_sample, 33);
}

static void ck_weights_and_ropes(const struct config *config)
{
    ck_assert_uint_eq(config->weights_roots_n, 2);
    ck_assert_str_eq(config->weights_roots[1], "/n");
    ck_assert_uint_eq(config->weights_n, 2);
    const struct config_weights *flash = &config->weights[0], *pro = &config->weights[1];
    ck_assert_str_eq(flash->path, "flash");
    ck_assert_uint_eq(flash->tensors_n, 0);
    ck_assert_str_eq(flash->name_prefix, "");
    ck_assert_str_eq(flash->checksums, "");
    ck_assert_uint_eq(flash->tensor_parallel_rank, 0);
    ck_assert_uint_eq(flash->tensor_parallel_size, 1);
    ck_assert_uint_eq(flash->output_dim, 1024);
    ck_assert_str_eq(pro->path, "/n/pro");
    ck_assert_uint_eq(pro->tensors_n, 2);
    ck_assert_str_eq(pro->tensors[0], "a*");
    ck_assert_str_eq(pro->tensors[1], "b*");
    ck_assert_str_eq(pro->name_prefix, "pro.");
    ck_assert_str_eq(pro->checksums, "/n/SUMS");
    ck_assert_uint_eq(pro->tensor_parallel_rank, 18);
    ck_assert_uint_eq(pro->tensor_parallel_size, 19);
    ck_assert_uint_eq(pro->output_dim, 20);
    ck_assert_uint_eq(config->ropes_n, 3);
    const struct config_rope *plain = &config->ropes[0], *yarn = &config->ropes[1];
    ck_assert_str_eq(plain->weights, "layers.0.*");
    ck_assert_double_eq(plain->theta, 10000);
    ck_assert_double_eq(plain->factor, 0);
    ck_assert_str_eq(plain->cache, "");
    ck_assert_double_eq(yarn->theta, 160000.5);
    ck_assert_double_eq(yarn->factor, 16);
    ck_assert_uint_eq(yarn->original_positions_max, 65536);
    ck_assert_double_eq(yarn->beta_fast, 31.5);
    ck_assert_double_eq(yarn->beta_slow, 1.5);
    ck_assert_uint_eq(yarn->positions_max, 1048575);
    ck_assert_str_eq(config->ropes[2].cache, "rope.safetensors");
    ck_assert_str_eq(config->ropes[2].cache_tensor, "t");
}

static void ck_what_callers_may_do(const struct config *config)
{
    ck_assert_uint_eq(config->in_flight_max, 41);
    ck_assert_uint_eq(config->connection_in_flight_max, 42);
    ck_assert_uint_eq(config->message_bytes_max, 43);
    ck_assert_uint_eq(config->metadata_bytes_max, 1044);
    ck_assert_uint_eq(config->connection_bytes_max, 45);
    ck_assert_uint_eq(config->connection_faults_max, 46);
    ck_assert_uint_eq(config->penalty_ms, 47);
    ck_assert_uint_eq(config->handshake_ms, 48);
    ck_assert_uint_eq(config->keepalive_ms, 49);
    ck_assert_uint_eq(config->keepalive_timeout_ms, 50);
    ck_assert_uint_eq(config->connection_idle_ms, 51);
    ck_assert_uint_eq(config->connection_age_ms, 52);
    ck_assert_uint_eq(config->connection_age_grace_ms, 53);
    ck_assert_uint_eq(config->queue_tokens_max, 54);
    ck_assert_uint_eq(config->queue_bytes_max, 55);
}

static void ck_everything(const struct config *config)
{
    ck_assert_uint_eq(config->listen_n, 3);
    ck_assert_str_eq(config->listen[0], "0.0.0.0:1");
    ck_assert_str_eq(config->listen[1], "[::1]:65535");
    ck_assert_str_eq(config->listen[2], "unix:/run/e.sock");
    ck_assert_uint_eq(config->unix_socket_mode, 0600);
    ck_assert_uint_eq(config->connections_max, 2);
    ck_assert_uint_eq(config->connection_requests_max, 3);
    ck_assert_uint_eq(config->stream_requests_max, 4);
    ck_assert_uint_eq(config->rpc_threads, 5);
    ck_assert_uint_eq(config->calls_max, 25);
    ck_assert_uint_eq(config->transport_bytes_max, 26);
    ck_access(config);
    ck_what_callers_may_do(config);
    ck_shared(config);
    ck_looking_on(config);
    ck_assert_str_eq(config->engine, "null");
    ck_assert_str_eq(config->kernel, "avx2");
    ck_assert_uint_eq(config->compute_threads, 6);
    ck_assert_uint_eq(config->lanes, 7);
    ck_assert_uint_eq(config->phase_sample, 27);
    ck_assert_uint_eq(config->request_tokens_max, 8);
    ck_assert_uint_eq(config->batch_tokens_max, 24);
    ck_assert_uint_eq(config->buckets_n, 2);
    ck_assert_uint_eq(config->buckets[0], 9);
    ck_assert_uint_eq(config->buckets[1], 24);
    ck_assert_uint_eq(config->batch_requests_max, 10);
    ck_assert_uint_eq(config->max_queue_delay_us, 11);
    ck_assert_uint_eq(config->batches, 12);
    ck_assert_uint_eq(config->batch_input_bytes, 1ull << 40);
    ck_assert_uint_eq(config->batch_output_bytes, 14);
    ck_assert_uint_eq(config->queue_requests_max, 15);
    ck_assert_uint_eq(config->deadline_ms_max, 16);
    ck_assert_uint_eq(config->reply_timeout_ms, 17);
    ck_assert_uint_eq(config->cut_bytes_max, 31);
    ck_weights_and_ropes(config);
    ck_assert_uint_eq(config->load_threads, 21);
    ck_assert_uint_eq(config->drain_grace_ms, 22);
    ck_assert_uint_eq(config->lame_duck_ms, 23);
    ck_assert_uint_eq(config->watchdog_ms, 24);
    ck_assert(!config->self_test_at_start);
    ck_assert(!config->self_test_at_load);
    ck_assert_uint_eq(config->scrub_seconds, 60);
    ck_assert_uint_eq(config->nan_sample, 5);
    ck_assert(config->core_dumps);
    ck_assert_int_eq(config->log_level, LOG_LEVEL_DEBUG);
    ck_assert_int_eq(config->log_format, LOG_FORMAT_JSON);
}

START_TEST(every_key_reaches_its_member)
{
    struct config config;
    parse_ok(&config, everything);
    ck_everything(&config);
    config_deinit(&config);
}
END_TEST

// Runs `print` with standard output going to a memory file; returns its path for config_load.
static void print_captured(void (*print)(const struct config *), const struct config *config,
                           char *path, size_t path_bytes)
{
    int file = memfd_create("printed", 0);
    ck_assert_int_ge(file, 0);
    fflush(stdout);
    int saved = dup(STDOUT_FILENO);
    ck_assert_int_eq(dup2(file, STDOUT_FILENO), STDOUT_FILENO);
    print(config);
    fflush(stdout);
    ck_assert_int_eq(dup2(saved, STDOUT_FILENO), STDOUT_FILENO);
    close(saved);
    snprintf(path, path_bytes, "/proc/self/fd/%d", file);
}

START_TEST(what_is_printed_loads_as_the_same)
{
    static const char *const texts[] = {"{}", everything};
    char path[64], path_again[64], first[16384] = "", second[16384] = "";
    struct config config, again;
    parse_ok(&config, texts[_i]);
    print_captured(config_print, &config, path, sizeof path);
    struct error err = {.text = ""};
    ck_assert_msg(config_load(&again, path, &err) == STATUS_OK, "%s", err.text);
    if (_i == 1) {
        ck_everything(&again);
        // A new key must come into `everything` too.
        json_t *printed = json_load_file(path, 0, NULL), *given = json_loads(everything, 0, NULL);
        ck_assert_uint_eq(json_object_size(given), json_object_size(printed));
        json_decref(printed);
        json_decref(given);
    }
    print_captured(config_print, &again, path_again, sizeof path_again);
    FILE *file = fopen(path, "r"), *file_again = fopen(path_again, "r");
    size_t bytes = fread(first, 1, sizeof first - 1, file);
    ck_assert_uint_gt(bytes, 500);
    ck_assert_uint_eq(fread(second, 1, sizeof second - 1, file_again), bytes);
    ck_assert_str_eq(first, second);
    fclose(file);
    fclose(file_again);
    config_deinit(&config);
    config_deinit(&again);
}
END_TEST

static void print_help(const struct config *config)
{
    (void)config;
    config_print_help();
}

START_TEST(help_names_every_key_with_unit_and_range)
{
    char path[64], help[16384] = "";
    print_captured(print_help, NULL, path, sizeof path);
    FILE *file = fopen(path, "r");
    ck_assert_uint_gt(fread(help, 1, sizeof help - 1, file), 1000);
    fclose(file);
    static const char *const parts[] = {
        "batching\n",
        "batch_tokens_max",
        "an integer from 2 to 65536 tokens",
        "weights[].tensor_parallel_rank",
        "(required)",
        "[\"127.0.0.1:50061\"]",
        "one of \"auto\", \"cpu\", \"cuda\", \"null\"",
        "milliseconds",
        "a list of 0 to 64, each an object",
        "an octal mode from \"0000\" to \"0777\"",
    };
    for (size_t i = 0; i < ARRAY_LEN(parts); i++)
        ck_assert_msg(strstr(help, parts[i]) != NULL, "no %s in\n%s", parts[i], help);
    for (char *line = strtok(help, "\n"); line; line = strtok(NULL, "\n"))
        ck_assert_msg(strlen(line) <= 120, "%s", line);
}
END_TEST

static const struct {
    const char *key;
    unsigned long long min, max;
} ranges[] = {
    {"connections_max", 1, 65536},
    {"connection_requests_max", 1, 65536},
    {"calls_max", 1, 1 << 20},
    {"stream_requests_max", 1, 65536},
    {"transport_bytes_max", 0, 1ull << 40},
    {"rpc_threads", 0, 256},
    {"in_flight_max", 1, 1 << 24},
    {"connection_in_flight_max", 1, 1 << 24},
    {"message_bytes_max", 0, INT32_MAX},
    {"metadata_bytes_max", 1024, 1 << 20},
    {"connection_bytes_max", 0, 1ull << 40},
    {"connection_faults_max", 1, 1 << 20},
    {"penalty_ms", 0, 86400000},
    {"handshake_ms", 1, 86400000},
    {"keepalive_ms", 0, 86400000},
    {"keepalive_timeout_ms", 1, 86400000},
    {"connection_idle_ms", 0, 86400000},
    {"connection_age_ms", 0, 86400000},
    {"connection_age_grace_ms", 1, 86400000},
    {"queue_tokens_max", 0, 1ull << 40},
    {"queue_bytes_max", 0, 1ull << 40},
    {"compute_threads", 0, 1024},
    {"lanes", 0, 16},
    {"phase_sample", 0, 1 << 20},
    {"batch_requests_max", 1, 65536},
    {"max_queue_delay_us", 0, 1000000},
    {"batches", 0, 64},
    {"batch_input_bytes", 0, 1ull << 40},
    {"batch_output_bytes", 0, 1ull << 40},
    {"queue_requests_max", 1, 1 << 20},
    {"deadline_ms_max", 1, 86400000},
    {"reply_timeout_ms", 1, 86400000},
    {"load_threads", 0, 256},
    {"drain_grace_ms", 0, 86400000},
    {"lame_duck_ms", 0, 86400000},
    {"watchdog_ms", 0, 86400000},
    {"shared_connections_max", 1, 65536},
    {"shared_connection_regions_max", 1, 16},
    {"shared_regions_max", 1, 65536},
    {"shared_region_bytes_max", 4096, 1ull << 40},
    {"shared_bytes_max", 4096, 1ull << 40},
    {"ring_entries_max", 1, 4096},
    {"ring_spin_us", 0, 10000},
    {"tls_handshake_ms", 100, 86400000},
    {"tls_threads", 0, 256},
    {"access_look_ms", 50, 86400000},
    {"scrub_seconds", 0, 2592000},
    {"nan_sample", 0, 1 << 20},
};

START_TEST(integers_take_their_range_and_nothing_else)
{
    const char *key = ranges[_i].key;
    unsigned long long min = ranges[_i].min, max = ranges[_i].max;
    char text[256], found[64];
    struct config config;
    const unsigned long long good[] = {min, min + 1, max};
    for (size_t i = 0; i < ARRAY_LEN(good); i++) {
        snprintf(text, sizeof text, "{\"%s\": %llu}", key, good[i]);
        parse_ok(&config, text);
        config_deinit(&config);
    }
    // 2^32 + 1 and its like are what a truncating reader would take for 1.
    const long long bad[] = {
        (long long)min - 1, (long long)max + 1, -1, ((long long)1 << 32) * 1024 + 1,
        INT64_MAX,          INT64_MIN};
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        snprintf(text, sizeof text, "{\"%s\": %lld}", key, bad[i]);
        snprintf(found, sizeof found, "an integer from %llu to %llu", min, max);
        parse_refused(text, strlen(text), key, found);
        snprintf(found, sizeof found, "got %lld", bad[i]);
        parse_refused(text, strlen(text), key, found);
    }
    static const char *const others[] = {"1.0", "1e0", "\"1\"", "true", "null", "[1]", "{}"};
    for (size_t i = 0; i < ARRAY_LEN(others); i++) {
        snprintf(text, sizeof text, "{\"%s\": %s}", key, others[i]);
        parse_refused(text, strlen(text), key, "expected an integer");
    }
}
END_TEST

static const struct {
    const char *text, *field, *wanted;
} refused[] = {
    // not JSON
    {"", "", "line 1, column 0"},
    {"{", "", "line 1"},
    {"{\n\"lanes\": 1,\n}", "", "line 3, column 1"},
    {"{\"lanes\": 1} x", "", "line 1"},
    {"{\"lanes\": 1, \"lanes\": 2}", "", "duplicate object key"},
    {"{\"lanes\": 9223372036854775808}", "", "too big integer"},
    {"{\"engine\": \"c\\u0000pu\"}", "", "\\u0000"},
    {"{\"engine\": \"\xff\"}", "", "unable to decode byte 0xff"},
    {"[]", "", "expected an object"},
    {"[{\"lanes\": 1}]", "", "expected an object"},
    // unknown keys, near and far
    {"{\"lane\": 1}", "lane", "did you mean \"lanes\"?"},
    {"{\"Lanes\": 1}", "Lanes", "did you mean \"lanes\"?"},
    {"{\"log-level\": \"info\"}", "log-level", "did you mean \"log_level\"?"},
    {"{\"max_queue_delay_ms\": 1}", "max_queue_delay_ms", "did you mean \"max_queue_delay_us\"?"},
    {"{\"bucket\": [1]}", "bucket", "did you mean \"buckets\"?"},
    {"{\"\": 1}", "", "unknown key"},
    {"{\"weights\": [{\"path\": \"a\", \"tensor\": []}]}", "weights[0].tensor",
     "did you mean \"tensors\"?"},
    {"{\"e\\u001b[31m\": 1}", "e?[31m", "unknown key"},
    // types
    {"{\"self_test_at_start\": 1}", "self_test_at_start", "expected true or false, got 1"},
    {"{\"engine\": \"gpu\"}", "engine",
     "expected one of \"auto\", \"cpu\", \"cuda\", \"null\", got \"gpu\""},
    {"{\"engine\": null}", "engine", "got null"},
    {"{\"kernel\": \"\"}", "kernel", "expected a string of 1 to 63 bytes, got \"\""},
    {"{\"log_level\": 1}", "log_level", "expected one of \"debug\""},
    {"{\"log_format\": \"xml\"}", "log_format", "expected one of \"plain\", \"json\", got \"xml\""},
    {"{\"unix_socket_mode\": 432}", "unix_socket_mode", "expected an octal mode"},
    {"{\"unix_socket_mode\": \"0680\"}", "unix_socket_mode", "got \"0680\""},
    {"{\"unix_socket_mode\": \"1777\"}", "unix_socket_mode", "got \"1777\""},
    {"{\"unix_socket_mode\": \"-1\"}", "unix_socket_mode", "got \"-1\""},
    {"{\"unix_socket_mode\": \"\"}", "unix_socket_mode", "got \"\""},
    {"{\"unix_socket_mode\": \"7777777777777777777777777\"}", "unix_socket_mode", "octal"},
    {"{\"listen\": \"a:1\"}", "listen", "expected a list of 1 to 16, each a string"},
    {"{\"listen\": []}", "listen", "got a list of 0"},
    {"{\"listen\": [\"a:1\", 2]}", "listen[1]", "got 2"},
    {"{\"listen\": [\"a:1\", [\"b:2\"]]}", "listen[1]", "got a list of 1"},
    {"{\"weights_roots\": [\"/a\", \"\"]}", "weights_roots[1]", "1 to 4095 bytes, got \"\""},
    {"{\"weights_roots\": {}}", "weights_roots", "got an object"},
    {"{\"weights\": {\"path\": \"a\"}}", "weights", "each an object, got an object"},
    {"{\"weights\": [\"a\"]}", "weights[0]", "expected an object, got \"a\""},
    {"{\"ropes\": [{\"theta\": 1e4}]}", "ropes[0].weights", "must be given"},
    {"{\"ropes\": [{\"weights\": \"*\", \"theta\": \"1e4\"}]}", "ropes[0].theta",
     "expected a number from 0 to 1073741824, got \"1e4\""},
    {"{\"ropes\": [{\"weights\": \"*\", \"theta\": -0.5}]}", "ropes[0].theta", "got -0.5"},
    {"{\"ropes\": [{\"weights\": \"*\", \"theta\": 1e10}]}", "ropes[0].theta", "got 1"},
    {"{\"ropes\": [{\"weights\": \"*\", \"theta\": 1, \"beta_fast\": true}]}", "ropes[0].beta_fast",
     "a number from 0 to 1000000 turns, got true"},
    {"{\"ropes\": [{\"weights\": \"*\", \"positions_max\": 1.5}]}", "ropes[0].positions_max",
     "expected an integer"},
    {"{\"ropes\": [{\"weights\": \"*\"}]}", "ropes[0].theta", "exactly one of theta and cache"},
    {"{\"ropes\": [{\"weights\": \"*\", \"theta\": 2, \"cache\": \"c\"}]}", "ropes[0].theta",
     "got both"},
    {"{\"ropes\": [{\"weights\": \"*\", \"cache\": \"c\"}]}", "ropes[0].cache", "weights_roots"},
    {"{\"weights\": [{}]}", "weights[0].path", "must be given"},
    {"{\"weights\": [{\"path\": \"\"}]}", "weights[0].path", "got \"\""},
    {"{\"weights\": [{\"path\": \"a\"}, {\"path\": \"b\", \"output_dim\": 0}]}",
     "weights[1].output_dim", "an integer from 1 to 65536 rows, got 0"},
    {"{\"weights\": [{\"path\": \"a\", \"tensors\": [\"x\", 1]}]}", "weights[0].tensors[1]",
     "got 1"},
    // together
    {"{\"weights\": [{\"path\": \"a\"}]}", "weights_roots", "must name the directory"},
    {"{\"weights_roots\": [\"/r\"], "
     "\"weights\": [{\"path\": \"a\", \"tensor_parallel_rank\": 1}]}",
     "weights[0].tensor_parallel_rank", "below tensor_parallel_size (1), got 1"},
    {"{\"request_tokens_max\": 65537}", "request_tokens_max", "an integer from 1 to 65536 tokens"},
    {"{\"cut_bytes_max\": -1}", "cut_bytes_max", "got -1"},
    {"{\"batch_tokens_max\": 1}", "batch_tokens_max", "an integer from 2 to 65536 tokens, got 1"},
    {"{\"buckets\": [1, 2]}", "buckets", "the last must be batch_tokens_max (512), got 2"},
    {"{\"buckets\": [512, 1024]}", "buckets", "the last must be batch_tokens_max (512), got 1024"},
    {"{\"buckets\": [8, 8, 512]}", "buckets", "must ascend, got 8 after 8"},
    {"{\"buckets\": [16, 8, 512]}", "buckets", "must ascend, got 8 after 16"},
    {"{\"buckets\": [0, 512]}", "buckets[0]", "got 0"},
    {"{\"buckets\": [1.5, 512]}", "buckets[0]", "got 1.5"},
    {"{\"lanes\": 4, \"batches\": 3}", "batches", "at least lanes (4), got 3"},
    {"{\"listen\": [\"a:1\", \"b:1\", \"a:1\"]}", "listen[2]", "the same as listen[0]"},
    {"{\"shared_memory_listen\": \"/a\"}", "shared_memory_listen", "expected \"unix:/PATH\""},
    {"{\"shared_memory_listen\": \"unix:a\"}", "shared_memory_listen", "an absolute path"},
    {"{\"listen\": [\"unix:/a\"], \"shared_memory_listen\": \"unix:/a\"}", "shared_memory_listen",
     "the same as listen[0]"},
    {"{\"listen\": [\"unix:/a:0\", \"unix:/a:0\"]}", "listen[1]", "the same as listen[0]"},
    {"{\"tls_certificate\": \"c\"}", "tls_key", "with tls_certificate"},
    {"{\"tls_key\": \"k\"}", "tls_certificate", "with tls_key"},
    {"{\"tls_client_ca\": \"a\"}", "tls_client_ca", "needs tls_certificate and tls_key"},
    {"{\"tcp_scopes\": [\"auto\", \"infer\"]}", "tcp_scopes", "\"auto\" alone"},
    {"{\"tcp_scopes\": [\"root\"]}", "tcp_scopes[0]",
     "one of \"infer\", \"read\", \"admin\", \"auto\""},
    {"{\"unix_scopes\": [\"auto\"]}", "unix_scopes[0]", "one of \"infer\", \"read\", \"admin\""},
    {"{\"shared_memory_listen\": \"unix:/a\", \"unix_scopes\": [\"read\"]}", "shared_memory_listen",
     "needs \"infer\" in unix_scopes"},
    {"{\"health_listen\": [\"a\"]}", "health_listen[0]", "expected \"HOST:PORT\""},
    {"{\"listen\": [\"a:1\"], \"health_listen\": [\"b:1\", \"a:1\"]}", "health_listen[1]",
     "the same as listen[0]"},
    {"{\"http_listen\": \"a:1\", \"health_listen\": [\"a:1\"]}", "health_listen[0]",
     "the same as http_listen"},
    {"{\"request_log\": \"some\"}", "request_log", "one of \"off\", \"errors\", \"all\""},
    {"{\"request_log_sample\": 0}", "request_log_sample", "got 0"},
    {"{\"trace_endpoint\": \"collector:4318\"}", "trace_endpoint", "expected \"http://"},
    {"{\"http_listen\": \"localhost\"}", "http_listen", "expected \"HOST:PORT\""},
    {"{\"listen\": [\"a:1\"], \"http_listen\": \"a:1\"}", "http_listen", "the same as listen[0]"},
    {"{\"shared_memory_listen\": \"unix:/a\", \"http_listen\": \"unix:/a\"}", "http_listen",
     "the same as shared_memory_listen"},
};

START_TEST(what_is_wrong_is_named)
{
    parse_refused(refused[_i].text, strlen(refused[_i].text), refused[_i].field,
                  refused[_i].wanted);
}
END_TEST

static const struct {
    const char *address;
    bool valid;
} addresses[] = {
    {"127.0.0.1:50061", true},
    {"0.0.0.0:0", true},
    {"localhost:65535", true},
    {"some-host.example_1:1", true},
    {"[::]:50061", true},
    {"[::1]:0", true},
    {"[fe80::1%eth0]:1", true},
    {"[::ffff:10.0.0.1]:1", true},
    {"unix:/run/einsumd/einsumd.sock", true},
    {"unix:/a", true},
    {"", false},
    {":", false},
    {":1", false},
    {"host", false},
    {"host:", false},
    {"host:65536", false},
    {"host:99999999999999999999", false},
    {"host:-1", false},
    {"host:+1", false},
    {"host: 1", false},
    {"host:1x", false},
    {"host:http", false},
    {"ho st:1", false},
    {"host/a:1", false},
    {"*:1", false},
    {"http://host:1", false},
    {"::1:50061", false},
    {"[::1]", false},
    {"[::1]50061", false},
    {"[::1:1", false},
    {"[]:1", false},
    {"[:1", false},
    {"[1.2.3.4]:1", false},
    {"[g::]:1", false},
    {"[::1%]:1", false},
    {"[::1%e/0]:1", false},
    {"[0000:0000:0000:0000:0000:0000:0000:0000:0000:0000:0000]:1", false},
    {"unix:", false},
    {"unix:/", false},
    {"unix:relative", false},
    {"UNIX:/a", false},
};

START_TEST(listen_addresses_are_checked)
{
    char text[256];
    snprintf(text, sizeof text, "{\"listen\": [\"%s\"]}", addresses[_i].address);
    if (addresses[_i].valid) {
        struct config config;
        parse_ok(&config, text);
        ck_assert_str_eq(config.listen[0], addresses[_i].address);
        config_deinit(&config);
    } else {
        parse_refused(text, strlen(text), "listen[0]", "expected");
    }
}
END_TEST

START_TEST(unix_paths_end_where_the_kernel_ends_them)
{
    for (size_t path_bytes = 106; path_bytes <= 109; path_bytes++) {
        char path[128], text[256];
        memset(path, 'p', sizeof path);
        path[0] = '/';
        path[path_bytes] = '\0';
        snprintf(text, sizeof text, "{\"listen\": [\"unix:%s\"]}", path);
        if (path_bytes <= 107) {
            struct config config;
            parse_ok(&config, text);
            config_deinit(&config);
        } else {
            parse_refused(text, strlen(text), "listen[0]", "at most 107 bytes");
        }
    }
}
END_TEST

START_TEST(any_free_port_may_be_asked_for_twice)
{
    struct config config;
    parse_ok(&config, "{\"listen\": [\"127.0.0.1:0\", \"[::1]:0\", \"127.0.0.1:0\"]}");
    ck_assert_uint_eq(config.listen_n, 3);
    config_deinit(&config);
}
END_TEST

START_TEST(buckets_follow_batch_tokens_max)
{
    static const uint32_t maxima[] = {2, 3, 64, 100, 65535, 65536};
    char text[128];
    struct config config;
    snprintf(text, sizeof text, "{\"batch_tokens_max\": %u}", maxima[_i]);
    parse_ok(&config, text);
    ck_assert_uint_eq(config.buckets[0], 1);
    ck_assert_uint_eq(config.buckets[config.buckets_n - 1], maxima[_i]);
    for (size_t i = 1; i + 1 < config.buckets_n; i++)
        ck_assert_uint_eq(config.buckets[i], 1u << i);
    for (size_t i = 1; i < config.buckets_n; i++)
        ck_assert_uint_gt(config.buckets[i], config.buckets[i - 1]);
    config_deinit(&config);
}
END_TEST

// A list of `items_n` times `item`, for `key`.
static char *make_list(const char *key, const char *item, size_t items_n)
{
    size_t bytes = strlen(key) + 16 + items_n * (strlen(item) + 1);
    char *text = calloc(1, bytes);
    ck_assert_ptr_nonnull(text);
    size_t used = (size_t)snprintf(text, bytes, "{\"%s\":[", key);
    for (size_t i = 0; i < items_n; i++)
        used += (size_t)snprintf(text + used, bytes - used, "%s%s", i ? "," : "", item);
    snprintf(text + used, bytes - used, "]}");
    return text;
}

START_TEST(lists_have_limits)
{
    struct config config;
    char *text = make_list("weights_roots", "\"/r\"", CONFIG_ROOTS_MAX);
    parse_ok(&config, text);
    ck_assert_uint_eq(config.weights_roots_n, CONFIG_ROOTS_MAX);
    config_deinit(&config);
    free(text);

    text = make_list("weights_roots", "\"/r\"", CONFIG_ROOTS_MAX + 1);
    parse_refused(text, strlen(text), "weights_roots", "got a list of 17");
    free(text);

    // As many as there may be are taken, and only then found to lack their root.
    text = make_list("weights", "{\"path\":\"p\",\"tensors\":[\"a\"]}", CONFIG_WEIGHTS_MAX);
    parse_refused(text, strlen(text), "weights_roots", "must name the directory");
    free(text);

    text = make_list("weights", "{\"path\":\"p\"}", CONFIG_WEIGHTS_MAX + 1);
    parse_refused(text, strlen(text), "weights", "got a list of 65");
    free(text);

    text = make_list("buckets", "1", CONFIG_BUCKETS_MAX + 1);
    parse_refused(text, strlen(text), "buckets", "got a list of 65");
    free(text);
}
END_TEST

START_TEST(deep_nesting_is_refused)
{
    size_t bytes = 100000;
    char *text = malloc(bytes);
    ck_assert_ptr_nonnull(text);
    memset(text, '[', bytes);
    parse_refused(text, bytes, "", "line 1");
    free(text);
}
END_TEST

START_TEST(long_unknown_keys_and_values_are_cut)
{
    char text[4096], name[2048];
    memset(name, 'k', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    snprintf(text, sizeof text, "{\"%s\": 1}", name);
    struct config config;
    struct error err;
    ck_assert_int_eq(config_parse(&config, text, strlen(text), &err), STATUS_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(err.text, ": unknown key"));
    snprintf(text, sizeof text, "{\"engine\": \"%s\"}", name);
    ck_assert_int_eq(config_parse(&config, text, strlen(text), &err), STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(err.field, "engine");
    ck_assert_str_eq(err.text + strlen(err.text) - 6, "kkk...");
}
END_TEST

START_TEST(text_need_not_be_terminated)
{
    static const char text[] = {'{', '"', 'l', 'a', 'n', 'e', 's', '"', ':', '3', '}', '9'};
    char *exact = malloc(sizeof text - 1); // so that a read past the end shows
    ck_assert_ptr_nonnull(exact);
    memcpy(exact, text, sizeof text - 1);
    struct config config;
    ck_assert_int_eq(config_parse(&config, exact, sizeof text - 1, NULL), STATUS_OK);
    ck_assert_uint_eq(config.lanes, 3);
    config_deinit(&config);
    free(exact);
}
END_TEST

START_TEST(the_example_loads)
{
    char path[1024];
    snprintf(path, sizeof path, "%s", __FILE__);
    char *end = strrchr(path, '/');
    ck_assert_ptr_nonnull(end);
    snprintf(end, sizeof path - (size_t)(end - path), "/../deploy/einsumd.example.json");
    struct config config;
    struct error err = {.text = ""};
    ck_assert_msg(config_load(&config, path, &err) == STATUS_OK, "%s", err.text);
    ck_assert_uint_eq(config.weights_n, 1);
    config_deinit(&config);
}
END_TEST

static void load_refused(const char *path, enum status wanted_status, const char *wanted)
{
    struct config config, empty;
    memset(&config, 0xa5, sizeof config);
    memset(&empty, 0, sizeof empty);
    struct error err = {.text = ""};
    ck_assert_int_eq(config_load(&config, path, &err), wanted_status);
    ck_assert_int_eq(err.status, wanted_status);
    ck_assert_msg(strstr(err.text, wanted) != NULL, "\"%s\" lacks \"%s\"", err.text, wanted);
    ck_assert_ptr_nonnull(strstr(err.text, path));
    ck_assert_mem_eq(&config, &empty, sizeof config);
}

// ---- change

// What a configuration of every key differs in from the defaults, as far as it may while serving.
static const char reloadable[] =
    "connections_max, stream_requests_max, request_log, request_log_sample, trace_sample, "
    "max_queue_delay_us, queue_requests_max, deadline_ms_max, reply_timeout_ms, weights, ropes, "
    "drain_grace_ms, lame_duck_ms, log_level, log_format";

START_TEST(reloadable_keys_change_and_no_others)
{
    struct config now, next;
    char changed[CONFIG_CHANGED_BYTES];
    struct error err;
    parse_ok(&now, everything);
    parse_ok(&next, everything);
    ck_assert_int_eq(config_check_change(&now, &next, changed, &err), STATUS_OK);
    ck_assert_str_eq(changed, "");
    config_deinit(&next);

    parse_ok(&next, "{}");
    ck_assert_int_eq(config_check_change(&now, &next, changed, &err), STATUS_FAILED_PRECONDITION);
    ck_assert_str_eq(err.field, "listen");
    ck_assert_str_eq(err.text, "listen: needs a restart: a list of 3 is in force, got a list of 1");
    config_deinit(&next);
    config_deinit(&now);

    parse_ok(&now, "{\"weights_roots\": [\"/m\"]}");
    parse_ok(&next,
             "{\"weights_roots\": [\"/m\"], \"connections_max\": 2, \"stream_requests_max\": 4,"
             " \"request_log\": \"all\", \"request_log_sample\": 2, \"trace_sample\": 3,"
             " \"max_queue_delay_us\": 11, \"queue_requests_max\": 15, \"deadline_ms_max\": 16,"
             " \"reply_timeout_ms\": 17, \"weights\": [{\"path\": \"x\"}],"
             " \"ropes\": [{\"weights\": \"*\", \"theta\": 10000}], \"drain_grace_ms\": 22,"
             " \"lame_duck_ms\": 23, \"log_level\": \"debug\","
             " \"log_format\": \"json\"}");
    ck_assert_int_eq(config_check_change(&now, &next, changed, &err), STATUS_OK);
    ck_assert_str_eq(changed, reloadable);
    config_take_reloadable(&now, &next);
    ck_assert_uint_eq(now.connections_max, 2);
    ck_assert_uint_eq(config_now(&now, deadline_ms_max), 16);
    ck_assert_int_eq(now.request_log, CONFIG_REQUEST_LOG_ALL);
    ck_assert_int_eq(now.log_format, LOG_FORMAT_JSON);
    ck_assert_uint_eq(now.weights_n, 0); // lists are not its business
    config_deinit(&next);
    config_deinit(&now);
}
END_TEST

START_TEST(entries_are_equal_if_every_key_is)
{
    static const char *const others[] = {
        "{\"path\": \"y\"}",
        "{\"path\": \"x\", \"tensors\": [\"a\"]}",
        "{\"path\": \"x\", \"name_prefix\": \"p.\"}",
        "{\"path\": \"x\", \"tensor_parallel_size\": 2}",
        "{\"path\": \"x\", \"output_dim\": 32}",
    };
    struct config config;
    for (size_t i = 0; i < ARRAY_LEN(others); i++) {
        char text[512];
        snprintf(text, sizeof text,
                 "{\"weights_roots\": [\"/m\"], \"weights\": [{\"path\": \"x\"}, %s, %s]}",
                 others[i], others[i]);
        parse_ok(&config, text);
        ck_assert(!config_weights_equal(&config.weights[0], &config.weights[1]));
        ck_assert(config_weights_equal(&config.weights[1], &config.weights[2]));
        config_deinit(&config);
    }
    struct config other;
    parse_ok(&config, everything);
    parse_ok(&other, everything);
    ck_assert(config_ropes_equal(&config, &other));
    other.ropes[1].theta += 0.25;
    ck_assert(!config_ropes_equal(&config, &other));
    config_deinit(&other);
    config_deinit(&config);
}
END_TEST

START_TEST(a_copy_has_strings_of_its_own)
{
    struct config config, copy;
    char changed[CONFIG_CHANGED_BYTES];
    parse_ok(&config, everything);
    ck_assert_int_eq(config_copy(&copy, &config, NULL), STATUS_OK);
    ck_assert_int_eq(config_check_change(&config, &copy, changed, NULL), STATUS_OK);
    ck_assert_str_eq(changed, "");
    ck_assert_ptr_ne(copy.weights[1].tensors[1], config.weights[1].tensors[1]);
    config_deinit(&config);
    ck_assert_str_eq(copy.weights[1].tensors[1], "b*");
    config_deinit(&copy);
}
END_TEST

static char directory[] = "/tmp/test_config.XXXXXX";
static char file_path[64];

static void directory_setup(void)
{
    ck_assert_ptr_nonnull(mkdtemp(directory));
    snprintf(file_path, sizeof file_path, "%s/einsumd.json", directory);
}

static void directory_teardown(void)
{
    unlink(file_path);
    rmdir(directory);
}

static void write_file(const char *text, size_t bytes)
{
    FILE *file = fopen(file_path, "w");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(text, 1, bytes, file), bytes);
    ck_assert_int_eq(fclose(file), 0);
}

START_TEST(files_load)
{
    write_file(everything, sizeof everything - 1);
    struct config config;
    struct error err = {.text = ""};
    ck_assert_msg(config_load(&config, file_path, &err) == STATUS_OK, "%s", err.text);
    ck_everything(&config);
    config_deinit(&config);
}
END_TEST

START_TEST(file_errors_name_the_file)
{
    load_refused(file_path, STATUS_NOT_FOUND, "No such file");
    load_refused(directory, STATUS_FAILED_PRECONDITION, "Is a directory");
    write_file("", 0);
    load_refused(file_path, STATUS_INVALID_ARGUMENT, "line 1, column 0");
    write_file("{\n \"lanes\": \"x\"}", 16);
    load_refused(file_path, STATUS_INVALID_ARGUMENT, "lanes: expected an integer from 0 to 16");
    if (geteuid() != 0) { // root may read everything
        ck_assert_int_eq(chmod(file_path, 0), 0);
        load_refused(file_path, STATUS_PERMISSION_DENIED, "Permission denied");
    }
}
END_TEST

START_TEST(files_have_a_size_limit)
{
    size_t bytes = 1 << 20;
    char *text = malloc(bytes + 1);
    ck_assert_ptr_nonnull(text);
    memset(text, ' ', bytes + 1);
    memcpy(text, "{}", 2);
    write_file(text, bytes);
    struct config config;
    ck_assert_int_eq(config_load(&config, file_path, NULL), STATUS_OK);
    config_deinit(&config);
    write_file(text, bytes + 1);
    load_refused(file_path, STATUS_INVALID_ARGUMENT, "larger than 1048576 bytes");
    load_refused("/dev/zero", STATUS_INVALID_ARGUMENT, "larger than 1048576 bytes");
    free(text);
}
END_TEST

static Suite *config_suite(void)
{
    Suite *suite = suite_create("config");
    TCase *text = tcase_create("text");
    tcase_add_test(text, defaults_are_as_documented);
    tcase_add_test(text, tcp_gives_nothing_once_something_says_who_gets_in);
    tcase_add_test(text, deinit_leaves_nothing_and_may_be_repeated);
    tcase_add_test(text, every_key_reaches_its_member);
    tcase_add_loop_test(text, what_is_printed_loads_as_the_same, 0, 2);
    tcase_add_test(text, help_names_every_key_with_unit_and_range);
    tcase_add_loop_test(text, integers_take_their_range_and_nothing_else, 0, ARRAY_LEN(ranges));
    tcase_add_loop_test(text, what_is_wrong_is_named, 0, ARRAY_LEN(refused));
    tcase_add_loop_test(text, listen_addresses_are_checked, 0, ARRAY_LEN(addresses));
    tcase_add_test(text, unix_paths_end_where_the_kernel_ends_them);
    tcase_add_test(text, any_free_port_may_be_asked_for_twice);
    tcase_add_loop_test(text, buckets_follow_batch_tokens_max, 0, 6);
    tcase_add_test(text, lists_have_limits);
    tcase_add_test(text, deep_nesting_is_refused);
    tcase_add_test(text, long_unknown_keys_and_values_are_cut);
    tcase_add_test(text, text_need_not_be_terminated);
    suite_add_tcase(suite, text);

    TCase *files = tcase_create("files");
    tcase_add_checked_fixture(files, directory_setup, directory_teardown);
    tcase_add_test(files, the_example_loads);
    tcase_add_test(files, files_load);
    tcase_add_test(files, file_errors_name_the_file);
    tcase_add_test(files, files_have_a_size_limit);
    TCase *change = tcase_create("change");
    tcase_add_test(change, reloadable_keys_change_and_no_others);
    tcase_add_test(change, entries_are_equal_if_every_key_is);
    tcase_add_test(change, a_copy_has_strings_of_its_own);
    suite_add_tcase(suite, change);
    suite_add_tcase(suite, files);
    return suite;
}

int main(void)
{
    SRunner *runner = srunner_create(config_suite());
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
