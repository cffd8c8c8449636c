#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <string.h>

#include "log.h"
#include "tls_internal.h"

const char *tls_error(const SSL *ssl, char *text, size_t bytes)
{
    long verified = ssl ? SSL_get_verify_result(ssl) : X509_V_OK;
    unsigned long code = ERR_peek_error();
    const char *reason = code ? ERR_reason_error_string(code) : NULL;
    if (verified != X509_V_OK)
        snprintf(text, bytes, "client certificate: %s", X509_verify_cert_error_string(verified));
    else
        snprintf(text, bytes, "%s", reason ? reason : code ? "failed" : "connection closed");
    ERR_clear_error();
    return text;
}

// ---- the context

NODISCARD static enum status refuse(struct error *err, const char *key, const char *path)
{
    char text[160];
    return error_field(err, STATUS_FAILED_PRECONDITION, key, "%.200s: %s", path,
                       tls_error(NULL, text, sizeof text));
}

// A key with a password would have OpenSSL ask at the terminal.
// NOLINTNEXTLINE(readability-non-const-parameter): OpenSSL's type
static int no_password(char *text, int bytes, int writing, void *unused)
{
    (void)text, (void)bytes, (void)writing, (void)unused;
    return -1;
}

// HTTP/2 alone. Without the extension OpenSSL would not ask; on_hello does.
static int choose_protocol(SSL *ssl, const unsigned char **chosen, unsigned char *chosen_bytes,
                           const unsigned char *offered, unsigned offered_bytes, void *unused)
{
    (void)ssl, (void)unused;
    static const unsigned char h2[] = "\2h2";
    unsigned char *found;
    if (SSL_select_next_proto(&found, chosen_bytes, h2, sizeof h2 - 1, offered, offered_bytes) !=
        OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    *chosen = found;
    return SSL_TLSEXT_ERR_OK;
}

static int on_hello(SSL *ssl, int *alert, void *unused)
{
    (void)unused;
    const unsigned char *protocols;
    size_t bytes;
    if (SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_application_layer_protocol_negotiation,
                                  &protocols, &bytes))
        return SSL_CLIENT_HELLO_SUCCESS;
    *alert = SSL_AD_NO_APPLICATION_PROTOCOL;
    return SSL_CLIENT_HELLO_ERROR;
}

NODISCARD static enum status load_certificate(SSL_CTX *context, const struct tls_options *options,
                                              int64_t *expires, struct error *err)
{
    if (SSL_CTX_use_certificate_chain_file(context, options->certificate) != 1)
        return refuse(err, "tls_certificate", options->certificate);
    if (SSL_CTX_use_PrivateKey_file(context, options->key, SSL_FILETYPE_PEM) != 1)
        return refuse(err, "tls_key", options->key);
    if (SSL_CTX_check_private_key(context) != 1)
        return refuse(err, "tls_key", options->key);
    struct tm until;
    if (ASN1_TIME_to_tm(X509_get0_notAfter(SSL_CTX_get0_certificate(context)), &until) != 1)
        return refuse(err, "tls_certificate", options->certificate);
    *expires = timegm(&until);
    if (*expires <= time(NULL))
        LOG(WARN, "the certificate has expired", LOG_STR("path", options->certificate));
    return STATUS_OK;
}

NODISCARD static enum status load_client_ca(SSL_CTX *context, const char *path, struct error *err)
{
    if (path[0] == '\0')
        return STATUS_OK;
    STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(path);
    if (!names || SSL_CTX_load_verify_file(context, path) != 1) {
        sk_X509_NAME_pop_free(names, X509_NAME_free);
        return refuse(err, "tls_client_ca", path);
    }
    SSL_CTX_set_client_CA_list(context, names); // takes them
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    return STATUS_OK;
}

enum status tls_context_create(const struct tls_options *options, SSL_CTX **out, int64_t *expires,
                               struct error *err)
{
    ERR_clear_error();
    SSL_CTX *context = SSL_CTX_new(TLS_server_method());
    if (!context)
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for TLS");
    SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_cipher_list(context, "ECDHE+AESGCM:ECDHE+CHACHA20"); // of 1.2, as HTTP/2 asks
    // A resumed session would pass by the certificates that are in force now.
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION |
                                     SSL_OP_NO_COMPRESSION |
                                     SSL_OP_IGNORE_UNEXPECTED_EOF); // HTTP/2 tells a cut by itself
    SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_default_passwd_cb(context, no_password);
    SSL_CTX_set_alpn_select_cb(context, choose_protocol, NULL);
    SSL_CTX_set_client_hello_cb(context, on_hello, NULL);
    enum status status = load_certificate(context, options, expires, err);
    if (status == STATUS_OK)
        status = load_client_ca(context, options->client_ca, err);
    if (status != STATUS_OK) {
        SSL_CTX_free(context);
        context = NULL;
    }
    *out = context;
    return status;
}

// ---- who the peer is

struct names {
    size_t n;
    const char *list[ACCESS_NAMES_MAX];
};

// A name with a NUL within could pass for a shorter one.
static void add_name(struct names *names, const unsigned char *text, int bytes)
{
    if (text && bytes > 0 && strlen((const char *)text) == (size_t)bytes &&
        names->n < ACCESS_NAMES_MAX)
        names->list[names->n++] = (const char *)text;
}

struct access_peer *tls_peer_of(SSL *ssl)
{
    X509 *certificate = SSL_get1_peer_certificate(ssl);
    if (!certificate)
        return &access_peer_tcp;
    struct names names = {0};
    const X509_NAME *subject = X509_get_subject_name(certificate);
    int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
    unsigned char *common_name = NULL;
    if (at >= 0) {
        const X509_NAME_ENTRY *entry = X509_NAME_get_entry(subject, at);
        int bytes = ASN1_STRING_to_UTF8(&common_name, X509_NAME_ENTRY_get_data(entry));
        add_name(&names, common_name, bytes);
    }
    GENERAL_NAMES *others = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    for (int i = 0; i < sk_GENERAL_NAME_num(others); i++) {
        const GENERAL_NAME *other = sk_GENERAL_NAME_value(others, i);
        if (other->type == GEN_DNS || other->type == GEN_URI || other->type == GEN_EMAIL)
            add_name(&names, ASN1_STRING_get0_data(other->d.ia5), ASN1_STRING_length(other->d.ia5));
    }
    struct access_peer *peer = access_peer_create(names.list, names.n);
    OPENSSL_free(common_name);
    GENERAL_NAMES_free(others);
    X509_free(certificate);
    return peer;
}
