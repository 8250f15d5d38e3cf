/* Views of JPEG files on the system's libjpeg-turbo: only the box that a view needs is decoded.
 *
 * header()         whether a file is of the common kind that view() takes, and its size
 * view()           crop, resize, window and flip into the caller's array
 * make_seekable()  lossless transcoding to baseline with restart markers, with which view() leaves out columns, too
 *
 * Pixels are those of a full decode followed by torch's antialiased resize, bit for bit. Every warning of the library
 * is an error here: the caller then takes the slow path, which tells damage from oddity. Bytes are never trusted, and
 * are taken as `bytes` alone: other buffers may change in another thread between a check and a use.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>

#include <jpeglib.h>
#include <jerror.h>

#include "_markers.h"
#include "_resize.h"

#ifndef LIBJPEG_TURBO_VERSION
#error "this jpeglib.h is not libjpeg-turbo's; install libjpeg-turbo's headers (Debian: libjpeg-dev)"
#endif
#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 1005000
#error "libjpeg-turbo 1.5 or newer is needed, for jpeg_crop_scanline and jpeg_skip_scanlines"
#endif

#define MAX_SCANS 200      /* of a file, as in bombs.py; encoders make ten, bombs thousands */
#define SEEKABLE_PIXELS 96 /* width that a restart interval covers at least */
#define UPSAMPLING_REACH 2 /* pixels on each side that fancy upsampling of chroma looks at */
#define NARROW 32          /* the fewest columns decoded: upsamplers have special cases below */

/* ---- Errors of libjpeg ---- */

struct errors {
    struct jpeg_error_mgr base;
    jmp_buf jump;
    char message[JMSG_LENGTH_MAX];
};

static void on_error(j_common_ptr cinfo)
{
    struct errors *errors = (struct errors *)cinfo->err;

    cinfo->err->format_message(cinfo, errors->message);
    longjmp(errors->jump, 1);
}

static void on_message(j_common_ptr cinfo, int level)
{
    if (level < 0)
        on_error(cinfo);
}

static struct jpeg_error_mgr *init_errors(struct errors *errors)
{
    jpeg_std_error(&errors->base);
    errors->base.error_exit = on_error;
    errors->base.emit_message = on_message;
    errors->message[0] = 0;
    return &errors->base;
}

/* ---- A view ---- */

struct view {
    int top, left, height, width; /* the box in the image */
    int resized_height, resized_width;
    int window_top, window_left, size; /* the square of the resized box that is wanted */
    int mirrored, simd;
    uint8_t *out; /* [size, size, 3] */
};

struct decoding {
    struct jpeg_decompress_struct cinfo;
    struct errors errors;
    struct axis columns, rows;
    struct splice splice;
    uint8_t *pixels;  /* ROWS_AT_ONCE decoded rows, RGBX */
    uint8_t *resized; /* the rows under the box, resized to the window's width, RGB */
    int by_interval;  /* whether only the restart intervals under the box were read */
};

/* Decode and resize. NULL or an error message, which may lie in `d`; d's memory is the caller's to free. */
static const char *decode(struct decoding *d, const uint8_t *data, size_t size, const struct view *view)
{
    struct jpeg_decompress_struct *cinfo = &d->cinfo;
    struct header header;
    const char *error;
    JDIMENSION crop_left, crop_width;
    size_t row_bytes, padding, stride;
    const size_t row = 3 * (size_t)view->size;
    int top, bottom, left, right, num_rows, done = 0, ready = 0, r;

    if (!read_header(data, size, &header))
        return "not a file of the common kind";
    if (view->top < 0 || view->left < 0 || view->height < 1 || view->width < 1 ||
        view->height > header.height - view->top || view->width > header.width - view->left)
        return "box outside of the image";
    if (!axis_init(&d->columns, view->width, view->resized_width, view->window_left, view->size, view->mirrored) ||
        !axis_init(&d->rows, view->height, view->resized_height, view->window_top, view->size, 0))
        return "out of memory";

    /* What is decoded: the pixels that have a weight, and those that upsampling looks at from there. */
    num_rows = d->rows.last - d->rows.first;
    top = view->top + d->rows.first;
    bottom = min(view->top + d->rows.last + UPSAMPLING_REACH, header.height);
    left = max(view->left + d->columns.first - UPSAMPLING_REACH, 0);
    right = min(view->left + d->columns.last + UPSAMPLING_REACH, header.width);
    if (right - left < NARROW) {
        left = max(right - NARROW, 0);
        right = min(left + NARROW, header.width);
    }
    if (has_columns(&header)) {
        error = splice(data, size, &header, max(top - UPSAMPLING_REACH, 0), bottom, left, right, &d->splice);
        if (error)
            return error;
        data = d->splice.data;
        size = d->splice.size;
        top -= d->splice.top;
        left -= d->splice.left;
        right -= d->splice.left;
        d->by_interval = 1;
    }

    jpeg_mem_src(cinfo, (unsigned char *)data, (unsigned long)size);
    jpeg_read_header(cinfo, TRUE);
    if (cinfo->jpeg_color_space != JCS_YCbCr)
        return "not YCbCr";
    cinfo->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(cinfo);
    crop_left = (JDIMENSION)left;
    crop_width = (JDIMENSION)(right - left);
    if (crop_width < cinfo->output_width)
        jpeg_crop_scanline(cinfo, &crop_left, &crop_width);
    else
        crop_left = 0;
    if (top && jpeg_skip_scanlines(cinfo, (JDIMENSION)top) != (JDIMENSION)top)
        return "rows missing";

    padding = 4 * (size_t)d->columns.taps;
    row_bytes = 4 * (size_t)cinfo->output_width + padding;
    stride = resized_stride(view->size);
    d->pixels = malloc(ROWS_AT_ONCE * row_bytes);
    d->resized = malloc((size_t)num_rows * stride);
    if (!d->pixels || !d->resized)
        return "out of memory";
    for (r = 0; r < ROWS_AT_ONCE; r++)
        memset(d->pixels + (r + 1) * row_bytes - padding, 0, padding);
    left = (int)crop_left + d->splice.left - view->left; /* in the box */
    while (done < num_rows) {
        const int num = min(ROWS_AT_ONCE, num_rows - done);
        uint8_t *rows[ROWS_AT_ONCE], *out[ROWS_AT_ONCE];

        for (r = 0; r < ROWS_AT_ONCE; r++) {
            rows[r] = d->pixels + min(r, num - 1) * row_bytes;
            out[r] = d->resized + (size_t)(done + min(r, num - 1)) * stride;
        }
        for (r = 0; r < num;) {
            const JDIMENSION got = jpeg_read_scanlines(cinfo, rows + r, (JDIMENSION)(num - r));

            if (!got)
                return "rows missing";
            r += (int)got;
        }
        resize_columns(view->simd, &d->columns, left, rows, out);
        done += num;
        /* Rows of the window as soon as theirs are there, while those are in the cache. */
        for (; ready < view->size && (done == num_rows || d->rows.start[ready] + d->rows.taps <= d->rows.first + done);
             ready++)
            resize_row(view->simd, &d->rows, ready, d->rows.first, d->resized, stride, row,
                       view->out + (size_t)ready * row);
    }
    return NULL;
}

/* `decode` behind a barrier that libjpeg's errors jump to; d lies outside, so that it is whole after the jump. */
static const char *decode_safely(struct decoding *d, const uint8_t *data, size_t size, const struct view *view)
{
    d->cinfo.err = init_errors(&d->errors);
    if (setjmp(d->errors.jump))
        return d->errors.message;
    jpeg_create_decompress(&d->cinfo);
    return decode(d, data, size, view);
}

static PyObject *py_view(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "box", "resized", "window", "flip", "out", "simd", NULL};
    PyObject *data;
    Py_buffer out;
    struct view view = {.simd = 1};
    struct decoding d;
    char message[JMSG_LENGTH_MAX];
    const char *error;

    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!(iiii)(ii)(ii)pw*|p", names, &PyBytes_Type, &data, &view.top,
                                     &view.left, &view.height, &view.width, &view.resized_height, &view.resized_width,
                                     &view.window_top, &view.window_left, &view.mirrored, &out, &view.simd))
        return NULL;
    view.out = out.buf;
    view.simd = view.simd && has_avx2();
    while (view.size < JPEG_MAX_DIMENSION && 3 * (Py_ssize_t)(view.size + 1) * (view.size + 1) <= out.len)
        view.size++;
    /* Every number is in its range before one is taken from another. */
    if (view.size < 1 || 3 * (Py_ssize_t)view.size * view.size != out.len || view.resized_height < 1 ||
        view.resized_height > JPEG_MAX_DIMENSION || view.resized_width < 1 ||
        view.resized_width > JPEG_MAX_DIMENSION || view.window_top < 0 || view.window_left < 0 ||
        view.window_top > view.resized_height - view.size || view.window_left > view.resized_width - view.size) {
        error = "out is no square of RGB pixels inside of the resized box";
    } else {
        Py_BEGIN_ALLOW_THREADS;
        memset(&d, 0, sizeof d);
        error = decode_safely(&d, (const uint8_t *)PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data), &view);
        if (error) {
            snprintf(message, sizeof message, "%s", error);
            error = message;
        }
        jpeg_destroy_decompress(&d.cinfo);
        axis_free(&d.columns);
        axis_free(&d.rows);
        free(d.splice.data);
        free(d.pixels);
        free(d.resized);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&out);
    if (error) {
        PyErr_SetString(PyExc_ValueError, error);
        return NULL;
    }
    return PyBool_FromLong(d.by_interval);
}

static int is_bytes(PyObject *data)
{
    if (!PyBytes_Check(data))
        PyErr_Format(PyExc_TypeError, "data must be bytes, not %s", Py_TYPE(data)->tp_name);
    return PyBytes_Check(data);
}

static PyObject *py_header(PyObject *self, PyObject *arg)
{
    struct header header;

    (void)self;
    if (!is_bytes(arg))
        return NULL;
    if (!read_header((const uint8_t *)PyBytes_AS_STRING(arg), (size_t)PyBytes_GET_SIZE(arg), &header))
        Py_RETURN_NONE;
    return Py_BuildValue("iiN", header.height, header.width, PyBool_FromLong(has_columns(&header)));
}

/* ---- Transcoding ---- */

struct transcoding {
    struct jpeg_decompress_struct source;
    struct jpeg_compress_struct target;
    struct errors errors;
    struct jpeg_progress_mgr progress;
    struct jpeg_destination_mgr destination;
    uint8_t *out;
    size_t capacity, size;
};

static void count_scans(j_common_ptr cinfo)
{
    if (cinfo->is_decompressor && ((j_decompress_ptr)cinfo)->input_scan_number > MAX_SCANS) {
        struct errors *errors = (struct errors *)cinfo->err;

        snprintf(errors->message, sizeof errors->message, "more than %d scans", MAX_SCANS);
        longjmp(errors->jump, 1);
    }
}

static void open_output(j_compress_ptr cinfo)
{
    (void)cinfo; /* the first buffer is set before */
}

static boolean grow_output(j_compress_ptr cinfo)
{
    struct transcoding *t = cinfo->client_data;
    uint8_t *larger = realloc(t->out, 2 * t->capacity);

    if (!larger)
        ERREXIT1(cinfo, JERR_OUT_OF_MEMORY, 0);
    t->out = larger;
    t->destination.next_output_byte = t->out + t->capacity;
    t->destination.free_in_buffer = t->capacity;
    t->capacity *= 2;
    return TRUE;
}

static void close_output(j_compress_ptr cinfo)
{
    struct transcoding *t = cinfo->client_data;

    t->size = t->capacity - t->destination.free_in_buffer;
}

static int is_common(const struct jpeg_decompress_struct *source)
{
    const jpeg_component_info *c = source->comp_info;

    return source->num_components == 3 && source->data_precision == 8 && source->jpeg_color_space == JCS_YCbCr &&
           c[1].h_samp_factor == 1 && c[1].v_samp_factor == 1 && c[2].h_samp_factor == 1 && c[2].v_samp_factor == 1 &&
           c[0].h_samp_factor <= 2 && c[0].v_samp_factor <= c[0].h_samp_factor;
}

static const char *transcode(struct transcoding *t, const uint8_t *data, size_t size)
{
    struct jpeg_decompress_struct *source = &t->source;
    struct jpeg_compress_struct *target = &t->target;
    jvirt_barray_ptr *coefficients;
    jpeg_saved_marker_ptr marker;
    int mcu_width, mcus, interval, i;

    source->progress = &t->progress;
    t->progress.progress_monitor = count_scans;
    jpeg_mem_src(source, (unsigned char *)data, (unsigned long)size);
    jpeg_save_markers(source, JPEG_COM, 0xFFFF);
    for (i = 0; i < 16; i++)
        jpeg_save_markers(source, JPEG_APP0 + i, 0xFFFF);
    jpeg_read_header(source, TRUE);
    if (!is_common(source))
        return "not 8-bit YCbCr with whole, half or quarter chroma";
    coefficients = jpeg_read_coefficients(source);

    t->capacity = size + 4096;
    t->out = malloc(t->capacity);
    if (!t->out)
        return "out of memory";
    target->client_data = t;
    target->dest = &t->destination;
    t->destination.init_destination = open_output;
    t->destination.empty_output_buffer = grow_output;
    t->destination.term_destination = close_output;
    t->destination.next_output_byte = t->out;
    t->destination.free_in_buffer = t->capacity;
    jpeg_copy_critical_parameters(source, target);
    mcu_width = 8 * source->max_h_samp_factor;
    mcus = (int)ceil_div((long)source->image_width, mcu_width);
    for (interval = 1; mcus % interval || (interval < mcus && interval * mcu_width < SEEKABLE_PIXELS); interval++)
        ;
    target->restart_interval = (unsigned)interval;
    target->optimize_coding = TRUE;
    /* The file's own markers stand for these, where it has them. */
    target->write_JFIF_header = FALSE;
    target->write_Adobe_marker = FALSE;
    jpeg_write_coefficients(target, coefficients);
    for (marker = source->marker_list; marker; marker = marker->next)
        jpeg_write_marker(target, marker->marker, marker->data, marker->data_length);
    jpeg_finish_compress(target);
    jpeg_finish_decompress(source);
    return NULL;
}

static const char *transcode_safely(struct transcoding *t, const uint8_t *data, size_t size)
{
    t->source.err = t->target.err = init_errors(&t->errors);
    if (setjmp(t->errors.jump))
        return t->errors.message;
    jpeg_create_decompress(&t->source);
    jpeg_create_compress(&t->target);
    return transcode(t, data, size);
}

static PyObject *py_make_seekable(PyObject *self, PyObject *arg)
{
    struct transcoding t;
    PyObject *result = NULL;
    const char *error;

    (void)self;
    if (!is_bytes(arg))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    memset(&t, 0, sizeof t);
    error = transcode_safely(&t, (const uint8_t *)PyBytes_AS_STRING(arg), (size_t)PyBytes_GET_SIZE(arg));
    jpeg_destroy_compress(&t.target);
    jpeg_destroy_decompress(&t.source);
    Py_END_ALLOW_THREADS;
    if (error)
        PyErr_SetString(PyExc_ValueError, error);
    else
        result = PyBytes_FromStringAndSize((const char *)t.out, (Py_ssize_t)t.size);
    free(t.out);
    return result;
}

static PyMethodDef methods[] = {
    {"header", py_header, METH_O, "header(data): (height, width, has_columns), or None for a file view() refuses."},
    {"view", (PyCFunction)(void (*)(void))py_view, METH_VARARGS | METH_KEYWORDS,
     "view(data, box, resized, window, flip, out, simd=True): fill out, say whether only intervals were read."},
    {"make_seekable", py_make_seekable, METH_O, "make_seekable(data): the file with restart markers."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_jpeg", "Views of JPEG files on libjpeg-turbo.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__jpeg(void)
{
#if BIT_RAY_AVX2
    __builtin_cpu_init();
#endif
    return PyModule_Create(&module);
}
