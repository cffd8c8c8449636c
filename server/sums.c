#include "sums.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DIGEST_BYTES = 32, PIECE_BYTES = 1 << 20 };

struct sum {
    const char *name; // in sums.text
    uint8_t digest[DIGEST_BYTES];
};

struct sums {
    char path[ROOTS_PATH_BYTES]; // for errors, below its root
    char *text;
    struct sum *list;
    size_t n, room;
};

static enum status out_of_memory(struct error *err)
{
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "out of memory");
}

static const char *last_part(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// ---- the list

NODISCARD static enum status read_text(struct sums *sums, int fd, struct error *err)
{
    sums->text = malloc(SUMS_BYTES_MAX + 1);
    if (!sums->text)
        return out_of_memory(err);
    size_t used = 0;
    ssize_t got;
    do {
        got = read(fd, sums->text + used, SUMS_BYTES_MAX + 1 - used);
        used += got > 0 ? (size_t)got : 0;
    } while ((got > 0 && used <= SUMS_BYTES_MAX) || (got < 0 && errno == EINTR));
    if (got < 0)
        return error_set(err, STATUS_DATA_LOSS, "%s: %s", sums->path, strerrordesc_np(errno));
    if (used > SUMS_BYTES_MAX || memchr(sums->text, '\0', used))
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: no list of SHA-256 sums: over %d bytes, or not text", sums->path,
                         SUMS_BYTES_MAX);
    sums->text[used] = '\0';
    return STATUS_OK;
}

static int hex_digit(char c)
{
    const char *digits = "0123456789abcdef", *at = c ? strchr(digits, c | 0x20) : NULL;
    return at ? (int)(at - digits) : -1;
}

// "HEX  NAME"; false: it is not.
static bool parse_line(char *line, struct sum *sum)
{
    size_t length = strlen(line);
    if (length < 2 * DIGEST_BYTES + 3 || line[2 * DIGEST_BYTES] != ' ' ||
        !strchr(" *", line[2 * DIGEST_BYTES + 1]))
        return false;
    for (size_t i = 0; i < DIGEST_BYTES; i++) {
        int high = hex_digit(line[2 * i]), low = hex_digit(line[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        sum->digest[i] = (uint8_t)(high << 4 | low);
    }
    sum->name = last_part(line + 2 * DIGEST_BYTES + 2);
    return sum->name[0] != '\0';
}

static const struct sum *find(const struct sums *sums, const char *name)
{
    for (size_t i = 0; i < sums->n; i++)
        if (strcmp(sums->list[i].name, name) == 0)
            return &sums->list[i];
    return NULL;
}

NODISCARD static enum status parse(struct sums *sums, struct error *err)
{
    unsigned number = 0;
    char *rest = sums->text, *line;
    while ((line = strsep(&rest, "\n")) != NULL) {
        number++;
        if (line[0] == '\0')
            continue;
        struct sum sum;
        if (!parse_line(line, &sum))
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "%s: line %u: expected 64 hexadecimal digits, two spaces and a name, "
                             "as sha256sum writes them",
                             sums->path, number);
        if (find(sums, sum.name))
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "%s: line %u: '%.128s' is there twice", sums->path, number, sum.name);
        if (sums->n == sums->room) {
            size_t room = sums->room ? 2 * sums->room : 64;
            struct sum *grown = realloc(sums->list, room * sizeof *grown);
            if (!grown)
                return out_of_memory(err);
            sums->list = grown;
            sums->room = room;
        }
        sums->list[sums->n++] = sum;
    }
    return STATUS_OK;
}

enum status sums_read(const struct roots *roots, const char *path, struct sums **out,
                      struct error *err)
{
    char resolved[ROOTS_PATH_BYTES];
    int fd;
    enum status status = roots_resolve(roots, path, resolved, err);
    if (status == STATUS_OK)
        status = roots_open(roots, resolved, &fd, err);
    if (status != STATUS_OK)
        return status;
    struct sums *sums = calloc(1, sizeof *sums);
    if (!sums) {
        close(fd);
        return out_of_memory(err);
    }
    snprintf(sums->path, sizeof sums->path, "%s", roots_below(roots, resolved));
    status = read_text(sums, fd, err);
    close(fd);
    if (status == STATUS_OK)
        status = parse(sums, err);
    if (status == STATUS_OK)
        *out = sums;
    else
        sums_destroy(sums);
    return status;
}

void sums_destroy(struct sums *sums)
{
    if (!sums)
        return;
    free(sums->list);
    free(sums->text);
    free(sums);
}

// ---- a file

static void to_hex(const uint8_t digest[DIGEST_BYTES], char text[2 * DIGEST_BYTES + 1])
{
    for (size_t i = 0; i < DIGEST_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", digest[i]);
}

NODISCARD static enum status digest(const struct safetensors *file, EVP_MD_CTX *hash,
                                    uint8_t *piece, bool (*progress)(void *context, uint64_t bytes),
                                    void *context, uint8_t got[DIGEST_BYTES], struct error *err)
{
    bool works = EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1;
    uint64_t bytes = safetensors_bytes(file);
    for (uint64_t at = 0; at < bytes && works; at += PIECE_BYTES) {
        uint64_t n = bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES;
        enum status status = safetensors_read_raw(file, at, piece, n, err);
        if (status != STATUS_OK)
            return status;
        works = EVP_DigestUpdate(hash, piece, n) == 1;
        if (progress && !progress(context, n))
            return error_set(err, STATUS_CANCELLED, "another weight of this load failed");
    }
    works = works && EVP_DigestFinal_ex(hash, got, NULL) == 1;
    return works ? STATUS_OK : error_set(err, STATUS_INTERNAL, "SHA-256 cannot be computed here");
}

enum status sums_check(const struct sums *sums, const struct safetensors *file, const char *label,
                       bool (*progress)(void *context, uint64_t bytes), void *context,
                       struct error *err)
{
    const struct sum *expected = find(sums, last_part(label));
    if (!expected)
        return error_set(err, STATUS_FAILED_PRECONDITION, "%s: '%.128s' has no SHA-256 there",
                         sums->path, last_part(label));
    EVP_MD_CTX *hash = EVP_MD_CTX_new();
    uint8_t *piece = malloc(PIECE_BYTES), got[DIGEST_BYTES];
    enum status status =
        hash && piece ? digest(file, hash, piece, progress, context, got, err) : out_of_memory(err);
    free(piece);
    EVP_MD_CTX_free(hash);
    if (status != STATUS_OK || memcmp(got, expected->digest, DIGEST_BYTES) == 0)
        return status;
    char is[2 * DIGEST_BYTES + 1], was[2 * DIGEST_BYTES + 1];
    to_hex(got, is);
    to_hex(expected->digest, was);
    return error_set(err, STATUS_DATA_LOSS, "%.128s: expected SHA-256 %s, as %.128s says, got %s",
                     label, was, sums->path, is);
}
