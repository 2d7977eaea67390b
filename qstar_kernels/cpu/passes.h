/* The passes of rows.c over one row of logits, in vectors. rows.c includes this file once for each instruction set that
 * it can choose from, with NAME(x) giving every function a name of its own and WIDTH the doubles of a vector.
 *
 * A row goes by in tiles of 256 ids that stay in the L1 cache. All arithmetic is float64 but that of the outline, which
 * only guesses. Sums run in one fixed order, so a row's bits depend on the row alone.
 */

typedef double NAME(vd) __attribute__((vector_size(8 * WIDTH), may_alias));
typedef int64_t NAME(vl) __attribute__((vector_size(8 * WIDTH), may_alias));
typedef float NAME(vf) __attribute__((vector_size(8 * WIDTH), may_alias));
typedef int32_t NAME(vi) __attribute__((vector_size(8 * WIDTH), may_alias));
#define vd NAME(vd)
#define vl NAME(vl)
#define vf NAME(vf)
#define vi NAME(vi)
#define AT(type, array, i) (*(type *)&(array)[i])

static inline double NAME(total)(vd v) {
    for (int n = WIDTH / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) v[i] = v[2 * i] + v[2 * i + 1];
    return v[0];
}

static inline double NAME(total_f)(vf v) {
    for (int n = WIDTH; n >= 4; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return ((double)v[0] + v[1]) + (v[2] + v[3]);
}

/* exp(x) to 3e-16, 0 below -708; x must not be above 708. The polynomial interpolates exp on [-ln2/2, ln2/2] at the
 * Chebyshev nodes. */
static inline vd NAME(exp_d)(vd x) {
    const double magic = 0x1.8p52; /* the sum's low bits are round(x / ln 2) */
    vl keep = x >= -708.0;
    vd n = x * 0x1.71547652b82fep0 + magic;
    vl exponent = (vl)n << 52;
    n -= magic;
    vd r = x - n * 0x1.62e42fefa39efp-1;
    r -= n * 0x1.abc9e3b39803fp-56;
    vd p = r * 0x1.28a2ca617b969p-22 + 0x1.72fafebdaf273p-19;
    p = p * r + 0x1.a019a6611cad5p-16;
    p = p * r + 0x1.a01978b8b3d18p-13;
    p = p * r + 0x1.6c16c17f46982p-10;
    p = p * r + 0x1.1111112ddae8bp-7;
    p = p * r + 0x1.55555555520a4p-5;
    p = p * r + 0x1.555555554b736p-3;
    p = p * r + 0x1.0000000000005p-1;
    p = p * r + 0x1.000000000001ep+0;
    p = p * r + 1.0;
    return (vd)(((vl)p + exponent) & keep);
}

/* The same in float32, to 1e-7, 0 below -87. */
static inline vf NAME(exp_f)(vf x) {
    const float magic = 0x1.8p23f;
    vi keep = x >= -87.0f;
    vf n = x * 0x1.715476p0f + magic;
    vi exponent = (vi)n << 23;
    n -= magic;
    vf r = x - n * 0x1.62e4p-1f;
    r -= n * 0x1.7f7d1cp-20f;
    vf p = r * 0x1.6d7544p-10f + 0x1.126fb9p-7f;
    p = p * r + 0x1.5554adp-5f;
    p = p * r + 0x1.555404p-3f;
    p = p * r + 0x1.000000p-1f;
    p = p * r + 0x1.000001p+0f;
    p = p * r + 1.0f;
    return (vf)(((vi)p + exponent) & keep);
}

static inline float NAME(from_half)(uint16_t h) {
    union { uint32_t bits; float value; } f = {(uint32_t)(h & 0x7fff) << 13};
    f.value *= 0x1p112f;
    if ((h & 0x7c00) == 0x7c00) f.bits |= 0x7f800000;
    f.bits |= (uint32_t)(h & 0x8000) << 16;
    return f.value;
}

static inline float NAME(from_bfloat)(uint16_t h) {
    union { uint32_t bits; float value; } f = {(uint32_t)h << 16};
    return f.value;
}

/* Logits start, …, start + TILE − 1 of one side; what lies beyond the row reads as a mask. */
#define READ(type, convert)                                                          \
    {                                                                                \
        const type *from = (const type *)row->logits[side] + start * stride;         \
        if (stride == 1 && count == TILE)                                            \
            for (int i = 0; i < TILE; i++) out[i] = convert(from[i]);                \
        else                                                                         \
            for (int i = 0; i < count; i++) out[i] = convert(from[i * stride]);      \
        break;                                                                       \
    }
#define LOAD(load, real)                                                             \
    static void load(const Row *row, int side, int64_t start, real *restrict out) {  \
        const int64_t stride = row->stride[side], left = row->vocab_size - start;    \
        const int count = left >= TILE ? TILE : left > 0 ? (int)left : 0;            \
        switch (row->dtype[side]) {                                                  \
        case FLOAT32: READ(float, )                                                  \
        case BFLOAT16: READ(uint16_t, NAME(from_bfloat))                             \
        case FLOAT16: READ(uint16_t, NAME(from_half))                                \
        default: READ(double, )                                                      \
        }                                                                            \
        for (int i = count; i < TILE; i++) out[i] = -INFINITY;                       \
    }
LOAD(NAME(load), double)
LOAD(NAME(load_f), float)
#undef LOAD
#undef READ

/* What `scan` sees of a tile, in the type of the logits: maxima, minima over what is not masked, and which kinds of token
 * there are; then a, b and d in float32, less the maxima so far, −inf and 0 where there is none. */
#define SURVEY(survey, load, real, same, v, l)                                                                         \
    static void survey(const Row *row, int64_t start, Scan *scan, Near *near) {                                        \
        enum { COUNT = sizeof(v) / sizeof(real) };                                                                     \
        _Alignas(8 * WIDTH) real space[2][TILE];                                                                              \
        const real *raw[2];                                                                                            \
        for (int side = 0; side < 2; side++) {                                                                         \
            if (row->dtype[side] == same && row->stride[side] == 1 && start + TILE <= row->vocab_size) {               \
                raw[side] = (const real *)row->logits[side] + start; /* a copy would take as long as the rest */       \
            } else {                                                                                                   \
                load(row, side, start, space[side]);                                                                   \
                raw[side] = space[side];                                                                               \
            }                                                                                                          \
        }                                                                                                              \
        const real *a = raw[0], *b = raw[1], scale = (real)row->scale, half = scale / 2;                               \
        v high[2], low[2];                                                                                             \
        l nan = {0};                                                                                                   \
        for (int side = 0; side < 2; side++) memcpy(&high[side], raw[side], sizeof(v)), low[side] = high[side];        \
        for (int i = 0; i < TILE; i += COUNT)                                                                          \
            for (int side = 0; side < 2; side++) {                                                                     \
                v x;                                                                                                   \
                memcpy(&x, raw[side] + i, sizeof x);                                                                   \
                l higher = x > high[side], lower = x < low[side];                                                      \
                nan |= x != x;                                                                                         \
                high[side] = (v)(((l)x & higher) | ((l)high[side] & ~higher));                                         \
                low[side] = (v)(((l)x & lower) | ((l)low[side] & ~lower));                                             \
            }                                                                                                          \
        double least[2];                                                                                               \
        for (int i = 0; i < COUNT; i++) scan->nan |= nan[i] != 0;                                                      \
        for (int side = 0; side < 2; side++) {                                                                         \
            least[side] = low[side][0];                                                                                \
            for (int i = 0; i < COUNT; i++) {                                                                          \
                if (high[side][i] > scan->high[side]) scan->high[side] = high[side][i];                                \
                if (low[side][i] < least[side]) least[side] = low[side][i];                                            \
            }                                                                                                          \
        }                                                                                                              \
        const real high_a = (real)scan->high[0], high_b = (real)scan->high[1], apart = high_a - high_b;                \
        for (int i = 0; i < TILE; i++) {                                                                               \
            near->a[i] = (float)((a[i] - high_a) * half);                                                              \
            near->b[i] = (float)((b[i] - high_b) * half);                                                              \
            near->d[i] = (float)((a[i] - b[i] - apart) * scale);                                                       \
        }                                                                                                              \
        if (least[0] > row->mask[0] && least[1] > row->mask[1]) {                                                      \
            for (int side = 0; side < 2; side++) scan->low[side] = fmin(least[side], scan->low[side]);                 \
            scan->common = 1;                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        l theta = {0}, t = {0}, both = {0}; /* how many there are of each kind */                                      \
        real mask[2];                                                                                                  \
        for (int side = 0; side < 2; side++) {                                                                         \
            mask[side] = (real)row->mask[side];                                                                        \
            if (mask[side] > row->mask[side]) mask[side] = (real)nextafterf((float)mask[side], -INFINITY);             \
            low[side] = (v){0} + INFINITY;                                                                             \
        }                                                                                                              \
        for (int i = 0; i < TILE; i += COUNT) {                                                                        \
            l ok[2];                                                                                                   \
            for (int side = 0; side < 2; side++) {                                                                     \
                v x;                                                                                                   \
                memcpy(&x, raw[side] + i, sizeof x);                                                                   \
                ok[side] = x > mask[side];                                                                             \
                l lower = (x < low[side]) & ok[side];                                                                  \
                low[side] = (v)(((l)x & lower) | ((l)low[side] & ~lower));                                             \
            }                                                                                                          \
            theta -= ok[0];                                                                                            \
            t -= ok[1];                                                                                                \
            both -= ok[0] & ok[1];                                                                                     \
        }                                                                                                              \
        int64_t thetas = 0, ts = 0, boths = 0;                                                                         \
        for (int i = 0; i < COUNT; i++) {                                                                              \
            thetas += theta[i], ts += t[i], boths += both[i];                                                          \
            for (int side = 0; side < 2; side++)                                                                       \
                if (low[side][i] < scan->low[side]) scan->low[side] = low[side][i];                                    \
        }                                                                                                              \
        scan->masked |= boths < TILE && boths < row->vocab_size - start;                                               \
        scan->only_theta |= boths < thetas;                                                                            \
        scan->only_t |= boths < ts;                                                                                    \
        scan->common |= boths > 0;                                                                                     \
        for (int i = 0; i < TILE; i++) {                                                                               \
            const int has_theta = a[i] > mask[0], has_t = b[i] > mask[1];                                              \
            near->a[i] = has_theta ? near->a[i] : -INFINITY;                                                           \
            near->b[i] = has_t ? near->b[i] : -INFINITY;                                                               \
            near->d[i] = has_theta & has_t ? near->d[i] : 0;                                                           \
        }                                                                                                              \
    }
SURVEY(NAME(survey), NAME(load), double, FLOAT64, vd, vl)
SURVEY(NAME(survey_f), NAME(load_f), float, FLOAT32, vf, vi)
#undef SURVEY

/* Take the sums of `scan` to maxima that have risen. */
static void NAME(lower)(const Row *row, const double *before, const double *high, double *sums) {
    double rise[2];
    for (int side = 0; side < 2; side++) /* nothing has been summed of a side that was masked so far */
        rise[side] = before[side] > row->mask[side] ? (high[side] - before[side]) * row->scale : 0;
    const double less = rise[0] - rise[1];
    const double factor[3] = {exp(-rise[1]), exp(-(rise[0] + rise[1]) / 2), exp(-rise[0])};
    for (int k = 0; k < 3; k++) {
        double *s = sums + 3 * k;
        s[2] = factor[k] * (s[2] - less * (2 * s[1] - less * s[0]));
        s[1] = factor[k] * (s[1] - less * s[0]);
        s[0] *= factor[k];
    }
    sums[9] *= factor[2];
    sums[10] *= factor[0];
}

/* First sweep: maxima, minima over what is not masked, and which kinds of token there are. If `outline` is wanted, in
 * float32 and about the maxima so far: Σ w, Σ w d, Σ w d² over the common support for w = q_α not normalised, α = 0, ½, 1,
 * and the two normalisers. */
static void NAME(scan)(const Row *row, Scan *scan, Outline *outline) {
    const int wide = row->dtype[0] == FLOAT64 || row->dtype[1] == FLOAT64;
    Near near;
    double sums[11] = {0};
    *scan = (Scan){.high = {-INFINITY, -INFINITY}, .low = {INFINITY, INFINITY}};
    for (int64_t start = 0; start < row->vocab_size; start += TILE) {
        const double before[2] = {scan->high[0], scan->high[1]};
        if (wide) NAME(survey)(row, start, scan, &near);
        else NAME(survey_f)(row, start, scan, &near);
        if (!outline) continue;
        if (scan->high[0] > before[0] || scan->high[1] > before[1]) NAME(lower)(row, before, scan->high, sums);
        vf s[11] = {{0}};
        for (int i = 0; i < TILE; i += 2 * WIDTH) {
            vf d = AT(vf, near.d, i), theta = NAME(exp_f)(AT(vf, near.a, i)), t = NAME(exp_f)(AT(vf, near.b, i));
            vf e[3] = {t * t, theta * t, theta * theta}; /* the third exponential is for nothing */
            s[9] += e[2];
            s[10] += e[0];
            if (scan->masked) {
                vi common = (AT(vf, near.a, i) > -INFINITY) & (AT(vf, near.b, i) > -INFINITY);
                e[2] = (vf)((vi)e[2] & common);
                e[0] = (vf)((vi)e[0] & common);
            }
            for (int k = 0; k < 3; k++) {
                vf wd = e[k] * d;
                s[3 * k] += e[k];
                s[3 * k + 1] += wd;
                s[3 * k + 2] += wd * d;
            }
        }
        for (int k = 0; k < 11; k++) sums[k] += NAME(total_f)(s[k]);
    }
    if (!outline) return;
    for (int k = 0; k < 3; k++) {
        outline->f[k] = log(sums[3 * k]);
        outline->slope[k] = sums[3 * k + 1] / sums[3 * k];
        outline->curvature[k] = sums[3 * k + 2] / sums[3 * k] - outline->slope[k] * outline->slope[k];
    }
    outline->norm[0] = log(sums[9]);
    outline->norm[1] = log(sums[10]);
}

/* a, b, d = a − b and x = b + α d of a tile, ABSENT for −inf, d = 0 there. Not inlined: thresholds on x bind only if
 * every pass rounds it alike. */
static __attribute__((noinline)) void NAME(tile)(const Row *row, int64_t start, double alpha, Tile *tile) {
    NAME(load)(row, 0, start, tile->a);
    NAME(load)(row, 1, start, tile->b);
    const int whole = !row->masked && start + TILE <= row->vocab_size;
    for (int i = 0; i < TILE; i += WIDTH) {
        vd a = (AT(vd, tile->a, i) - row->high[0]) * row->scale;
        vd b = (AT(vd, tile->b, i) - row->high[1]) * row->scale;
        vd d = a - b, x = b + alpha * d;
        if (!whole) {
            const vd absent = (vd){0} + ABSENT;
            vl ok_theta = AT(vd, tile->a, i) > row->mask[0], ok_t = AT(vd, tile->b, i) > row->mask[1], ok = ok_theta & ok_t;
            a = (vd)(((vl)a & ok_theta) | ((vl)absent & ~ok_theta));
            b = (vd)(((vl)b & ok_t) | ((vl)absent & ~ok_t));
            d = (vd)((vl)d & ok);
            x = (vd)(((vl)x & ok) | ((vl)absent & ~ok));
        }
        AT(vd, tile->a, i) = a;
        AT(vd, tile->b, i) = b;
        AT(vd, tile->d, i) = d;
        AT(vd, tile->x, i) = x;
    }
}

static inline void NAME(exp_all)(const double *x, double *out) {
    for (int i = 0; i < TILE; i += WIDTH) AT(vd, out, i) = NAME(exp_d)(AT(vd, x, i));
}

/* Normalisers, entropies and the slopes of F at both ends. Maxima are counted apart: on a nearly certain row the
 * normaliser's logarithm and the entropy are made of the others alone. */
static void NAME(ends)(const Row *row, Ends *ends) {
    Tile tile;
    vd maxima[2] = {{0}}, others[2] = {{0}}, log_mean[2] = {{0}}, mass[2] = {{0}}, slope[2] = {{0}};
    const vd one = (vd){0} + 1.0;
    for (int64_t start = 0; start < row->vocab_size; start += TILE) {
        NAME(tile)(row, start, 0.5, &tile);
        for (int i = 0; i < TILE; i += WIDTH) {
            vl common = AT(vd, tile.x, i) > ABSENT;
            for (int side = 0; side < 2; side++) {
                vd logit = side ? AT(vd, tile.b, i) : AT(vd, tile.a, i), e = NAME(exp_d)(logit);
                vl at_top = logit == 0;
                maxima[side] += (vd)((vl)one & at_top);
                others[side] += (vd)((vl)e & ~at_top);
                log_mean[side] += e * logit;
                mass[side] += (vd)((vl)e & common);
                slope[side] += e * AT(vd, tile.d, i);
            }
        }
    }
    for (int side = 0; side < 2; side++) {
        const double count = NAME(total)(maxima[side]), rest = NAME(total)(others[side]);
        ends->norm[side] = log(count) + log1p(rest / count);
        ends->entropy[side] = ends->norm[side] - NAME(total)(log_mean[side]) / (count + rest);
        ends->slope[side] = NAME(total)(slope[side]) / NAME(total)(mass[side]);
    }
}

/* The greatest x, 2a − x and 2b − x over the common support. */
static void NAME(maxima)(const Row *row, double alpha, double *top) {
    Tile tile;
    vd high[3];
    for (int k = 0; k < 3; k++) high[k] = (vd){0} - INFINITY;
    for (int64_t start = 0; start < row->vocab_size; start += TILE) {
        NAME(tile)(row, start, alpha, &tile);
        for (int i = 0; i < TILE; i += WIDTH) {
            vd x = AT(vd, tile.x, i), v[3] = {x, 2 * AT(vd, tile.a, i) - x, 2 * AT(vd, tile.b, i) - x};
            for (int k = 0; k < 3; k++) {
                vl higher = (v[k] > high[k]) & (x > ABSENT);
                high[k] = (vd)(((vl)v[k] & higher) | ((vl)high[k] & ~higher));
            }
        }
    }
    for (int k = 0; k < 3; k++) {
        top[k] = high[k][0];
        for (int i = 1; i < WIDTH; i++)
            if (high[k][i] > top[k]) top[k] = high[k][i];
    }
}

/* Second sweep, exact: the curve at α, 2 − α and −α, and of every group log Σ w, mean and variance of d. Moments are of
 * d − center: with the center near the root's slope neither the residual nor the variance there cancels. */
static void NAME(sweep)(const Row *row, double alpha, Point *point, double *groups) {
    Tile tile;
    const double center = row->center;
    double top[3] = {0, 0, 0}; /* of x, 2a − x and 2b − x; where no exponential overflows they are not needed */
    if (row->far) NAME(maxima)(row, alpha, top);
    double sums[10] = {0};
    _Alignas(8 * WIDTH) double w[TILE], ea[TILE], eb[TILE], hi[TILE], lo[TILE];
    for (int64_t group = 0; group < row->groups; group++) {
        vd s[10] = {{0}};
        for (int64_t start = group * GROUP; start < (group + 1) * GROUP && start < row->vocab_size; start += TILE) {
            NAME(tile)(row, start, alpha, &tile);
            NAME(exp_all)(tile.a, ea);
            NAME(exp_all)(tile.b, eb);
            if (row->far) {
                for (int i = 0; i < TILE; i++) {
                    const int common = tile.x[i] > ABSENT;
                    hi[i] = common ? 2 * tile.a[i] - tile.x[i] - top[1] : ABSENT;
                    lo[i] = common ? 2 * tile.b[i] - tile.x[i] - top[2] : ABSENT;
                    tile.x[i] -= top[0];
                }
                NAME(exp_all)(hi, hi);
                NAME(exp_all)(lo, lo);
            }
            NAME(exp_all)(tile.x, w);
            for (int i = 0; i < TILE; i += WIDTH) {
                vd mass = AT(vd, w, i), d = AT(vd, tile.d, i) - center, first = mass * d, second = first * d;
                vd theta = AT(vd, ea, i), t = AT(vd, eb, i), high, low;
                if (row->far) {
                    high = AT(vd, hi, i);
                    low = AT(vd, lo, i);
                } else { /* π_θ² / q and π_t² / q, the integrands of F(2 − α) and F(−α), by one division */
                    vl common = mass > 0;
                    vd inverse = (vd)((vl)(1.0 / mass) & common);
                    high = theta * theta * inverse;
                    low = t * t * inverse;
                }
                s[0] += mass;
                s[1] += first;
                s[2] += second;
                s[3] += second * d;
                s[4] += theta;
                s[5] += t;
                s[6] += high;
                s[7] += high * d;
                s[8] += low;
                s[9] += low * d;
            }
        }
        double of_group[10];
        for (int k = 0; k < 10; k++) sums[k] += of_group[k] = NAME(total)(s[k]);
        const double mean = of_group[1] / of_group[0];
        groups[group] = log(of_group[0]);
        groups[row->groups + group] = center + mean;
        groups[2 * row->groups + group] = of_group[2] / of_group[0] - mean * mean;
    }
    const double mean = sums[1] / sums[0], second = sums[2] / sums[0], third = sums[3] / sums[0];
    point->f = top[0] + log(sums[0]);
    point->slope = center + mean;
    point->curvature = second - mean * mean > 0 ? second - mean * mean : 0;
    point->skew = third - 3 * mean * second + 2 * mean * mean * mean;
    point->norm[0] = log(sums[4]);
    point->norm[1] = log(sums[5]);
    point->f_high = top[1] + log(sums[6]);
    point->gap = mean + (center - (point->norm[0] - point->norm[1]));
    point->slope_high = center + sums[7] / sums[6];
    point->f_low = top[2] + log(sums[8]);
    point->slope_low = center + sums[9] / sums[8];
    for (int64_t group = 0; group < row->groups; group++) groups[group] += top[0];
}

/* x − f of a tile where truncation keeps the token, −inf elsewhere. */
static void NAME(log_q)(const Row *row, int64_t start, const Mixture *q, double *out) {
    Tile tile;
    NAME(tile)(row, start, q->alpha, &tile);
    for (int i = 0; i < TILE; i++) {
        const double value = tile.x[i] - q->f;
        const int kept = tile.x[i] > ABSENT && value >= q->lowest && tile.b[i] >= q->lowest_b;
        out[i] = kept ? value : -INFINITY;
    }
}

/* exp of a tile that `log_q` left. */
static void NAME(weights)(const double *log_q, double *out) { NAME(exp_all)(log_q, out); }

/* Philox-4x32-10 (Salmon et al., 2011) of ids first, …, first + 2 · count − 1, two ids a call of the generator: 64 random
 * bits an id. */
static void NAME(philox)(int64_t seed, int64_t position, uint32_t stream, int64_t first, int count, uint64_t *out) {
    enum { LANES = 32 };
    for (int base = 0; base < count; base += LANES) {
        uint64_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
        for (int i = 0; i < LANES; i++) {
            c0[i] = (uint32_t)(first / 2 + base + i);
            c1[i] = (uint32_t)position;
            c2[i] = (uint32_t)((uint64_t)position >> 32);
            c3[i] = stream;
        }
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)((uint64_t)seed >> 32);
        for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
            for (int i = 0; i < LANES; i++) {
                const uint64_t even = c0[i] * 0xD2511F53u, odd = c2[i] * 0xCD9E8D57u;
                c0[i] = (odd >> 32) ^ c1[i] ^ key0;
                c1[i] = odd & 0xFFFFFFFFu;
                c2[i] = (even >> 32) ^ c3[i] ^ key1;
                c3[i] = even & 0xFFFFFFFFu;
            }
        for (int i = 0; i < LANES && base + i < count; i++) {
            out[2 * (base + i)] = c0[i] << 32 | c1[i];
            out[2 * (base + i) + 1] = c2[i] << 32 | c3[i];
        }
    }
}

static const Passes NAME(passes) = {
    NAME(scan), NAME(ends), NAME(sweep), NAME(log_q), NAME(weights),
    NAME(philox),
};

#undef vd
#undef vl
#undef vf
#undef vi
#undef AT
