// Server reflection without gRPC: every answer is checked against the descriptor set itself.
#include "fake_call.h"

#include <check.h>
#include <stdio.h>

#include "google/protobuf/descriptor.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"

#define V1 "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
#define V1ALPHA "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
#define ASKED(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##what
#define ANSWERED(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##what

extern const uint8_t services_fds_begin[], services_fds_end[];

static size_t set_bytes(void)
{
    return (uintptr_t)services_fds_end - (uintptr_t)services_fds_begin;
}

static struct service_context context;
static struct call *call;

static void setup(void)
{
    ck_assert_int_eq(reflection_init(NULL), STATUS_OK);
    call = fake_call_start(service_reflection_methods, V1, &context);
}

static void teardown(void)
{
    fake_call_end(call);
    reflection_deinit();
}

static void deliver(Grpc__Reflection__V1__ServerReflectionRequest *request)
{
    static char host[] = "h\xc3\xb4te";
    request->host = host;
    uint8_t bytes[8192];
    ck_assert_uint_le(grpc__reflection__v1__server_reflection_request__get_packed_size(request),
                      sizeof bytes);
    size_t n = grpc__reflection__v1__server_reflection_request__pack(request, bytes);
    fake_call_deliver(call, bytes, n);
}

// The reply on its way; free it. The request must be in it, and the next one not yet asked for.
static Grpc__Reflection__V1__ServerReflectionResponse *reply(void)
{
    ck_assert(!call->finished);
    ck_assert(!call->reading);
    size_t n;
    uint8_t *flat = fake_flatten(call->sent, &n);
    Grpc__Reflection__V1__ServerReflectionResponse *response =
        grpc__reflection__v1__server_reflection_response__unpack(NULL, n, flat);
    ck_assert_ptr_nonnull(response);
    free(flat);
    fake_call_left(call);
    ck_assert(call->reading);
    ck_assert_str_eq(response->valid_host, "h\xc3\xb4te");
    ck_assert_ptr_nonnull(response->original_request);
    ck_assert_str_eq(response->original_request->host, "h\xc3\xb4te");
    return response;
}

static void drop(Grpc__Reflection__V1__ServerReflectionResponse *response)
{
    grpc__reflection__v1__server_reflection_response__free_unpacked(response, NULL);
}

static Grpc__Reflection__V1__ServerReflectionResponse *ask_symbol(const char *symbol)
{
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case = ASKED(FILE_CONTAINING_SYMBOL);
    request.file_containing_symbol = (char *)(uintptr_t)symbol;
    deliver(&request);
    Grpc__Reflection__V1__ServerReflectionResponse *response = reply();
    ck_assert_int_eq((int)response->original_request->message_request_case,
                     (int)ASKED(FILE_CONTAINING_SYMBOL));
    ck_assert_str_eq(response->original_request->file_containing_symbol, symbol);
    return response;
}

static Grpc__Reflection__V1__ServerReflectionResponse *ask_file(const char *name)
{
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case = ASKED(FILE_BY_FILENAME);
    request.file_by_filename = (char *)(uintptr_t)name;
    deliver(&request);
    return reply();
}

static Google__Protobuf__FileDescriptorSet *whole_set(void)
{
    Google__Protobuf__FileDescriptorSet *set =
        google__protobuf__file_descriptor_set__unpack(NULL, set_bytes(), services_fds_begin);
    ck_assert_ptr_nonnull(set);
    ck_assert_uint_gt(set->n_file, 0);
    return set;
}

static Google__Protobuf__FileDescriptorProto *file_in(ProtobufCBinaryData bytes)
{
    Google__Protobuf__FileDescriptorProto *file =
        google__protobuf__file_descriptor_proto__unpack(NULL, bytes.len, bytes.data);
    ck_assert_ptr_nonnull(file);
    return file;
}

static bool is_in_set(ProtobufCBinaryData bytes)
{
    return memmem(services_fds_begin, set_bytes(), bytes.data, bytes.len) != NULL;
}

static void assert_first_file(const Grpc__Reflection__V1__ServerReflectionResponse *response,
                              const char *name)
{
    ck_assert_int_eq((int)response->message_response_case, (int)ANSWERED(FILE_DESCRIPTOR_RESPONSE));
    ck_assert_uint_gt(response->file_descriptor_response->n_file_descriptor_proto, 0);
    Google__Protobuf__FileDescriptorProto *file =
        file_in(response->file_descriptor_response->file_descriptor_proto[0]);
    ck_assert_str_eq(file->name, name);
    google__protobuf__file_descriptor_proto__free_unpacked(file, NULL);
}

static void assert_error(const Grpc__Reflection__V1__ServerReflectionResponse *response,
                         enum status status)
{
    ck_assert_int_eq((int)response->message_response_case, (int)ANSWERED(ERROR_RESPONSE));
    ck_assert_int_eq(response->error_response->error_code, (int)status);
    ck_assert_uint_gt(strlen(response->error_response->error_message), 0);
}

START_TEST(lists_the_services)
{
    static const char *const expected[] = {
        "einsum.v1.Einsum", "inference.GRPCInferenceService", "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"};
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    static char star[] = "*";
    request.message_request_case = ASKED(LIST_SERVICES);
    request.list_services = star;
    deliver(&request);
    Grpc__Reflection__V1__ServerReflectionResponse *response = reply();
    ck_assert_int_eq((int)response->message_response_case, (int)ANSWERED(LIST_SERVICES_RESPONSE));
    const Grpc__Reflection__V1__ListServiceResponse *list = response->list_services_response;
    ck_assert_uint_eq(list->n_service, ARRAY_LEN(expected));
    for (size_t i = 0; i < ARRAY_LEN(expected); i++)
        ck_assert_str_eq(list->service[i]->name, expected[i]);
    drop(response);
}
END_TEST

// Each file comes first in its own answer, byte for byte as in the set, once, and with it all that
// the files in the answer import.
START_TEST(gives_every_file_with_its_imports)
{
    Google__Protobuf__FileDescriptorSet *set = whole_set();
    for (size_t i = 0; i < set->n_file; i++) {
        Grpc__Reflection__V1__ServerReflectionResponse *response = ask_file(set->file[i]->name);
        assert_first_file(response, set->file[i]->name);
        const Grpc__Reflection__V1__FileDescriptorResponse *files =
            response->file_descriptor_response;
        Google__Protobuf__FileDescriptorProto *got[32];
        size_t n = files->n_file_descriptor_proto;
        ck_assert_uint_le(n, ARRAY_LEN(got));
        for (size_t j = 0; j < n; j++) {
            ck_assert(is_in_set(files->file_descriptor_proto[j]));
            got[j] = file_in(files->file_descriptor_proto[j]);
            for (size_t k = 0; k < j; k++)
                ck_assert_str_ne(got[j]->name, got[k]->name);
        }
        for (size_t j = 0; j < n; j++)
            for (size_t d = 0; d < got[j]->n_dependency; d++) {
                size_t k = 0;
                while (k < n && strcmp(got[k]->name, got[j]->dependency[d]) != 0)
                    k++;
                ck_assert_msg(k < n, "%s lacks %s", set->file[i]->name, got[j]->dependency[d]);
            }
        for (size_t j = 0; j < n; j++)
            google__protobuf__file_descriptor_proto__free_unpacked(got[j], NULL);
        drop(response);
    }
    google__protobuf__file_descriptor_set__free_unpacked(set, NULL);
}
END_TEST

static const struct symbol_case {
    const char *symbol;
    const char *file; // NULL: there is none
} symbols[] = {
    {"einsum.v1.Einsum", "einsum/v1/einsum.proto"},
    {"einsum.v1.Einsum.EinsumStream", "einsum/v1/einsum.proto"},
    {"einsum.v1.Einsum/EinsumStream", "einsum/v1/einsum.proto"},
    {"einsum.v1.EinsumRequest", "einsum/v1/einsum.proto"},
    {"einsum.v1.EinsumRequest.activations", "einsum/v1/einsum.proto"},
    {"einsum.v1.Recipe", "einsum/v1/einsum.proto"},
    {"einsum.v1.RECIPE_1_128_128", "einsum/v1/einsum.proto"}, // a sibling of its enum
    {"grpc.health.v1.HealthCheckResponse.ServingStatus", "grpc/health/v1/health.proto"},
    {"grpc.health.v1.HealthCheckResponse.NOT_SERVING", "grpc/health/v1/health.proto"},
    {"grpc.health.v1.HealthListResponse.StatusesEntry", "grpc/health/v1/health.proto"},
    {"grpc.health.v1.HealthListResponse.StatusesEntry.key", "grpc/health/v1/health.proto"},
    {"grpc.reflection.v1.ServerReflection", "grpc/reflection/v1/reflection.proto"},
    {"grpc.reflection.v1alpha.ServerReflection", "grpc/reflection/v1alpha/reflection.proto"},
    {"grpc.reflection.v1.ServerReflectionRequest.message_request",
     "grpc/reflection/v1/reflection.proto"},
    {"inference.GRPCInferenceService.ModelInfer", "inference/grpc_service.proto"},
    {"inference.ModelInferRequest.InferInputTensor.ParametersEntry",
     "inference/grpc_service.proto"},
    {"inference.ModelConfig", "inference/model_config.proto"},
    {"inference.TYPE_BF16", "inference/model_config.proto"},
    {"google.rpc.BadRequest.FieldViolation", "google/rpc/error_details.proto"},
    {"google.rpc.RetryInfo.retry_delay", "google/rpc/error_details.proto"},
    {"google.rpc.Status", "google/rpc/status.proto"},
    {"google.protobuf.Any", "google/protobuf/any.proto"},
    {"google.protobuf.Duration", "google/protobuf/duration.proto"},
    {"", NULL},
    {".", NULL},
    {"/", NULL},
    {"einsum", NULL},
    {"einsum.v1", NULL},
    {"Einsum", NULL},
    {"einsum.v1.Einsum.", NULL},
    {"einsum.v1.einsum", NULL},
    {"einsum/v1.Einsum/EinsumStream", NULL},
    {"einsum.v1.Recipe.RECIPE_1_128_128", NULL},
    {"einsum.v1.EinsumRequestx", NULL},
    {"google.rpc.DebugInfo", NULL},
};

START_TEST(finds_symbols)
{
    Grpc__Reflection__V1__ServerReflectionResponse *response = ask_symbol(symbols[_i].symbol);
    if (symbols[_i].file)
        assert_first_file(response, symbols[_i].file);
    else
        assert_error(response, STATUS_NOT_FOUND);
    drop(response);
}
END_TEST

// Every method of every service, both ways to spell it; protoc's own view is the list.
START_TEST(finds_every_method)
{
    Google__Protobuf__FileDescriptorSet *set = whole_set();
    size_t methods = 0;
    for (size_t i = 0; i < set->n_file; i++)
        for (size_t j = 0; j < set->file[i]->n_service; j++) {
            const Google__Protobuf__ServiceDescriptorProto *service = set->file[i]->service[j];
            for (size_t k = 0; k < service->n_method; k++, methods++) {
                char name[256];
                snprintf(name, sizeof name, "%s.%s%c%s", set->file[i]->package, service->name,
                         methods % 2 ? '.' : '/', service->method[k]->name);
                Grpc__Reflection__V1__ServerReflectionResponse *response = ask_symbol(name);
                assert_first_file(response, set->file[i]->name);
                drop(response);
            }
        }
    ck_assert_uint_ge(methods, 8 + 3 + 2);
    google__protobuf__file_descriptor_set__free_unpacked(set, NULL);
}
END_TEST

START_TEST(takes_a_long_name_for_unknown)
{
    char name[3000];
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    Grpc__Reflection__V1__ServerReflectionResponse *response = ask_symbol(name);
    assert_error(response, STATUS_NOT_FOUND);
    drop(response);
}
END_TEST

START_TEST(answers_errors_and_goes_on)
{
    Grpc__Reflection__V1__ServerReflectionResponse *response = ask_file("einsum.proto");
    assert_error(response, STATUS_NOT_FOUND);
    drop(response);

    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    static char type[] = "einsum.v1.EinsumRequest";
    Grpc__Reflection__V1__ExtensionRequest extension =
        GRPC__REFLECTION__V1__EXTENSION_REQUEST__INIT;
    extension.containing_type = type;
    extension.extension_number = 100;
    request.message_request_case = ASKED(FILE_CONTAINING_EXTENSION);
    request.file_containing_extension = &extension;
    deliver(&request);
    response = reply();
    assert_error(response, STATUS_NOT_FOUND);
    ck_assert_int_eq(response->original_request->file_containing_extension->extension_number, 100);
    drop(response);

    request.message_request_case = ASKED(ALL_EXTENSION_NUMBERS_OF_TYPE);
    request.all_extension_numbers_of_type = type;
    deliver(&request);
    response = reply();
    assert_error(response, STATUS_NOT_FOUND);
    drop(response);

    request.message_request_case = ASKED(_NOT_SET);
    deliver(&request);
    response = reply();
    assert_error(response, STATUS_INVALID_ARGUMENT);
    drop(response);

    response = ask_symbol("einsum.v1.Einsum");
    assert_first_file(response, "einsum/v1/einsum.proto");
    drop(response);
    fake_call_deliver(call, NULL, 0); // half-close
    ck_assert(call->finished);
    ck_assert_int_eq(call->err.status, STATUS_OK);
}
END_TEST

START_TEST(ends_the_stream_of_who_sends_no_request)
{
    fake_call_deliver(call, "\x22\x01\xff", 3);
    ck_assert(call->finished);
    ck_assert_int_eq(call->err.status, STATUS_INVALID_ARGUMENT);
    ck_assert_str_eq(call->err.field, "file_containing_symbol");
}
END_TEST

START_TEST(limits_a_request)
{
    char name[4097];
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case = ASKED(FILE_BY_FILENAME);
    request.file_by_filename = name;
    deliver(&request);
    ck_assert(call->finished);
    ck_assert_ptr_null(call->sent);
    ck_assert_int_eq(call->err.status, STATUS_INVALID_ARGUMENT);
}
END_TEST

START_TEST(drains)
{
    call->method->on_drain(call);
    ck_assert(call->finished);
    ck_assert_int_eq(call->err.status, STATUS_UNAVAILABLE);
}
END_TEST

START_TEST(answers_v1alpha_with_the_same_bytes)
{
    static const char request[] = "\x22\x10"
                                  "einsum.v1.Einsum";
    struct call *alpha = fake_call_start(service_reflection_methods, V1ALPHA, &context);
    fake_call_deliver(alpha, request, sizeof request - 1);
    fake_call_deliver(call, request, sizeof request - 1);
    size_t alpha_n, n;
    uint8_t *alpha_bytes = fake_flatten(alpha->sent, &alpha_n);
    uint8_t *bytes = fake_flatten(call->sent, &n);
    ck_assert_uint_eq(alpha_n, n);
    ck_assert_mem_eq(alpha_bytes, bytes, n);
    free(alpha_bytes);
    free(bytes);
    fake_call_end(alpha);
}
END_TEST

START_TEST(can_start_again)
{
    reflection_deinit();
    ck_assert_int_eq(reflection_init(NULL), STATUS_OK);
    Grpc__Reflection__V1__ServerReflectionResponse *response = ask_symbol("google.rpc.Status");
    assert_first_file(response, "google/rpc/status.proto");
    ck_assert_uint_eq(response->file_descriptor_response->n_file_descriptor_proto, 2); // and Any
    drop(response);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("reflection");
    TCase *all = tcase_create("reflection");
    tcase_set_timeout(all, 60);
    tcase_add_checked_fixture(all, setup, teardown);
    tcase_add_test(all, lists_the_services);
    tcase_add_test(all, gives_every_file_with_its_imports);
    tcase_add_loop_test(all, finds_symbols, 0, (int)ARRAY_LEN(symbols));
    tcase_add_test(all, finds_every_method);
    tcase_add_test(all, takes_a_long_name_for_unknown);
    tcase_add_test(all, answers_errors_and_goes_on);
    tcase_add_test(all, ends_the_stream_of_who_sends_no_request);
    tcase_add_test(all, limits_a_request);
    tcase_add_test(all, drains);
    tcase_add_test(all, answers_v1alpha_with_the_same_bytes);
    tcase_add_test(all, can_start_again);
    suite_add_tcase(suite, all);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
