/* The markers of a JPEG file: its header, and the restart intervals under a box as a small file of their own.
 *
 * Nothing here trusts the bytes, and nothing needs a JPEG library.
 */

#ifndef BIT_RAY_MARKERS_H
#define BIT_RAY_MARKERS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB, DRI = 0xDD };
enum { APP0 = 0xE0, APP14 = 0xEE, COM = 0xFE };

struct header {
    int height, width;
    int mcu_height, mcu_width; /* pixels of a minimum coded unit */
    int interval;              /* MCUs between restart markers; 0: none */
    size_t frame;              /* where the frame's height and width stand */
    size_t scan;               /* where the entropy-coded data begin */
};

static int min(int a, int b)
{
    return a < b ? a : b;
}

static int max(int a, int b)
{
    return a > b ? a : b;
}

static unsigned read16(const uint8_t *p)
{
    return (unsigned)p[0] << 8 | p[1];
}

static long ceil_div(long a, long b)
{
    return (a + b - 1) / b;
}

/* Read the header of a file of the common kind: 8-bit YCbCr in one sequential scan, Huffman-coded, chroma in full, half
 * or quarter resolution, whole to the end marker. 0 for every other. */
static int read_header(const uint8_t *data, size_t size, struct header *header)
{
    size_t at = 2;
    int jfif = 0, adobe = -1, ids_in_order = 0, luma = 0;

    memset(header, 0, sizeof *header);
    if (size < 4 || data[0] != 0xFF || data[1] != SOI || data[size - 2] != 0xFF || data[size - 1] != EOI)
        return 0;
    for (;;) {
        const uint8_t *body;
        unsigned length, marker;

        if (size - at < 4 || data[at] != 0xFF)
            return 0;
        marker = data[at + 1];
        length = read16(data + at + 2);
        if (length < 2 || size - at - 2 < length)
            return 0;
        body = data + at + 4;
        length -= 2;
        switch (marker) {
        case SOF0:
        case SOF1:
            if (header->frame || length != 15 || body[0] != 8 || body[5] != 3 || body[10] != 0x11 || body[13] != 0x11)
                return 0;
            header->height = (int)read16(body + 1);
            header->width = (int)read16(body + 3);
            ids_in_order = body[6] == 1 && body[9] == 2 && body[12] == 3;
            luma = body[7];
            if ((luma != 0x11 && luma != 0x21 && luma != 0x22) || !header->height || !header->width)
                return 0;
            header->mcu_width = 8 * (luma >> 4);
            header->mcu_height = 8 * (luma & 15);
            header->frame = at + 5;
            break;
        case DRI:
            if (length != 2)
                return 0;
            header->interval = (int)read16(body);
            break;
        case APP0:
            jfif |= length >= 14 && memcmp(body, "JFIF", 5) == 0;
            break;
        case APP14:
            if (length >= 12 && memcmp(body, "Adobe", 5) == 0)
                adobe = body[11];
            break;
        case SOS:
            header->scan = at + 4 + length;
            /* Anything but plain YCbCr in one scan goes the other way. */
            return header->frame && header->scan <= size - 2 && length == 10 && body[0] == 3 &&
                   (jfif || adobe == 1 || (adobe < 0 && ids_in_order));
        default:
            if (marker != DHT && marker != DQT && marker != COM && !(marker >= APP0 && marker <= APP0 + 15))
                return 0;
        }
        at += 4 + length;
    }
}

/* Whether each row of MCUs is a whole number of restart intervals. */
static int has_columns(const struct header *header)
{
    return header->interval && ceil_div(header->width, header->mcu_width) % header->interval == 0;
}

struct splice {
    uint8_t *data;
    size_t size;
    int top, left; /* of the small file in the large one, pixels */
};

/* Find where each restart interval ends. 0 unless the markers are all there and in order. */
static int find_intervals(const uint8_t *data, size_t size, size_t at, size_t num, size_t *ends)
{
    const size_t end = size - 2;
    size_t k = 0;

    while (at < end) {
        const uint8_t *found = memchr(data + at, 0xFF, end - at);

        if (!found)
            break;
        at = (size_t)(found - data);
        if (data[at + 1] != 0) {
            if (data[at + 1] != RST0 + (k & 7) || k + 1 >= num)
                return 0;
            ends[k++] = at;
        }
        at += 2;
    }
    ends[k] = end;
    return k + 1 == num;
}

static uint8_t *append(uint8_t *to, const uint8_t *from, size_t size)
{
    memcpy(to, from, size);
    return to + size;
}

/* Make the file of the intervals that hold the pixels [top, bottom) x [left, right). NULL or an error message. */
static const char *splice(const uint8_t *data, size_t size, const struct header *header, int top, int bottom, int left,
                          int right, struct splice *out)
{
    const int interval_width = header->interval * header->mcu_width;
    const int columns = (int)ceil_div(header->width, interval_width);
    const int rows = (int)ceil_div(header->height, header->mcu_height);
    const int row0 = top / header->mcu_height, row1 = (int)ceil_div(bottom, header->mcu_height);
    const int column0 = left / interval_width, column1 = (int)ceil_div(right, interval_width);
    const size_t num = (size_t)rows * columns;
    size_t at, k = 0, *ends;
    uint8_t *to, *frame;
    int row, column;

    if (num > size / 2) /* each interval has at least a byte and a marker */
        return "fewer restart markers than the header says";
    ends = malloc(num * sizeof *ends);
    out->data = malloc(size);
    if (!ends || !out->data) {
        free(ends);
        return "out of memory";
    }
    if (!find_intervals(data, size, header->scan, num, ends)) {
        free(ends);
        return "restart markers missing or out of order";
    }
    /* The tables and what tells the colour space; not the rest, which may be large. */
    to = append(out->data, data, 2);
    frame = NULL;
    for (at = 2; at < header->scan;) {
        const unsigned marker = data[at + 1];
        const size_t length = 2 + read16(data + at + 2);

        if (marker < APP0 || marker == APP0 || marker == APP14) {
            if (at + 5 == header->frame)
                frame = to + 5;
            to = append(to, data + at, length);
        }
        at += length;
    }
    out->top = row0 * header->mcu_height;
    out->left = column0 * interval_width;
    bottom = row1 * header->mcu_height < header->height ? row1 * header->mcu_height : header->height;
    right = column1 * interval_width < header->width ? column1 * interval_width : header->width;
    frame[0] = (uint8_t)((bottom - out->top) >> 8);
    frame[1] = (uint8_t)(bottom - out->top);
    frame[2] = (uint8_t)((right - out->left) >> 8);
    frame[3] = (uint8_t)(right - out->left);
    for (row = row0; row < row1; row++)
        for (column = column0; column < column1; column++) {
            const size_t i = (size_t)row * columns + column;
            const size_t from = i ? ends[i - 1] + 2 : header->scan;

            to = append(to, data + from, ends[i] - from);
            *to++ = 0xFF;
            *to++ = (uint8_t)(RST0 + (k++ & 7));
        }
    to[-1] = EOI;
    out->size = (size_t)(to - out->data);
    free(ends);
    return NULL;
}

#endif
