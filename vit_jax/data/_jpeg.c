/* SPDX-License-Identifier: Apache-2.0
 *
 * Crops, resizes and mirrors a JPEG or an array of pixels in one pass, without the GIL.
 *
 * Only the rows and columns that the crop needs are decoded, by libjpeg-turbo. The pixels are those
 * of OpenCV's imdecode, crop and resize (INTER_LINEAR). What is unusual in a file, and every warning
 * of the decoder, makes decode() leave the image to the caller.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if defined(__SSE2__)
#include <immintrin.h>
/* Chosen when it runs, since few are built for the machine that they run on. */
#define AVX2 __attribute__((target("avx2")))
#endif

/* Larger images, and progressive ones of more scans, are left to the caller. */
#define MAX_PIXELS (1 << 26)
#define MAX_SCANS 100
/* Columns decoded on both sides of a crop, so that chroma is interpolated there as within a whole
 * image: the sampling factor is at most 4. */
#define MARGIN 4
/* Bits of the weights of a resize. */
#define WEIGHT 11
/* Bytes after a row of pixels that may be read, and after a resized row that may be written. */
#define SLACK 16

/* What to make of an image: the part [top, left, height, width] of it, resized to full_height x
 * full_width, and of that the window of out_height x out_width at (window_top, window_left);
 * mirrored if flip. */
typedef struct {
  int top, left, height, width;
  int full_height, full_width;
  int window_top, window_left, out_height, out_width;
  int flip;
} Plan;

/* Where an output pixel is: its first input pixel, and the weights of that and the next one. */
typedef struct {
  int32_t place;
  int16_t first, second;
} Tap;

/* All that must be freed, whichever way decoding ends. */
typedef struct {
  struct jpeg_decompress_struct info;
  struct jpeg_error_mgr errors;
  struct jpeg_progress_mgr progress;
  jmp_buf jump;
  const uint8_t *pixels; /* of the image, if it is decoded already */
  size_t stride;         /* bytes of a row in `pixels` */
  size_t skip, take;     /* bytes of such a row that are left out, and that are needed after these */
  uint8_t *row;     /* pixels of one row, or of its columns that are needed */
  int16_t *rows[2]; /* resized horizontally, times 2^7 */
  Tap *columns;     /* by output column; places are bytes in `row` */
} Decoder;

/* `info` comes first in Decoder. */
static void on_error(j_common_ptr info) { longjmp(((Decoder *)info)->jump, 1); }

static void on_message(j_common_ptr info, int level) {
  if (level < 0) on_error(info);
}

static void on_output(j_common_ptr info) { (void)info; }

static void on_progress(j_common_ptr info) {
  if (((j_decompress_ptr)info)->input_scan_number > MAX_SCANS) on_error(info);
}

static unsigned get(const uint8_t *p, int bytes, int little) {
  unsigned value = 0;
  int i;
  for (i = 0; i < bytes; i++) value = value << 8 | p[little ? bytes - 1 - i : i];
  return value;
}

/* Whether a segment is EXIF data that say that the image is to be turned, or can't be read. */
static int is_turned(const uint8_t *p, size_t size) {
  size_t entry, count, i;
  int little;
  if (size < 6 || memcmp(p, "Exif\0", 6)) return 0;
  p += 6;
  size -= 6;
  if (size < 8) return 1;
  little = p[0] == 'I';
  entry = get(p + 4, 4, little);
  if (entry > size - 2) return 1;
  count = get(p + entry, 2, little);
  entry += 2;
  for (i = 0; i < count; i++, entry += 12) {
    if (entry + 12 > size) return 1;
    if (get(p + entry, 2, little) == 0x112) return get(p + entry + 8, 2, little) != 1;
  }
  return 0;
}

/* Height and width in the header of a baseline or progressive JPEG of 8 bits with one or three
 * components, and whether it is to be turned; 0 if it is something else. */
static int read_size(const uint8_t *data, size_t size, int *height, int *width, int *turned) {
  size_t i = 2;
  *turned = 0;
  if (size < 4 || data[0] != 0xff || data[1] != 0xd8) return 0;
  while (i + 10 <= size && data[i] == 0xff) {
    uint8_t marker = data[i + 1];
    size_t length = (size_t)data[i + 2] << 8 | data[i + 3];
    if (marker == 0xff) { /* fill byte */
      i++;
      continue;
    }
    if (marker >= 0xc0 && marker <= 0xc2) {
      *height = data[i + 5] << 8 | data[i + 6];
      *width = data[i + 7] << 8 | data[i + 8];
      return length >= 8 && data[i + 4] == 8 && (data[i + 9] == 1 || data[i + 9] == 3) &&
             *height > 0 && *width > 0 && (int64_t)*height * *width <= MAX_PIXELS;
    }
    /* Tables, comments and applications' data may come before; other frames and pixels may not. */
    if (marker == 0xe1 && length >= 2 && i + 2 + length <= size)
      *turned |= is_turned(data + i + 4, length - 2);
    if (length < 2 || !(marker == 0xc4 || (marker >= 0xdb && marker <= 0xfe))) return 0;
    i += 2 + length;
  }
  return 0;
}

/* Whether the image is followed by its end marker, as has_jpeg_end() in decode.py finds it: the
 * decoder fills pixels that are missing, and stops at the last row that is needed. */
static int has_end(const uint8_t *data, size_t size) {
  const uint8_t *at = data + 2, *end = data + size;
  while ((at = memchr(at, 0xff, (size_t)(end - at))) != NULL) {
    uint8_t marker;
    while (at < end && *at == 0xff) at++;
    if (at == end) return 0;
    marker = *at++;
    if (marker == 0xd9) return 1;
    if (marker <= 0x01 || (marker >= 0xd0 && marker <= 0xd7)) continue;
    if (marker < 0xc0 || marker == 0xc8 || marker == 0xd8 || marker == 0xde || marker == 0xdf ||
        (marker >= 0xf0 && marker != 0xfe) || end - at < 2)
      return 0;
    if (end - at <= (at[0] << 8 | at[1])) return 0;
    at += at[0] << 8 | at[1];
  }
  return 0;
}

static int clip(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

/* The tap of output pixel i of `out` in `in` pixels, as OpenCV computes it. */
static Tap locate(int i, int in, int out) {
  double scale = 1.0 / ((double)out / in);
  float position = (float)((i + 0.5) * scale - 0.5);
  int place = (int)floorf(position);
  float second = position - place;
  Tap tap = {place, (int16_t)lrintf((1.0f - second) * (1 << WEIGHT)),
             (int16_t)lrintf(second * (1 << WEIGHT))};
  return tap;
}

/* The taps of the columns that `plan` takes from a row of the image that starts at `start`. */
static void find_columns(Tap *columns, const Plan *plan, int start) {
  int x;
  for (x = 0; x < plan->out_width; x++) {
    Tap tap = locate(plan->window_left + x, plan->width, plan->full_width);
    if (tap.place < 0 || tap.place >= plan->width - 1) {
      tap.first = 1 << WEIGHT;
      tap.second = 0;
    }
    tap.place = 3 * (plan->left + clip(tap.place, plan->width) - start);
    columns[plan->flip ? plan->out_width - 1 - x : x] = tap;
  }
}

#if defined(__SSE2__)
/* The first pixels of a row, as many as are done in pairs; the number of them. */
AVX2 static int resize_row_avx2(const uint8_t *row, const Tap *columns, int width, int16_t *out) {
  /* A colour of both pixels beside each other, as 16 bits. */
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
  const __m256i weights = _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3);
  int x;
  for (x = 0; x + 2 <= width; x += 2) {
    __m128i first = _mm_loadl_epi64((const __m128i *)(row + columns[x].place));
    __m128i second = _mm_loadl_epi64((const __m128i *)(row + columns[x + 1].place));
    __m256i taps = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(columns + x)));
    __m256i in = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    __m256i sums = _mm256_madd_epi16(_mm256_shuffle_epi8(in, order),
                                     _mm256_permutevar8x32_epi32(taps, weights));
    sums = _mm256_packs_epi32(_mm256_srai_epi32(sums, 4), sums);
    _mm_storel_epi64((__m128i *)(out + 3 * x), _mm256_castsi256_si128(sums));
    _mm_storel_epi64((__m128i *)(out + 3 * x + 3), _mm256_extracti128_si256(sums, 1));
  }
  return x;
}

/* The first bytes of a row; the number of them. */
AVX2 static int mix_rows_avx2(const int16_t *a, const int16_t *b, Tap tap, int size,
                              uint8_t *out) {
  const __m256i first = _mm256_set1_epi16(tap.first), second = _mm256_set1_epi16(tap.second);
  const __m256i half = _mm256_set1_epi16(2);
  int i;
  for (i = 0; i + 16 <= size; i += 16) {
    __m256i x = _mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)(a + i)), first);
    __m256i y = _mm256_mulhi_epi16(_mm256_loadu_si256((const __m256i *)(b + i)), second);
    x = _mm256_srai_epi16(_mm256_add_epi16(_mm256_add_epi16(x, y), half), 2);
    x = _mm256_permute4x64_epi64(_mm256_packus_epi16(x, x), 0x08);
    _mm_storeu_si128((__m128i *)(out + i), _mm256_castsi256_si128(x));
  }
  return i;
}
#endif

static void resize_row(const uint8_t *row, const Tap *columns, int width, int16_t *out) {
  int x = 0;
#if defined(__SSE2__)
  if (__builtin_cpu_supports("avx2")) x = resize_row_avx2(row, columns, width, out);
#endif
  for (; x < width; x++) {
    const uint8_t *in = row + columns[x].place;
#if defined(__SSE2__)
    int32_t both;
    __m128i left = _mm_loadl_epi64((const __m128i *)in);
    __m128i pairs = _mm_unpacklo_epi8(left, _mm_srli_si128(left, 3));
    __m128i sums;
    memcpy(&both, &columns[x].first, sizeof both);
    sums = _mm_madd_epi16(_mm_unpacklo_epi8(pairs, _mm_setzero_si128()), _mm_set1_epi32(both));
    _mm_storel_epi64((__m128i *)(out + 3 * x), _mm_packs_epi32(_mm_srai_epi32(sums, 4), sums));
#else
    int c;
    for (c = 0; c < 3; c++)
      out[3 * x + c] = (int16_t)((in[c] * columns[x].first + in[3 + c] * columns[x].second) >> 4);
#endif
  }
}

static void mix_rows(const int16_t *a, const int16_t *b, Tap tap, int size, uint8_t *out) {
  int i = 0;
#if defined(__SSE2__)
  const __m128i first = _mm_set1_epi16(tap.first), second = _mm_set1_epi16(tap.second);
  const __m128i half = _mm_set1_epi16(2);
  if (__builtin_cpu_supports("avx2")) i = mix_rows_avx2(a, b, tap, size, out);
  for (; i + 8 <= size; i += 8) {
    __m128i x = _mm_mulhi_epi16(_mm_loadu_si128((const __m128i *)(a + i)), first);
    __m128i y = _mm_mulhi_epi16(_mm_loadu_si128((const __m128i *)(b + i)), second);
    x = _mm_srai_epi16(_mm_add_epi16(_mm_add_epi16(x, y), half), 2);
    _mm_storel_epi64((__m128i *)(out + i), _mm_packus_epi16(x, x));
  }
#endif
  for (; i < size; i++) {
    int value = (((a[i] * tap.first) >> 16) + ((b[i] * tap.second) >> 16) + 2) >> 2;
    out[i] = (uint8_t)(value > 255 ? 255 : value);
  }
}

static int fits(const Plan *p, int height, int width) {
  return p->top >= 0 && p->left >= 0 && p->height > 0 && p->width > 0 &&
         p->height <= height - p->top && p->width <= width - p->left && p->window_top >= 0 &&
         p->window_left >= 0 && p->out_height <= p->full_height - p->window_top &&
         p->out_width <= p->full_width - p->window_left;
}

/* Allocates what a row needs, and restricts reading to the columns from `start` that are needed. */
static int prepare_rows(Decoder *d, const Plan *plan, int image_width) {
  JDIMENSION start, columns;
  int width = plan->out_width, low, high, i;
  d->columns = malloc((size_t)width * sizeof(Tap));
  for (i = 0; i < 2; i++) d->rows[i] = malloc((size_t)width * 3 * sizeof(int16_t) + SLACK);
  if (!d->columns || !d->rows[0] || !d->rows[1]) return 0;

  find_columns(d->columns, plan, 0);
  low = d->columns[plan->flip ? width - 1 : 0].place / 3 - MARGIN;
  high = d->columns[plan->flip ? 0 : width - 1].place / 3 + 2 + MARGIN;
  start = (JDIMENSION)(low > 0 ? low : 0);
  columns = (JDIMENSION)(high < image_width ? high : image_width) - start;
  if (!d->pixels && columns < (JDIMENSION)image_width)
    jpeg_crop_scanline(&d->info, &start, &columns); /* makes them whole blocks */
  find_columns(d->columns, plan, (int)start);
  d->skip = (size_t)start * 3;
  d->take = (size_t)columns * 3;
  d->row = calloc(d->take + SLACK, 1);
  return d->row != NULL;
}

/* Reads up to `row`, of which the pixels are kept. */
static int read_row(Decoder *d, int row) {
  struct jpeg_decompress_struct *info = &d->info;
  JDIMENSION skipped, wanted = (JDIMENSION)row;
  if (d->pixels) {
    memcpy(d->row, d->pixels + (size_t)row * d->stride + d->skip, d->take);
    return 1;
  }
  /* Rows that share their chroma are not skipped in part: libjpeg-turbo 2.1 then takes the chroma
   * of other rows where it does not interpolate it. */
  while (info->output_scanline < wanted &&
         info->output_scanline % (JDIMENSION)info->max_v_samp_factor)
    if (jpeg_read_scanlines(info, &d->row, 1) != 1) return 0;
  skipped = wanted - info->output_scanline;
  if (skipped > 0 && jpeg_skip_scanlines(info, skipped) != skipped) return 0;
  return jpeg_read_scanlines(info, &d->row, 1) == 1;
}

/* Whether rows of the image are rows of the result. */
static int keeps_rows(const Decoder *d, const Plan *plan) {
  return !plan->flip && plan->left == 0 && d->skip == 0 && d->take == (size_t)plan->width * 3 &&
         plan->width == plan->full_width && plan->width == plan->out_width &&
         plan->height == plan->full_height;
}

/* Reads and resizes row by row. */
static int resize_all(Decoder *d, const Plan *plan, uint8_t *out) {
  int held[2] = {-1, -1}; /* which row of the image each of d->rows is made of */
  int y, k;
  if (keeps_rows(d, plan)) {
    for (y = 0; y < plan->out_height; y++) {
      if (!read_row(d, plan->top + plan->window_top + y)) return 0;
      memcpy(out + (size_t)y * d->take, d->row, d->take);
    }
    return 1;
  }
  for (y = 0; y < plan->out_height; y++) {
    Tap tap = locate(plan->window_top + y, plan->height, plan->full_height);
    int rows[2] = {plan->top + clip(tap.place, plan->height),
                   plan->top + clip(tap.place + 1, plan->height)};
    int slots[2];
    for (k = 0; k < 2; k++) {
      slots[k] = held[0] == rows[k] ? 0 : 1;
      if (held[slots[k]] != rows[k]) {
        /* Rows come in order, so the older one is not needed any more. */
        slots[k] = held[0] < held[1] ? 0 : 1;
        if (!read_row(d, rows[k])) return 0;
        resize_row(d->row, d->columns, plan->out_width, d->rows[slots[k]]);
        held[slots[k]] = rows[k];
      }
    }
    mix_rows(d->rows[slots[0]], d->rows[slots[1]], tap, 3 * plan->out_width,
             out + (size_t)y * plan->out_width * 3);
  }
  return 1;
}

/* Decodes one image; 0 if that is left to the caller. */
static int decode_jpeg(Decoder *d, const uint8_t *data, size_t size, const Plan *plan,
                       uint8_t *out) {
  struct jpeg_decompress_struct *info = &d->info;
  int height, width, turned;

  if (!read_size(data, size, &height, &width, &turned) || !fits(plan, height, width) ||
      !has_end(data, size))
    return 0;
  info->err = jpeg_std_error(&d->errors);
  d->errors.error_exit = on_error;
  d->errors.emit_message = on_message;
  d->errors.output_message = on_output;
  if (setjmp(d->jump)) return 0;
  jpeg_create_decompress(info);
  d->progress.progress_monitor = on_progress;
  info->progress = &d->progress;
  jpeg_mem_src(info, (unsigned char *)data, (unsigned long)size);
  jpeg_read_header(info, TRUE);
  if ((int)info->image_height != height || (int)info->image_width != width || info->arith_code ||
      (info->num_components != 1 && info->num_components != 3))
    return 0;
  info->out_color_space = JCS_RGB;
  jpeg_start_decompress(info);
  return info->output_components == 3 && prepare_rows(d, plan, width) && resize_all(d, plan, out);
}

/* The same for uint8 [height, width, 3]. */
static int resize_pixels(Decoder *d, const Py_buffer *image, const Plan *plan, uint8_t *out) {
  const Py_ssize_t *shape = image->shape;
  if (image->itemsize != 1 || shape[2] != 3 || shape[0] > 65535 || shape[1] > 65535 ||
      !fits(plan, (int)shape[0], (int)shape[1]))
    return 0;
  d->pixels = image->buf;
  d->stride = (size_t)shape[1] * 3;
  return prepare_rows(d, plan, (int)shape[1]) && resize_all(d, plan, out);
}

static PyObject *size_of(PyObject *module, PyObject *argument) {
  Py_buffer data;
  int height, width, turned, known;
  (void)module;
  if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE)) return NULL;
  known = read_size(data.buf, (size_t)data.len, &height, &width, &turned);
  PyBuffer_Release(&data);
  if (!known) Py_RETURN_NONE;
  return Py_BuildValue("(iiO)", height, width, turned ? Py_True : Py_False);
}

/* Of pixels if `image` has three dimensions, else of a JPEG. */
static int run(const Py_buffer *image, const Plan *plan, uint8_t *out) {
  Decoder decoder;
  int done;
  memset(&decoder, 0, sizeof decoder);
  done = image->ndim == 3 ? resize_pixels(&decoder, image, plan, out)
                          : decode_jpeg(&decoder, image->buf, (size_t)image->len, plan, out);
  jpeg_destroy_decompress(&decoder.info);
  free(decoder.row);
  free(decoder.rows[0]);
  free(decoder.rows[1]);
  free(decoder.columns);
  return done;
}

/* An image to be made, and the memory that is held for it. */
typedef struct {
  Py_buffer in, out;
  Plan plan;
  int has_in, has_out, done;
} Job;

/* Fills in a job; 0 with an exception if it is not one. */
static int read_job(PyObject *item, Job *job) {
  Plan *p = &job->plan;
  PyObject *image;
  if (!PyTuple_Check(item)) {
    PyErr_SetString(PyExc_TypeError, "a job is a tuple");
    return 0;
  }
  if (!PyArg_ParseTuple(item, "Ow*(iiii)(ii)(iiii)p", &image, &job->out, &p->top, &p->left,
                        &p->height, &p->width, &p->full_height, &p->full_width, &p->window_top,
                        &p->window_left, &p->out_height, &p->out_width, &p->flip))
    return 0;
  job->has_out = 1;
  if (p->out_height < 1 || p->out_width < 1 || p->out_height > 65535 || p->out_width > 65535 ||
      job->out.len != (Py_ssize_t)p->out_height * p->out_width * 3) {
    PyErr_SetString(PyExc_ValueError, "out has another size than its window");
    return 0;
  }
  job->has_in = !PyObject_GetBuffer(image, &job->in, PyBUF_ND);
  return job->has_in;
}

static PyObject *decode(PyObject *module, PyObject *argument) {
  PyObject *list = PySequence_List(argument), *result = NULL; /* nobody else can change it */
  Py_ssize_t count, i;
  Job *jobs;
  (void)module;
  if (!list) return NULL;
  count = PyList_GET_SIZE(list);
  jobs = PyMem_Calloc((size_t)count, sizeof(Job));
  if (!jobs) {
    Py_DECREF(list);
    return PyErr_NoMemory();
  }
  for (i = 0; i < count && read_job(PyList_GET_ITEM(list, i), jobs + i); i++) {
  }
  if (i == count) {
    Py_BEGIN_ALLOW_THREADS
    for (i = 0; i < count; i++) jobs[i].done = run(&jobs[i].in, &jobs[i].plan, jobs[i].out.buf);
    Py_END_ALLOW_THREADS
    result = PyList_New(count);
    for (i = 0; result && i < count; i++) PyList_SET_ITEM(result, i, PyBool_FromLong(jobs[i].done));
  }
  for (i = 0; i < count; i++) {
    if (jobs[i].has_in) PyBuffer_Release(&jobs[i].in);
    if (jobs[i].has_out) PyBuffer_Release(&jobs[i].out);
  }
  PyMem_Free(jobs);
  Py_DECREF(list);
  return result;
}

static PyMethodDef methods[] = {
    {"size", size_of, METH_O,
     "size(encoded) -> (height, width, whether EXIF data may say that it is to be turned), or None "
     "for what decode() leaves to the caller."},
    {"decode", decode, METH_O,
     "decode([(image, out, part, full, window, flip), ...]) -> [whether it is done, ...].\n\n"
     "The part (top, left, height, width) of a JPEG or uint8 [height, width, 3] is resized to full "
     "(height, width), of which out is the window (top, left, height, width), mirrored if flip. "
     "All are made one after the other, without the GIL."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_jpeg", NULL, 0, methods,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg(void) { return PyModule_Create(&definition); }
